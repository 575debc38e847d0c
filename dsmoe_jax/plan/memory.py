"""Temporaries of a training step at their peak, estimated: `temporaries`.

XLA's schedule and its packing of buffers are not modeled. `PEAKS` has how many copies of each quantity are live at a
peak, fitted to compiled steps; `tests/benchmarks/plan_check.py` compares the estimate with other ones.
"""

from collections.abc import Mapping
from typing import Final

from dsmoe_jax.layers.token_dispatcher import choose_strategy
from dsmoe_jax.plan.workload import Workload
from dsmoe_jax.sharding import DATA, EXPERT, FSDP, TENSOR

_FP32: Final = 4
_CHUNK_BYTES: Final = 64 << 20  # of fp32 logits, as in `train.loss`
_DENSE: Final = ("attention", "dense feed-forward", "shared experts")

# By platform and phase: conditions ("!": not), and the copies in fp32 of each quantity if all of them hold.
# On CPU, XLA copies the moments, converts bf16 to fp32 for matmuls, and drops the barriers that let go of gathered
# experts after each layer. The GPU's figures are from fewer programs.
# fmt: off
PEAKS: Final[dict[str, dict[str, dict[str, dict[str, float]]]]] = {
    "cpu": {
        "update": {
            "":                   {"optimizer state": 1.0},
            "bf16 !adapters":     {"weights": 0.5},
        },
        "backward": {
            "":                   {"head": 1.75},
            "remat":              {"tokens of experts": 9.0},
            "!remat":             {"tokens of experts": 5.0},
            "remat !fsdp":        {"attention scores": 9.1, "expert rows": 6.9, "hidden states": 18},
            "remat fsdp":         {"attention scores": 7.6, "expert rows": 2.5, "hidden states": 22},
            "!remat !fsdp":       {"attention scores": 3.4, "expert rows": 6.8},
            "!remat fsdp":        {"attention scores": 5.0, "hidden states": 22},
            "fsdp":               {"optimizer state": 1.0},
            "fsdp !adapters":     {"experts": 2.0, "layer of experts": 0.3},
            "fsdp adapters":      {"experts": 1.0, "layer of experts": 0.5},
            # Gathered over one device, which XLA converts to fp32 all the same.
            "!fsdp mesh adapters !quantized": {"experts": 1.4},
            "fsdp parts":         {"gradients": 1.15, "layer of experts": 1.75},
            "!fsdp":              {"optimizer state": 0.7, "dense weights": 0.85, "layer of experts": 0.75},
            "!fsdp !bf16":        {"gradients": 0.3},
            "!fsdp parts":        {"gradients": 1.65},
            "!fsdp data":         {"gradients": 0.3},
        },
    },
    "gpu": {
        "backward": {
            "fsdp !adapters":     {"layer of experts": 2.0},
            "!adapters !parts":   {"gradients": 1.0},
            "!adapters parts":    {"gradients": 2.63},
            "adapters":           {"gradients": 4.7},
            "quantized":          {"layer of experts": 0.27},
            "":                   {"logits": 2.0, "expert rows": 3.0, "attention scores": 3.0, "hidden states": 0.5},
            "dots":               {"hidden states": 4.0},  # q, k, v, o, gate, up and down in bf16; not measured
            "!remat":             {"hidden states": 8.0},
        },
        "loss": {
            "!adapters":          {"head": 2.0, "weights": 0.5},
            "parts":              {"gradients": 1.0},
            "":                   {"logits": 2.0},
        },
    },
}
# fmt: on


def quantities(work: Workload) -> Mapping[str, float]:
    """Return the bytes of what a step computes with, in fp32, on a device."""
    model, moe = work.model, work.moe_layers
    V, D = model.vocab_size // work.ways(TENSOR), model.hidden_size
    heads = model.num_attention_heads // work.ways(TENSOR)
    remat, experts = work.config.step.remat != "none", _FP32 * work.elements("routed experts", gather=FSDP)
    layers, moe_at_once = (1, 1) if remat else (model.num_hidden_layers, moe)
    tokens = _FP32 * work.tokens * D
    # Most of what a layer computes for a token are heads and widths, which the tensor axis shards.
    sharded = 0.1 + 0.9 / work.ways(TENSOR) if work.ways(FSDP) > 1 else 1
    gathers = work.ways(EXPERT) > 1 and choose_strategy(work.config.dispatch.strategy, work.ways(EXPERT)) == "gather"
    return {
        "optimizer state": work.state_bytes()["optimizer state"],
        "weights": _FP32 * work.elements(),
        "gradients": _FP32 * sum(map(work.elements_of, work.parameters.trained)),
        "experts": experts,
        "layer of experts": experts / max(moe, 1),
        "dense weights": _FP32 * work.elements(*_DENSE, gather=FSDP),
        "head": _FP32 * V * D,
        "logits": _FP32 * V * min(work.tokens, max(1, _CHUNK_BYTES // (_FP32 * V))),
        "attention scores": _FP32 * layers * work.rows * heads * work.length**2 / 2,
        "hidden states": tokens * sharded * model.num_hidden_layers,
        "expert rows": tokens * sharded * moe_at_once * (model.num_experts_per_tok or 0),
        "tokens of experts": tokens * moe_at_once * work.ways(EXPERT) if gathers else 0,
    }


def temporaries(work: Workload, platform: str = "gpu") -> Mapping[str, int]:
    """Return the bytes of temporaries on a device at their peak, by kind.

    Args:
        work: The step.
        platform: "gpu" or "cpu".
    """
    sizes, phases = quantities(work), []
    for cases in PEAKS[platform].values():
        found: dict[str, float] = {}
        for conditions, copies in cases.items():
            if all(_holds(work, condition) for condition in conditions.split()):
                found |= {name: found.get(name, 0) + times * sizes[name] for name, times in copies.items()}
        phases.append({name: int(size) for name, size in found.items() if size >= 1})
    return max(phases, key=lambda phase: sum(phase.values()))


def _holds(work: Workload, condition: str) -> bool:
    if condition.startswith("!"):
        return not _holds(work, condition[1:])
    facts = {
        "adapters": work.adapts,
        "data": work.ways(DATA) > 1,
        "bf16": work.config.step.compute_dtype == "bfloat16",
        "fsdp": work.ways(FSDP) > 1,
        "mesh": work.mesh.size > 1,
        "parts": work.parts > 1,
        "dots": work.config.step.remat == "dots",
        "quantized": work.scheme is not None,
        "remat": work.config.step.remat != "none",
    }
    return facts[condition]
