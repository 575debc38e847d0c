"""The comparisons, decided before running: `COMPARISONS`, and their outcomes: `compare`."""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.variants import VARIANTS
from dsmoe_jax.layers.ablation import Ablation

CONFIDENCE: Final = 0.95


class Comparison(NamedTuple):
    """The claim that `better` has a lower loss than `worse`, or an equal one, or that an ablation raises it by less.

    Attributes:
        better: A key of `VARIANTS`.
        worse: Another one.
        claim: The claim in words, and where the paper makes it.
        equal: Whether the claim is that they are equal.
        disabled: Sixteenths of the routed experts; if any, the rise of the loss with these disabled is compared.
    """

    better: str
    worse: str
    claim: str
    equal: bool = False
    disabled: int = 0


Verdict = Literal["confirmed", "contradicted", "undecided", "not contradicted"]
Ablated = Mapping[Ablation, float]  # losses of a trained model, without an ablation and with each


class Outcome(NamedTuple):
    """The paired difference of what is compared, worse minus better, in nats per token.

    Attributes:
        comparison: What was compared.
        mean: Mean over the seeds.
        half_width: Half the width of the t-interval; infinite for one seed.
        seeds: Number of pairs.
        paper: Difference in the paper, None if not published.
        verdict: What the interval says of the claim; that two variants are equal can be contradicted, not confirmed.
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
        "deepseek_moe", "gshard_x1.5", "DeepSeekMoE equals GShard with experts 1.5 times as wide (table 2)", equal=True
    ),
    Comparison("deepseek_moe", "dense_x16", "DeepSeekMoE comes close to its dense upper bound (table 2)", equal=True),
    Comparison("shared_1_15", "gshard", "isolating a shared expert helps (fig. 3)"),
    Comparison("shared_1_31", "shared_1_15", "finer experts help (fig. 3)"),
    Comparison("deepseek_moe", "shared_1_31", "still finer experts help (fig. 3)"),
    Comparison(
        "deepseek_moe",
        "fine_grained",
        "a shared expert helps fine-grained ones (the idea of section 3.2; the paper has no such model)",
    ),
    Comparison("deepseek_moe", "shared_2_62", "the number of shared experts matters little (section 4.4)", equal=True),
    Comparison("deepseek_moe", "shared_4_60", "the number of shared experts matters little (section 4.4)", equal=True),
    Comparison("half_active", "gshard", "half the active experts still beat GShard (fig. 6)"),
    Comparison(
        "gshard_x1.5",
        "deepseek_moe",
        "1/16 of the routed experts disabled: DeepSeekMoE loses more (fig. 4)",
        disabled=1,
    ),
    Comparison(
        "gshard_x1.5",
        "deepseek_moe",
        "4/16 of the routed experts disabled: DeepSeekMoE loses more (fig. 4)",
        disabled=4,
    ),
)
# The paper's losses of trained models, figures 4 and 5 and section 4.5; the experts of the highest scores are disabled.
PAPER_ABLATIONS: Final[dict[str, dict[Ablation, float]]] = {
    "deepseek_moe": {
        Ablation(): 1.808,
        **{Ablation(disable_top=n): loss for n, loss in ((4, 7.468), (8, 8.196), (12, 8.706), (16, 9.071))},
        **{Ablation(active=n): loss for n, loss in ((6, 1.814), (5, 1.831), (4, 1.868), (3, 1.956))},
        Ablation(shared=False): 2.414,
    },
    "gshard_x1.5": {
        Ablation(): 1.808,
        **{Ablation(disable_top=n): loss for n, loss in ((1, 5.586), (2, 7.518), (3, 7.627), (4, 7.721))},
    },
}


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


def compare(
    losses: Mapping[str, Mapping[int, float]], ablated: Mapping[str, Mapping[int, Ablated]] | None = None
) -> list[Outcome]:
    """Evaluate every comparison whose variants have values of a common seed.

    Args:
        losses: Validation losses by variant and seed.
        ablated: Losses under ablations by variant and seed.
    """
    outcomes = []
    for one in COMPARISONS:
        better, worse = (_values(one, name, losses, ablated or {}) for name in (one.better, one.worse))
        if seeds := sorted(better.keys() & worse.keys()):
            mean, half = interval(np.array([worse[seed] - better[seed] for seed in seeds]))
            outcomes.append(Outcome(one, mean, half, len(seeds), _published(one), _verdict(one, mean, half)))
    return outcomes


def _values(
    one: Comparison,
    variant: str,
    losses: Mapping[str, Mapping[int, float]],
    ablated: Mapping[str, Mapping[int, Ablated]],
) -> Mapping[int, float]:
    """Return what is compared of a variant, by seed."""
    if not one.disabled:
        return losses.get(variant, {})
    rises = {seed: _rise(one, variant, found) for seed, found in ablated.get(variant, {}).items()}
    return {seed: rise for seed, rise in rises.items() if rise is not None}


def _rise(one: Comparison, variant: str, found: Ablated) -> float | None:
    """Return the rise of the loss with experts disabled; None if it was not measured."""
    disabled = found.get(Ablation(disable_top=round(one.disabled * VARIANTS[variant].routed / 16)))
    return None if disabled is None else disabled - found[Ablation()]


def _published(one: Comparison) -> float | None:
    """Return the difference in the paper, None if not published."""
    if one.disabled:
        values = [_rise(one, name, PAPER_ABLATIONS.get(name, {})) for name in (one.worse, one.better)]
    else:
        values = [VARIANTS[name].paper for name in (one.worse, one.better)]
    worse, better = values
    return None if worse is None or better is None else worse - better


def _verdict(one: Comparison, mean: float, half: float) -> Verdict:
    if not half < float("inf"):
        return "undecided"
    if one.equal:
        return "contradicted" if abs(mean) > half else "not contradicted"
    return "confirmed" if mean > half else "contradicted" if mean < -half else "undecided"
