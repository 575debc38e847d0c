"""Map our parameter names to Hugging Face's tensor names.

Weights are [out, in] in both. In rows with `{e}` our parameter stacks the experts' tensors along a new first axis.
"""

import math
import re
from collections.abc import Mapping
from typing import Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import abstract

# fmt: off
_HF_NAME: Final = {
    # ours                                Hugging Face's
    "embed":                              "model.embed_tokens.weight",
    "layers.{i}.attention_norm.weight":   "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attention.q.weight":      "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.k.weight":      "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.v.weight":      "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.o.weight":      "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attention.q.bias":        "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attention.k.bias":        "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attention.v.bias":        "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.attention.o.bias":        "model.layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.ffn_norm.weight":         "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate.weight":         "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up.weight":           "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down.weight":         "model.layers.{i}.mlp.down_proj.weight",
    "layers.{i}.moe.router.weight":       "model.layers.{i}.mlp.gate.weight",
    "layers.{i}.moe.experts.gate":        "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "layers.{i}.moe.experts.up":          "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "layers.{i}.moe.experts.down":        "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
    "layers.{i}.moe.shared.gate.weight":  "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
    "layers.{i}.moe.shared.up.weight":    "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    "layers.{i}.moe.shared.down.weight":  "model.layers.{i}.mlp.shared_experts.down_proj.weight",
    "norm.weight":                        "model.norm.weight",
    "head.weight":                        "lm_head.weight",
}
# fmt: on
_ROW: Final = {ours: row for row, ours in enumerate(_HF_NAME)}

# PyTorch's `.bin` files may store the tied embedding a second time under this name.
TIED_HEAD: Final = "lm_head.weight"


def hf_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the HF tensors of each of our parameters: one, or one per expert in order.

    Raises:
        DSMoEError: The model has hash routing, which PyTorch's code has not.
    """
    if config.hash_routing:
        raise DSMoEError("topk_method 'hash' is for pretraining here; a Hugging Face folder cannot have it")

    def tensors(name: str) -> tuple[str, ...]:
        row = name_in(_HF_NAME, name)
        experts = range(config.n_routed_experts or 0)
        return tuple(row.replace("{e}", str(e)) for e in experts) if is_stacked(name) else (row,)

    return {name: tensors(name) for name in abstract(config)[1]}


def name_in(table: Mapping[str, str], name: str) -> str:
    """Return a parameter's entry in a table of names by layer pattern, `layers.{i}`, with its layer filled in."""
    layer = re.search(r"layers\.(\d+)", name)
    return table[_pattern(name)].replace("{i}", layer[1] if layer else "")


def is_stacked(name: str) -> bool:
    """Return whether our parameter is a stack over experts."""
    return "{e}" in _HF_NAME[_pattern(name)]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every HF tensor."""
    specs = abstract(config)[1]
    return {hf: specs[name].shape[is_stacked(name) :] for name, parts in hf_names(config).items() for hf in parts}


def export_order(config: ModelConfig) -> list[tuple[str, str, int | None]]:
    """Return (HF name, our parameter, expert index or None) of every HF tensor, layer by layer."""

    def position(entry: tuple[str, str, int | None]) -> tuple[float, int, int]:
        _, ours, expert = entry
        layer = re.search(r"layers\.(\d+)", ours)
        outside = -1 if ours == "embed" else math.inf
        return (int(layer[1]) if layer else outside, -1 if expert is None else expert, _ROW[_pattern(ours)])

    entries = [
        (hf_name, ours, e if is_stacked(ours) else None)
        for ours, parts in hf_names(config).items()
        for e, hf_name in enumerate(parts)
    ]
    return sorted(entries, key=position)


def _pattern(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers.{i}", name)
