"""Plot of a run: loss, expert load and load imbalance. Start at `draw`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.errors import DSMoEError

from .metrics import read_records

Records = list[dict[str, Any]]

_INK, _FAINT, _LOSS, _VALIDATION = "#222222", "#9aa5b1", "#1f5fa8", "#d1495b"
_SMOOTH: Final = 25  # maximum width of the moving average, in records
_MAX_COLOR: Final = 4  # times the mean load; the end of the color scale
_MAX_LABELS: Final = 8  # layers in the legend
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "legend.frameon": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(folder: Path, out: Path) -> None:
    """Plot the metrics of a run into a PNG; without MoE layers only the loss."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise DSMoEError("plotting requires matplotlib: pip install 'dsmoe_jax[demo]'") from None
    try:
        records = read_records(folder)
    except FileNotFoundError:
        records = []
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise DSMoEError(f"{folder} has no recorded step")
    info: dict[str, Any] = next((record["run"] for record in reversed(records) if "run" in record), {})
    layers = sorted({int(key.split("/")[1]) for key in steps[0] if key.startswith("moe/")})

    with mpl.rc_context(_STYLE):
        # Without pyplot: no global state, no window system.
        figure = Figure(figsize=(11, 7.5) if layers else (11, 4.5), dpi=130, layout="constrained", facecolor="white")
        figure.suptitle(_title(info, steps), fontsize=12, color=_INK)
        if layers:
            grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
            _draw_loss(figure.add_subplot(grid[0, :]), records, steps, info)
            _draw_heat(figure, figure.add_subplot(grid[1, 0]), steps, layers)
            _draw_imbalance(figure.add_subplot(grid[1, 1]), steps, layers)
        else:
            _draw_loss(figure.add_subplot(), records, steps, info)
        figure.savefig(out, format="png")


def _title(info: dict[str, Any], steps: Records) -> str:
    if not info:
        return f"{steps[-1]['step']:,} steps"
    name = info["name"] or "DeepSeekMoE"
    size = f"{_millions(info['parameters'])} parameters, {_millions(info['activated'])} activated"
    return f"{name}: {size} – step {steps[-1]['step']:,} of {info['steps']:,}, {info['tokens_per_step']:,} tokens each"


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def _column(records: Records, key: str) -> np.ndarray:
    """Return the values of a metric, NaN where it is missing."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], float)


def _draw_loss(axes: Any, records: Records, steps: Records, info: dict[str, Any]) -> None:
    """Plot the cross-entropy by step, its moving average and the validation loss."""
    step, loss = _column(steps, "step"), _column(steps, "cross_entropy")
    mean, width = _smooth(loss)
    if width > 1:
        axes.plot(step, loss, color=_LOSS, alpha=0.3, linewidth=0.8)
    label = "training" if width == 1 else f"training, mean of {width} records"
    axes.plot(step, mean, color=_LOSS, linewidth=2, label=label, marker="." if len(steps) == 1 else None)
    evals = [record for record in records if "eval/loss" in record]
    if evals:
        at, values = _column(evals, "step"), _column(evals, "eval/loss")
        style = {"linewidth": 1, "markersize": 4, "clip_on": False, "zorder": 3}
        axes.plot(at, values, "o-", color=_VALIDATION, label="validation", **style)
    if vocab := info.get("vocab_size"):
        axes.axhline(np.log(vocab), color=_FAINT, linestyle=":")
        label = f"uniform: ln {vocab:,} = {np.log(vocab):.2f}"
        at, systems = (1, np.log(vocab)), {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(label, at, (-4, 3), **systems, color=_FAINT, ha="right")
        axes.margins(y=0.12)
    last = loss[np.isfinite(loss)][-width:]
    final = f", {last.mean():.3f} at the end" if len(last) else ""
    axes.set(title=f"Loss{final}", xlabel="step", ylabel="cross-entropy (nats per token)", xlim=_span(step))
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.88))


def _draw_heat(figure: Any, axes: Any, steps: Records, layers: Sequence[int]) -> None:
    """Plot layers by experts: each expert's recent load relative to the mean."""
    from matplotlib.colors import TwoSlopeNorm

    heats = [record for record in steps if f"moe/{layers[0]}/expert_load" in record]
    if not heats:
        axes.set_title("No expert load recorded")
        return
    recent = heats[-max(1, len(heats) // 4) :]
    load = np.array([sum(np.array(one[f"moe/{n}/expert_load"], float) for one in recent) for n in layers])
    share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    top = float(np.clip(share.max(), 2, _MAX_COLOR))
    # Blue below the mean, white at the mean, red above.
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=top)
    image = axes.imshow(share, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    for row, expert in np.argwhere(load == 0):
        axes.plot(expert, row, "x", color="white", markersize=5)
    axes.grid(visible=False)
    shown = range(0, len(layers), max(1, len(layers) // 12))
    axes.set_yticks(list(shown), [str(layers[n]) for n in shown])
    first, last = (f"{recent[n]['step']:,}" for n in (0, -1))
    when = f"step {last}" if len(recent) == 1 else f"steps {first} to {last}"
    unused = int((load == 0).sum())
    title = f"Expert load, {when}" + (f" (×: {unused} unused)" if unused else "")
    axes.set(title=title, xlabel="expert", ylabel="layer")
    ticks = sorted({0, 0.5, 1, top})
    bar = figure.colorbar(image, ax=axes, label="tokens / layer mean", extend="max" if share.max() > top else "neither")
    bar.set_ticks(ticks, labels=[f"{tick:.2g}×" for tick in ticks])
    bar.outline.set_visible(False)


def _draw_imbalance(axes: Any, steps: Records, layers: Sequence[int]) -> None:
    """Plot the load imbalance of each layer over time."""
    from matplotlib import colormaps

    step = _column(steps, "step")
    named = {layers[round(n)] for n in np.linspace(0, len(layers) - 1, min(_MAX_LABELS, len(layers)))}
    for n, layer in enumerate(layers):
        values, _ = _smooth(_column(steps, f"moe/{layer}/load_imbalance"))
        color = colormaps["viridis"](0.9 * n / max(1, len(layers) - 1))
        axes.plot(step, values, color=color, linewidth=1.4, label=f"layer {layer}" if layer in named else None)
    axes.axhline(1, color=_FAINT, linestyle=":")
    axes.set(title="Load imbalance", xlabel="step", ylabel="max / mean expert load", xlim=_span(step))
    axes.set_ylim(bottom=0.9)
    axes.legend(loc="upper right", ncols=1 + (len(named) > 4))


def _span(step: np.ndarray) -> tuple[float, float]:
    """Return the limits of the step axis, with room around a single step."""
    return (step[0], step[-1]) if len(step) > 1 else (step[0] - 1, step[0] + 1)


def _smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the moving average of finite values and its width."""
    width = max(1, min(_SMOOTH, len(values) // 20)) // 2 * 2 + 1
    window, finite = np.ones(width), np.isfinite(values)
    both = np.where(finite, values, 0), finite
    sums, counts = (np.convolve(x, window, "full")[width // 2 :][: len(values)] for x in both)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), width
