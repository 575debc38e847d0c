"""The bar chart of a report: `draw`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dsmoe_jax.evaluate.report import Result
from dsmoe_jax.evaluate.suites import Suite, scale

_MARKERS: Final = ("D", "o", "s")
_BAR, _INK, _COLORS = "#a9c4e4", "#222222", ("#d1495b", "#6b7683", "#e0a030")
_log = logging.getLogger("dsmoe_jax")


def draw(path: Path, suite: Suite, results: Sequence[Result], title: str) -> bool:
    """Draw the scores in percent as bars, their standard errors, and the published scores as markers.

    Args:
        path: Image to write.
        suite: Its models are the legend.
        results: Results in any unit; those that are no percentages are left out.
        title: Title of the chart.

    Returns:
        Whether the chart was drawn: there is something to draw, and matplotlib is installed.
    """
    shown = [result for result in results if result.score is not None and scale(result.metric) != 1]
    if not shown:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _log.info("Skipping %s: pip install 'dsmoe_jax[eval]'", path.name)
        return False
    figure = Figure(figsize=(8, 1.6 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    errors = [result.stderr or 0.0 for result in shown]
    axes.barh(places, [result.score for result in shown], xerr=errors, color=_BAR, ecolor=_INK, label="this model")  # pyright: ignore[reportArgumentType]
    for i, model in enumerate(suite.models):
        published = [(result.row.published[i], place) for place, result in enumerate(shown) if result.row.published]
        points = [(value, place) for value, place in published if value is not None]
        if points:
            style = {"marker": _MARKERS[i % 3], "color": _COLORS[i % 3], "edgecolor": "white", "zorder": 5 - i}
            axes.scatter(*zip(*points, strict=True), label=f"{model}, published", **style)  # pyright: ignore[reportArgumentType]
    axes.set_yticks(places, [_name(result) for result in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _name(result: Result) -> str:
    return result.row.benchmark if result.row.metric else f"{result.row.benchmark} {result.metric.split(',')[0]}"
