"""Loss of a model with experts switched off, as in figures 4 and 5 of the paper: `ablate`, `paper_settings`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.experiments.charts import draw_ablations, figures_folder
from dsmoe_jax.experiments.texts import check_limits, read_documents, source_names
from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.loading import upcast_for_cpu
from dsmoe_jax.generate.scoring import rolling_windows
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.model import DeepSeekMoE, merge, split
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.text.tokenizer import Tokenizer

JSON: Final = "ablations.json"
CHART: Final = "ablations.png"
_SIXTEENTHS: Final = (1, 2, 3, 4)  # of the routed experts, figure 4
_FEWER: Final = 4  # active experts down to K - 4, figure 5


class Measurement(NamedTuple):
    """The loss under an ablation.

    Attributes:
        ablation: What was switched off.
        loss: Cross-entropy, nats per token.
    """

    ablation: Ablation
    loss: float


def paper_settings(config: ModelConfig) -> list[Ablation]:
    """Return the ablations of the paper for a model: figure 4, figure 5, and the shared experts off.

    Args:
        config: Config of the model.
    """
    experts, active = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    top = dict.fromkeys(round(n * experts / 16) for n in _SIXTEENTHS)
    found = [Ablation(disable_top=n) for n in top if 0 < n <= experts - active]
    found += [Ablation(active=n) for n in range(active - 1, max(0, active - 1 - _FEWER), -1)]
    if config.n_shared_experts is not None and active < experts:
        found.append(Ablation(shared=False))
    return found


def measure(
    model: DeepSeekMoE,
    documents: Sequence[Sequence[int]],
    ablations: Sequence[Ablation],
    *,
    window: int | None = None,
    progress: Meter = silent,
) -> list[Measurement]:
    """Measure the loss without an ablation, then with each.

    Args:
        model: The model.
        documents: Token ids of each; all but the first of a document are predicted, as in training.
        ablations: What to switch off.
        window: Tokens read at once. Default: the trained context length.
        progress: Shows the measurements done.

    Raises:
        DSMoEError: An ablation does not fit the model; before anything is computed.
    """
    settings = [Ablation(), *(one for one in ablations if one != Ablation())]
    window = window or model.config.context_length
    pairs = [pair for document in documents for pair in rolling_windows(document, prefix=None, window=window)]
    graph, params = split(model)
    model = merge(graph, upcast_for_cpu(params))  # once: the ablated models share the weights
    models = [model.ablated(one) for one in settings]
    measured = []
    with progress("measuring", len(settings)) as advance:
        for one, ablated in zip(settings, models, strict=True):
            generator = Generator(ablated, context_length=max(2, window))
            scores = [score.logprob for _, score in generator.iter_scores(pairs)]
            measured.append(Measurement(one, -sum(scores) / predicted(documents)))
            advance(1)
    return measured


def predicted(documents: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens of which `measure` averages the loss."""
    return sum(max(0, len(document) - 1) for document in documents)


def ablate(
    model: DeepSeekMoE,
    tokenizer: Tokenizer | None,
    data: str | Path | Sequence[str | Path],
    *,
    ablations: Sequence[Ablation] | None = None,
    max_tokens: int = 65_536,
    window: int | None = None,
    out: str | Path | None = None,
    progress: Meter = silent,
) -> list[Measurement]:
    """Measure the loss on texts with experts switched off.

    Args:
        model: The model, on any devices.
        tokenizer: Required for texts.
        data: Texts or token shards.
        ablations: What to switch off. Default: those of the paper, `paper_settings`.
        max_tokens: Tokens of each source.
        window: Tokens read at once. Default: the trained context length.
        out: Folder for `ablations.json` and `ablations.png`.
        progress: Shows the measurements done.

    Returns:
        The loss without an ablation, then with each.

    Raises:
        DSMoEError: The data cannot be read, or an ablation does not fit the model.
    """
    names = source_names(data)
    check_limits(max_tokens, window, model.config)
    read = functools.partial(read_documents, vocab_size=model.config.vocab_size)
    documents = [one for source in names for one in read(source, tokenizer, max_tokens)]
    folder = None if out is None else figures_folder(out)
    settings = paper_settings(model.config) if ablations is None else ablations
    measured = measure(model, documents, settings, window=window, progress=progress)
    if folder is not None:
        fields = {"data": names, "tokens": predicted(documents), **to_dict(measured, model.config)}
        write_json(folder / JSON, fields)
        draw_ablations(folder / CHART, {"this model": [fields]})
    return measured


def to_dict(measured: Sequence[Measurement], config: ModelConfig) -> dict[str, Any]:
    """Return measurements as JSON.

    Args:
        measured: The result of `measure`.
        config: Config of the model.
    """
    sizes = {name: getattr(config, name) for name in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")}
    rows = [{**dataclasses.asdict(one.ablation), "loss": one.loss} for one in measured]
    for row in rows:
        if isinstance(row["disabled"], Mapping):
            row["disabled"] = {str(layer): list(ids) for layer, ids in row["disabled"].items()}
    return {**sizes, "losses": rows}


def table(measured: Sequence[Measurement]) -> str:
    """Format measurements for a terminal.

    Args:
        measured: The result of `measure`.
    """
    base = measured[0].loss
    rows = [(describe(one.ablation), f"{one.loss:.4f}", f"{one.loss - base:+.4f}") for one in measured]
    width = max(len(row[0]) for row in rows)
    header = f"{'ablation':<{width}}  {'loss':>8}  {'change':>8}"
    return "\n".join([header, *(f"{name:<{width}}  {loss:>8}  {change:>8}" for name, loss, change in rows)])


def describe(ablation: Ablation) -> str:
    """Describe an ablation in a few words.

    Args:
        ablation: What is switched off.
    """
    parts = []
    if ablation.disable_top:
        parts.append(f"top {ablation.disable_top} disabled")
    if ablation.active is not None:
        parts.append(f"{ablation.active} active")
    if not ablation.shared:
        parts.append("no shared experts" + ("" if ablation.active else ", one more routed"))
    if ablation.disabled:
        parts.append(f"disabled {_experts(ablation.disabled)}")
    return ", ".join(parts) or "none"


def _experts(disabled: Mapping[int, Sequence[int]] | Sequence[int]) -> str:
    if isinstance(disabled, Mapping):
        return " ".join(f"{layer}:{','.join(map(str, ids))}" for layer, ids in disabled.items())
    return ",".join(map(str, disabled))
