"""Timings and their statistics: median, quartiles, range. Start at `spread`."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """A five-number summary."""

    median: float
    quartile1: float
    quartile3: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Summarize values, with interpolated quartiles as in NumPy."""
    if not values:
        raise ValueError("no figures to take the median of")
    if len(values) == 1:
        return Spread(*[values[0]] * 5)
    quartile1, median, quartile3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, quartile1, quartile3, min(values), max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios per turn: adjacent turns share the load of the machine, unlike medians of all turns."""
    return [a / b for a, b in zip(above, below, strict=True)]


def seconds(work: Callable[[], Any]) -> float:
    """Time a synchronous call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
