"""The figures of the experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.comparisons import interval
from dsmoe_jax.experiments.variants import VARIANTS
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.train.plotting import check_matplotlib, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS: Final = ("#1f5fa8", "#d1495b", "#2a9d6f", "#e0a030", "#7b5ea7", "#6b7683")
_LINES: Final = ("-", "--", ":")  # of the first colors, of the same again, …
_HEAT_MAP_COLUMNS: Final = 3
_BRIGHTEST: Final = (2.0, 4.0)  # end of the color scale at least and at most, times an even share


def figures_folder(out: str | Path) -> Path:
    """Create a folder for figures, before anything is computed for them.

    Args:
        out: The folder.

    Raises:
        DSMoEError: It cannot be created, or matplotlib is not installed.
    """
    check_matplotlib()
    folder = user_path(out, "out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DSMoEError(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def draw_ablations(path: Path, models: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw the loss over the disabled top experts (fig. 4) and over the active experts (fig. 5).

    Args:
        path: Image to write.
        models: For each model the results of `ablations.to_dict`, one per seed.
    """
    with new_figure(path) as figure:
        figure.set_size_inches(11, 4.2)
        disabled, active = figure.subplots(1, 2)
        for i, (name, results) in enumerate(models.items()):
            style = {**_style(i), "label": name, "marker": "o", "markersize": 4, "capsize": 3}
            _curve(disabled, [_curve_of(one, "disable_top") for one in results], style)
            _curve(active, [_curve_of(one, "active") for one in results], style)
        disabled.set_title("Routed experts of the highest scores disabled")
        disabled.set_xlabel("share of the routed experts")
        active.set_title("Fewer active experts")
        active.set_xlabel("routed experts per token")
        for axes in (disabled, active):
            axes.set_ylabel("loss, nats per token")
            axes.legend()
        active.xaxis.get_major_locator().set_params(integer=True)


def _style(i: int) -> dict[str, Any]:
    """Return color and line of the i-th curve."""
    return {"color": _COLORS[i % len(_COLORS)], "linestyle": _LINES[i // len(_COLORS) % len(_LINES)]}


def _curve_of(result: Mapping[str, Any], field: str) -> dict[float, float]:
    """Return loss by value of one field, from the rows that change no other."""
    experts, top_k = result["n_routed_experts"], result["num_experts_per_tok"]
    curve = {}
    for row in result["losses"]:
        others = {name: value for name, value in row.items() if name not in ("loss", field)}
        if not others.pop("disabled") and Ablation(**others) == Ablation():
            value = row[field] / experts if field == "disable_top" else top_k if row[field] is None else row[field]
            curve[value] = row["loss"]
    return curve


def _curve(axes: "Axes", curves: Sequence[Mapping[float, float]], style: Mapping[str, Any]) -> None:
    """Draw the mean over seeds with its t-interval; one seed has none."""
    places = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = [interval(np.array([curve[place] for curve in curves])) for place in places]
    errors = [half for _, half in found] if len(curves) > 1 else None
    axes.errorbar(places, [mean for mean, _ in found], yerr=errors, **style)  # pyright: ignore[reportArgumentType]


def draw_routes(path: Path, layers: Mapping[int, np.ndarray], domains: Sequence[str]) -> None:
    """Draw the load of each expert by domain as a heat map per layer; 1 is an even share.

    Args:
        path: Image to write.
        layers: Shares [domains, E] by layer.
        domains: Names of the domains.
    """
    brightest = float(np.clip(max(load.max() * load.shape[1] for load in layers.values()), *_BRIGHTEST))
    columns = min(_HEAT_MAP_COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    with new_figure(path) as figure:
        figure.set_size_inches(4.2 * columns + 1, (0.8 + 0.32 * len(domains)) * rows + 0.6)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        image = None
        for axes in grid.flat[len(layers) :]:
            axes.set_visible(False)
        for axes, (layer, load) in zip(grid.flat, layers.items(), strict=False):
            image = axes.imshow(load * load.shape[1], aspect="auto", cmap="viridis", vmin=0, vmax=brightest)
            axes.set_title(f"Layer {layer}")
            axes.set_yticks(range(len(domains)), domains)
            axes.grid(False)
            axes.set_xlabel("expert")
            axes.xaxis.get_major_locator().set_params(integer=True)
        if image is not None:
            figure.colorbar(image, ax=grid, label="load, times an even share", shrink=0.8, extend="max")


def draw_losses(path: Path, losses: Mapping[str, Mapping[int, float]]) -> None:
    """Draw the validation loss of the variants, lowest last, with every seed and the t-interval of the mean.

    Args:
        path: Image to write.
        losses: Validation losses by variant and seed.
    """
    ranked = sorted(losses, key=lambda name: -np.mean(list(losses[name].values())))
    with new_figure(path) as figure:
        figure.set_size_inches(9, 1.2 + 0.42 * len(ranked))
        axes = figure.subplots()
        for place, name in enumerate(ranked):
            values = np.array(list(losses[name].values()))
            mean, half = interval(values)
            bar = half if np.isfinite(half) else None
            axes.errorbar(mean, place, xerr=bar, fmt="o", color=_COLORS[0], capsize=4)
            axes.plot(values, np.full(len(values), place), "|", color=_COLORS[1], markersize=9)
        axes.set_yticks(range(len(ranked)), [f"{name}: {VARIANTS[name].note}" for name in ranked])
        axes.invert_yaxis()
        several = any(len(found) > 1 for found in losses.values())
        bars = "; bars: 95 % interval of the mean, marks: seeds" if several else "; one seed"
        axes.set_xlabel(f"validation loss, nats per token{bars}")
        axes.set_title("Validation loss")


def draw_curves(path: Path, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw the training losses of the variants.

    Args:
        path: Image to write.
        curves: Tokens and losses by variant.
    """
    with new_figure(path) as figure:
        figure.set_size_inches(9, 5)
        axes = figure.subplots()
        for i, (name, (tokens, losses)) in enumerate(curves.items()):
            axes.plot(tokens / 1e6, losses, **_style(i), linewidth=1.4, label=name)
        low = min(losses[-1] for _, losses in curves.values())
        axes.set_ylim(low * 0.97, low * 1.6)
        axes.set_xlabel("million tokens")
        axes.set_ylabel("training loss, moving average, nats per token")
        axes.set_title("Training, one run of each variant")
        axes.legend(ncols=2)
