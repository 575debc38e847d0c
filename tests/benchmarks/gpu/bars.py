"""The targets on one H200: start at `BARS`, then `measured`. No jax.

A figure is the best of the rows of a part whose keys match a pattern.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from tests.benchmarks.gpu import work
from tests.benchmarks.timing import spread

Results = Mapping[str, Any]
Row = Mapping[str, Any]


class Found(NamedTuple):
    """A figure and its description."""

    value: float
    of: str


class Bar(NamedTuple):
    """A target; `find` returns None if it was not measured."""

    figure: str
    unit: str
    find: Callable[[Results], Found | None]
    bar: float
    aim: float


def measured(results: Results) -> list[dict[str, Any]]:
    """Evaluate all bars; `met` is None if not measured, or in a trial."""
    lines = []
    for name, unit, find, bar, aim in BARS:
        found = find(results)
        met = None if found is None or results["trial"] else found.value >= bar
        value, of = found or (None, "")
        lines.append({"figure": name, "unit": unit, "measured": value, "of": of, "bar": bar, "aim": aim, "met": met})
    return lines


def rate(part: str, pattern: str, amount: str, unit: float) -> Callable[[Results], Found | None]:
    """An amount per second, by the median."""
    return lambda results: _best(
        Found(row[amount] / unit / median(row), row["name"]) for row in rows(results, part, pattern)
    )


def roofline(part: str, pattern: str) -> Callable[[Results], Found | None]:
    """The share of the floor, in percent."""

    def find(results: Results) -> Found | None:
        floors = [(row, work.total(row, _ceilings(results, part))) for row in rows(results, part, pattern)]
        return _best(Found(100 * floor / median(row), row["name"]) for row, floor in floors if floor)

    return find


def mfu(results: Results) -> Found | None:
    """The share of the peak in the data sheet, in percent; of the measured matmul for unknown cards."""
    sheet = results["device"].get("data_sheet")
    peak = sheet or _ceilings(results, "train").get("matmul")
    if not peak:
        return None
    of = f"of {peak / 1e12:.3g} TFLOP/s, {'by its data sheet' if sheet else 'the measured matmul'}"
    return _best(
        Found(100 * row["flops"] / median(row) / peak, f"{row['name']}; {of}")
        for row in rows(results, "train", r"train\.\d+\..*")
    )


def against_transformers(results: Results) -> Found | None:
    """The lowest speedup over the better implementation of transformers, over decode batch sizes and prefill."""
    ratios = []
    for part in ("decode", "prefill"):
        same = _ceilings(results, part) == _ceilings(results, "transformers")
        for row in rows(results, part, rf"{part}\.bf16.*"):
            theirs = rows(results, "transformers", "transformers." + row["key"].replace("bf16", r"\w+"))
            if best := min(map(median, theirs), default=None):
                of = row["name"] + ("" if same else "; theirs from another run")
                ratios.append(Found(best / median(row), of))
    return min(ratios, default=None)


_EXPERTS: Final = r"experts\.\d+\.balanced\.default\.both"  # the defaults of the package
BARS: Final = (
    Bar("experts, forward and backward", "TFLOP/s", rate("experts", _EXPERTS, "flops", 1e12), 350, 550),
    Bar("train step, MFU", "%", mfu, 30, 45),
    Bar("decode b=1", "% of roofline", roofline("decode", r"decode\.bf16\.1"), 45, 70),
    Bar("decode b=32", "tok/s", rate("decode", r"decode\.bf16\.32", "tokens", 1), 3000, 8000),
    Bar("transformers' time over ours, least", "x", against_transformers, 1, 2),
)


def rows(results: Results, part: str, pattern: str) -> Iterator[Row]:
    """Return the measured rows of a part whose keys match."""
    for row in results["parts"].get(part, {"rows": []})["rows"]:
        if "seconds" in row and re.fullmatch(pattern, row["key"]):
            yield row


def median(row: Row) -> float:
    """Seconds."""
    return spread(row["seconds"]).median


def _ceilings(results: Results, part: str) -> Mapping[str, float]:
    return results["parts"].get(part, {}).get("ceilings", {})


def _best(found: Iterator[Found]) -> Found | None:
    return max(found, default=None)
