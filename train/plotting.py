"""Plots of runs: `draw`. One run: loss, expert load and load imbalance; several: their losses."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from dsmoe_jax.errors import DSMoEError, check_choice

from .run_records import Event, Records, RunRecords, column, format_loss, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Axis = Literal["step", "tokens"]
FORMATS: Final = (".png", ".pdf", ".svg")
_INK, _GRAY, _FAINT, _LOSS, _VALIDATION = "#222222", "#6b7683", "#9aa5b1", "#1f5fa8", "#d1495b"
_SMOOTH: Final = 25  # maximum width of the moving average, in steps
_MAX_COLOR: Final = 4  # times the mean load; the end of the color scale
_MAX_LOSS: Final = 1.5  # times ln V; losses above are cut off
_NEAR: Final = 0.75  # times ln V; below, a line at ln V would flatten the curves
_MAX_NAME: Final = 32  # characters of a run's name
_MAX_EVENTS: Final = 12  # labeled events
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
    "legend.fontsize": 9,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(runs: str | Path | Sequence[str | Path], out: str | Path, *, by: Axis = "step") -> None:
    """Plot the metrics of a run, or compare the losses of several.

    Args:
        runs: Output directories of runs.
        out: Image to write, .png, .pdf or .svg; an existing one is replaced.
        by: Horizontal axis: steps or training tokens.

    Raises:
        DSMoEError: matplotlib is not installed, or a run has no recorded step.
    """
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    check_choice("by", by, ("step", "tokens"))
    check_choice("suffix of out", Path(out).suffix.lower(), FORMATS)
    with new_figure(out) as figure:
        read = read_runs(folders)
        if len(read) > 1:
            _compare(figure, read, by)
        else:
            _draw_run(figure, read[0], by)


def check_matplotlib() -> None:
    """Raise `DSMoEError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DSMoEError("plotting requires matplotlib: pip install 'dsmoe_jax[demo]'") from None


@contextmanager
def new_figure(out: str | Path) -> Iterator["Figure"]:
    """Yield an empty figure, and save it.

    Args:
        out: Image to write, .png, .pdf or .svg.

    Raises:
        DSMoEError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # Without pyplot: no global state, no window system.
        figure = Figure(dpi=130, layout="constrained", facecolor="white")
        yield figure
        figure.savefig(out, format=Path(out).suffix[1:].lower())


# --- one run ---


def _draw_run(figure: "Figure", run: RunRecords, by: Axis) -> None:
    layers = run.moe_layers
    figure.suptitle(_title(run), fontsize=12, color=_INK)
    if not layers:
        figure.set_size_inches(11, 4.5)
        _draw_loss(figure.add_subplot(), run, by)
        return
    figure.set_size_inches(11, 7.5)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.2, 1))
    _draw_loss(figure.add_subplot(grid[0, :]), run, by)
    _draw_heat(figure, figure.add_subplot(grid[1, 0]), run.steps, layers)
    _draw_imbalance(figure, figure.add_subplot(grid[1, 1]), run, by)


def _title(run: RunRecords) -> str:
    step, info = run.steps[-1]["step"], run.info
    if not info:
        return f"{_short(run.name)}: step {step:,}"
    size = f"{_millions(info['parameters'])} parameters, {_millions(info['activated'])} activated per token"
    name, tokens = _short(info["name"] or run.name), info["tokens_per_step"]
    return f"{name}: {size} – step {step:,} of {info['steps']:,}, {tokens:,} tokens per step"


def _millions(count: int) -> str:
    unit, size = next(
        (unit, size) for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3), ("", 1)) if count >= size or size == 1
    )
    return f"{count / size:.3g}{unit}"


def _short(name: str) -> str:
    half = (_MAX_NAME - 1) // 2  # runs of a sweep differ at the end
    return name if len(name) <= _MAX_NAME else f"{name[:half]}…{name[-half:]}"


def _draw_loss(axes: "Axes", run: RunRecords, by: Axis) -> None:
    """Plot the training loss without balance losses, its moving average, the validation loss and events."""
    step, loss = column(run.steps, "step") * run.scale(by), column(run.steps, "cross_entropy")
    mean, width = _smooth(loss)
    if width > 1:
        axes.plot(step, loss, color=_LOSS, alpha=0.3, linewidth=0.8)
    label = "training" if width == 1 else f"training, mean of {width} steps"
    axes.plot(step, mean, color=_LOSS, linewidth=2, label=label, marker="." if len(step) == 1 else None)
    if run.evals:
        at, values = column(run.evals, "step") * run.scale(by), column(run.evals, "eval/loss")
        axes.plot(at, values, "o-", color=_VALIDATION, label="validation", linewidth=1.2, markersize=4, zorder=3)
    if len(bad := step[~np.isfinite(loss)]):
        bottom = axes.get_xaxis_transform()
        label = f"not finite: {len(bad)} steps"
        axes.plot(bad, np.full(len(bad), 0.02), "|", color="black", transform=bottom, markersize=8, label=label)
    _draw_uniform(axes, [run], [mean])
    _set_step_axis(axes, step, by)
    axes.set(title=_result(run), ylabel="cross-entropy (nats per token)")
    _draw_events(axes, run.events, run.scale(by))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=4)


def _result(run: RunRecords) -> str:
    """Return the final losses, by the names and with the digits of the last line of the console."""
    last = {"loss": run.steps[-1]["loss"]}
    if run.evals and run.evals[-1]["step"] == run.steps[-1]["step"]:
        last["eval/loss"] = run.evals[-1]["eval/loss"]
    named = (f"{name} {'nan' if loss is None else format_loss(loss)}" for name, loss in last.items())
    return f"Step {run.steps[-1]['step']:,}: {', '.join(named)}"


def _draw_uniform(axes: "Axes", runs: Sequence[RunRecords], losses: Iterable[np.ndarray]) -> list[Any]:
    """Draw the loss of a uniform prediction, ln V, if losses come near it, and cut off losses far above it."""
    sizes = {run.info.get("vocab_size") or 0 for run in runs}
    finite = np.concatenate([loss[np.isfinite(loss)] for loss in losses])
    if 0 in sizes or not len(finite):
        return []
    uniform, low, top = float(np.log(max(sizes))), float(finite.min()), float(finite.max())
    if top > _MAX_LOSS * uniform:
        axes.set_ylim(low - 0.1 * (_MAX_LOSS * uniform - low), _MAX_LOSS * uniform)
    if len(sizes) > 1 or top < _NEAR * uniform:
        return []
    label = f"uniform: ln {max(sizes):,} = {uniform:.2f}"
    return [axes.axhline(uniform, color=_FAINT, linestyle=":", label=label, zorder=1)]


def _draw_events(axes: "Axes", events: Sequence[Event], scale: float) -> None:
    """Mark events by vertical lines; labels that would overlap are left out."""
    left, right = axes.get_xlim()
    labeled = -np.inf
    for n, event in enumerate(events):
        at = (event.step + 0.5) * scale  # between the last step before and the first after
        axes.axvline(at, color=_GRAY, linewidth=0.8, linestyle="--", zorder=1)
        if n < _MAX_EVENTS and at - labeled > 0.02 * (right - left):
            labeled = at
            where: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            at_edge = at > left + 0.97 * (right - left)
            style: Any = {"rotation": 90, "va": "top", "fontsize": 8, "color": _GRAY}
            style["ha"] = "right" if at_edge else "left"
            style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            axes.annotate(event.label, (at, 1), (-4 if at_edge else 4, -3), **where, **style)


def _draw_heat(figure: "Figure", axes: "Axes", steps: Records, layers: Sequence[int]) -> None:
    """Plot layers by experts: each expert's recent load relative to the mean of its layer."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

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
    unused = np.argwhere(load == 0)
    axes.plot(unused[:, 1], unused[:, 0], "x", color="white", markersize=4)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    shown = range(0, len(layers), 1 + (len(layers) - 1) // 12)
    axes.set_yticks(list(shown), [str(layers[n]) for n in shown])
    first, last = (f"{recent[n]['step']:,}" for n in (0, -1))
    when = f"step {last}" if len(recent) == 1 else f"steps {first}–{last}"
    title = f"Expert load, {when}" + (f" (×: {len(unused)} unused)" if len(unused) else "")
    axes.set(title=title, xlabel="expert", ylabel="layer")
    extend = "max" if share.max() > top else "neither"
    bar = figure.colorbar(image, ax=axes, label="tokens, relative to the layer's mean", extend=extend)
    ticks = sorted({0, 0.5, 1, 1 + (top - 1) / 2, top})
    bar.set_ticks(ticks, labels=[f"{tick:.2g}×" for tick in ticks])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _draw_imbalance(figure: "Figure", axes: "Axes", run: RunRecords, by: Axis) -> None:
    """Plot the load imbalance of each layer over time; the color bar names the layers."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    steps, layers = run.steps, run.moe_layers
    step = column(steps, "step") * run.scale(by)
    colors = [colormaps["viridis"](0.88 * n / max(1, len(layers) - 1)) for n in range(len(layers))]
    for layer, color in zip(layers, colors, strict=True):
        values, _ = _smooth(column(steps, f"moe/{layer}/load_imbalance"))
        axes.plot(step, values, color=color, linewidth=1.4, marker="." if len(step) == 1 else None)
    axes.axhline(1, color=_FAINT, linestyle=":")
    axes.set(title="Load imbalance", ylabel="load of the fullest expert / mean (×)")
    axes.set_ylim(bottom=0.9)
    _set_step_axis(axes, step, by)
    if len(layers) == 1:
        return
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, label="layer")
    shown = range(0, len(layers), 1 + (len(layers) - 1) // 12)
    bar.set_ticks(list(shown), labels=[str(layers[n]) for n in shown])
    bar.ax.tick_params(which="both", length=0)
    bar.ax.invert_yaxis()  # as in the heat map
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


# --- several runs ---


def _compare(figure: "Figure", runs: Sequence[RunRecords], by: Axis) -> None:
    """Overlay the smoothed training losses and the validation losses, one color per run."""
    from matplotlib import color_sequences
    from matplotlib.lines import Line2D

    figure.set_size_inches(11, max(5.5, 0.3 * len(runs)))
    axes, palette = figure.add_subplot(), color_sequences["tab10" if len(runs) <= 10 else "tab20"]
    means, lines = [], []
    for n, run in enumerate(runs):
        color = palette[n % len(palette)]
        at, evaluated = (column(r, "step") * run.scale(by) for r in (run.steps, run.evals))
        mean, _ = _smooth(column(run.steps, "cross_entropy"))
        marker = "." if len(at) == 1 else None
        lines += axes.plot(at, mean, color=color, linewidth=1.8, marker=marker, label=_short(run.name))
        if run.evals:
            axes.plot(evaluated, column(run.evals, "eval/loss"), "o--", color=color, linewidth=1, markersize=4)
        means.append(mean)
    uniform = _draw_uniform(axes, runs, means)
    _set_step_axis(axes, np.concatenate([line.get_xdata() for line in lines]), by)
    differ = len({run.info.get("vocab_size") for run in runs}) > 1
    title = "Loss per token (not comparable: vocabulary sizes differ)" if differ else "Loss"
    axes.set(title=title, ylabel="cross-entropy (nats per token)")
    figure.legend(handles=lines, loc="outside right upper")
    styles: Any = [{"linewidth": 1.8, "label": "training, smoothed"}]
    if any(run.evals for run in runs):
        styles.append({"linewidth": 1, "linestyle": "--", "marker": "o", "markersize": 4, "label": "validation"})
    kinds = [Line2D([], [], color=_GRAY, **style) for style in styles]
    axes.legend(handles=[*kinds, *uniform], loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3)


def _set_step_axis(axes: "Axes", at: np.ndarray, name: Axis) -> None:
    """Label the horizontal axis; the ends have room for markers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = float(at.min()), float(at.max())
    room = 0.015 * (high - low) or 1
    axes.set(xlabel=name, xlim=(low - room, high + room))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    short = FuncFormatter(lambda value, _: _millions(int(value)) if value >= 1e6 else f"{value:,.0f}")
    axes.xaxis.set_major_formatter(short)


def _smooth(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the moving average of finite values and its width."""
    width = max(1, min(_SMOOTH, len(values) // 20)) // 2 * 2 + 1
    window, finite = np.ones(width), np.isfinite(values)
    both = np.where(finite, values, 0), finite
    sums, counts = (np.convolve(x, window, "full")[width // 2 :][: len(values)] for x in both)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), width
