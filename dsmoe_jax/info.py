"""The output of `dsmoe info`: parameter counts, bytes and layers. Start at `describe`."""

import math
from pathlib import Path
from typing import Final, NamedTuple

from dsmoe_jax.config import PRESETS, ModelConfig
from dsmoe_jax.errors import DSMoEError, did_you_mean
from dsmoe_jax.model import abstract, layers_of, short
from dsmoe_jax.storage.manifest import check_listed_files
from dsmoe_jax.storage.paths import expand_user

# part of the model, substring of its parameters' paths
_PARTS: Final = (
    ("embedding", "embed"),
    ("attention", ".attention."),
    ("dense feed-forward", ".mlp."),
    ("router", ".router."),
    ("routed experts", ".experts."),
    ("shared experts", ".shared."),
    ("norms", "norm"),
    ("head", "head"),
)
_BYTES: Final = {"bfloat16": 2, "float32": 4}


class Counts(NamedTuple):
    """Parameter counts of a model."""

    total: int
    activated: int  # per token, including the full embedding and head
    parts: dict[str, int]  # by part of the model


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to."""
    return next(part for part, mark in _PARTS if mark in name)


def count_parameters(config: ModelConfig) -> Counts:
    """Count the parameters of a model by part."""
    parts = dict.fromkeys((part for part, _ in _PARTS), 0)
    for name, spec in abstract(short(config))[1].items():
        parts[part_of(name)] += layers_of(config, name) * math.prod(spec.shape)
    total, routed = sum(parts.values()), parts["routed experts"]
    used = routed * (config.num_experts_per_tok or 0) // (config.n_routed_experts or 1)
    return Counts(total, total - routed + used, parts)


def describe(model: str | Path) -> str:
    """Describe a preset, a `config.json` or its folder, for a terminal."""
    model = expand_user(model, "model")
    if model not in PRESETS and not Path(model).exists():
        choices = f"a path, a hub id or a preset ({', '.join(PRESETS)})"
        raise DSMoEError(f"model must be {choices}, got {model!r}{did_you_mean(model, PRESETS)}")
    check_listed_files(Path(model), ["config.json"])
    config = ModelConfig.preset(model) if model in PRESETS else ModelConfig.from_file(model)
    counts = count_parameters(config)
    lines = [
        f"{'parameters':<20}{counts.total:>18,}",
        f"{'activated per token':<20}{counts.activated:>18,}",
        *(f"{f'bytes in {dtype}':<20}{counts.total * size:>18,}" for dtype, size in _BYTES.items()),
        f"{'vocabulary':<20}{config.vocab_size:>18,}",
        f"{'context length':<20}{config.max_position_embeddings:>18,}",
        "",
        *(f"{part:<20}{n:>18,}{n / counts.total:>8.1%}" for part, n in counts.parts.items() if n),
        "",
        *_layer_plan(config),
    ]
    return "\n".join(lines) + "\n"


def _layer_plan(config: ModelConfig) -> list[str]:
    """One line per run of consecutive layers of the same kind."""
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    shared = "no" if config.n_shared_experts is None else config.n_shared_experts
    kinds = {
        False: f"dense, width {config.intermediate_size}",
        True: f"{config.n_routed_experts} routed experts of width {config.moe_intermediate_size}, "
        f"top-{config.num_experts_per_tok}, {shared} shared",
    }
    lines = [f"hidden size {config.hidden_size}, {heads} heads of {config.head_dim}, {kv_heads} key-value heads"]
    first, L = 0, config.num_hidden_layers
    for layer in range(1, L + 1):
        if layer == L or config.is_moe_layer(layer) != config.is_moe_layer(first):
            run = f"layer {first}" if layer - first == 1 else f"layers {first}-{layer - 1}"
            lines.append(f"{run:<20}{kinds[config.is_moe_layer(first)]}")
            first = layer
    return lines
