"""Seconds, and what a row of them says: median, quartiles, range. Start at `spread`."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """A row of figures in five numbers."""

    median: float
    quartile1: float
    quartile3: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Quartiles lie between values where need be, as in numpy; of one value all five are that value."""
    if not values:
        raise ValueError("no figures to take the median of")
    if len(values) == 1:
        return Spread(*[values[0]] * 5)
    quartile1, median, quartile3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, quartile1, quartile3, min(values), max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn: neighbours in time share the machine's mood, medians of whole rows need not."""
    return [a / b for a, b in zip(above, below, strict=True)]


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes; it must have finished when it returns."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
