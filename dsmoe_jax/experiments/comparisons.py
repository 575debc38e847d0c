"""The comparisons, decided before running: `COMPARISONS`, and what came out: `compare`."""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.variants import VARIANTS

CONFIDENCE: Final = 0.95


class Comparison(NamedTuple):
    """The claim that `better` has a lower loss than `worse`, or the same one.

    Attributes:
        better: A key of `VARIANTS`.
        worse: Another one.
        claim: What the paper shows by it.
        equal: Whether the paper finds them equal.
    """

    better: str
    worse: str
    claim: str
    equal: bool = False


Verdict = Literal["as in the paper", "contrary", "undecided"]


class Outcome(NamedTuple):
    """The paired difference of validation losses, worse minus better, in nats per token.

    Attributes:
        comparison: What was compared.
        mean: Mean over the seeds.
        half_width: Half the width of the t-interval; infinite for one seed.
        seeds: Number of pairs.
        paper: Difference in the paper, None if not published.
        verdict: What the interval says of the claim.
    """

    comparison: Comparison
    mean: float
    half_width: float
    seeds: int
    paper: float | None
    verdict: Verdict


COMPARISONS: Final = (
    Comparison("hash", "dense", "sparse experts beat a dense model of equal compute (table 1)"),
    Comparison("switch", "dense", "sparse experts beat a dense model of equal compute (table 1)"),
    Comparison("gshard", "hash", "two experts per token beat one (table 1)"),
    Comparison("gshard", "switch", "two experts per token beat one (table 1)"),
    Comparison("deepseek_moe", "gshard", "DeepSeekMoE beats GShard at equal compute and parameters (table 1)"),
    Comparison(
        "deepseek_moe", "gshard_x1.5", "DeepSeekMoE equals GShard of 1.5 times the experts (table 2)", equal=True
    ),
    Comparison("deepseek_moe", "dense_x16", "DeepSeekMoE comes close to its dense upper bound (table 2)", equal=True),
    Comparison("shared_1_15", "gshard", "isolating a shared expert helps (fig. 3)"),
    Comparison("shared_1_31", "shared_1_15", "finer experts help (fig. 3)"),
    Comparison("deepseek_moe", "shared_1_31", "still finer experts help (fig. 3)"),
    Comparison("deepseek_moe", "fine_grained", "a shared expert helps fine-grained ones (section 4.4)"),
    Comparison("deepseek_moe", "shared_2_62", "the number of shared experts matters little (section 4.4)", equal=True),
    Comparison("deepseek_moe", "shared_4_60", "the number of shared experts matters little (section 4.4)", equal=True),
    Comparison("half_active", "gshard", "half the active experts still beat GShard (fig. 6)"),
)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return mean and half the width of the t-interval of independent values.

    Args:
        values: [n]; the half-width of one value is infinite.
    """
    if not len(values):
        raise DSMoEError("an interval needs at least one value")
    if len(values) == 1:
        return float(values[0]), float("inf")
    from scipy import stats

    error = values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error)


def compare(losses: Mapping[str, Mapping[int, float]]) -> list[Outcome]:
    """Evaluate every comparison whose variants have losses of a common seed.

    Args:
        losses: Validation losses by variant and seed.
    """
    outcomes = []
    for one in COMPARISONS:
        better, worse = losses.get(one.better, {}), losses.get(one.worse, {})
        if seeds := sorted(better.keys() & worse.keys()):
            mean, half = interval(np.array([worse[seed] - better[seed] for seed in seeds]))
            published = VARIANTS[one.worse].paper, VARIANTS[one.better].paper
            paper = None if None in published else published[0] - published[1]  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            outcomes.append(Outcome(one, mean, half, len(seeds), paper, _verdict(one, mean, half)))
    return outcomes


def _verdict(one: Comparison, mean: float, half: float) -> Verdict:
    if not half < float("inf"):
        return "undecided"
    if one.equal:  # the interval contains 0 or favors the better one
        return "contrary" if mean + half < 0 else "as in the paper"
    return "as in the paper" if mean > half else "contrary" if mean < -half else "undecided"
