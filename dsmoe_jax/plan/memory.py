"""Temporaries of a training step at their peak, estimated: `temporaries`.

XLA's schedule and its packing of buffers are not modeled. `PEAKS` has how many copies of each quantity are live at a
peak, fitted to compiled steps; `tests/benchmarks/plan_check.py` compares the estimate with other ones.
"""

from collections.abc import Mapping
from typing import Final

from dsmoe_jax.kernels.attention import MAX_SAVED, chunk_size
from dsmoe_jax.kernels.batched import HEADROOM
from dsmoe_jax.layers.token_dispatcher import STRATEGIES, choose_strategy, count_parts
from dsmoe_jax.plan.collectives import COMPILERS, Compiler
from dsmoe_jax.plan.workload import Workload
from dsmoe_jax.sharding import EXPERT, FSDP, TENSOR
from dsmoe_jax.train.loss import chunk_tokens

_FP32: Final = 4
_DENSE: Final = ("attention", "dense feed-forward", "shared experts")

# By platform and phase: conditions ("!": not), and the copies in fp32 of each quantity if all of them hold. On CPU, XLA
# converts bf16 to fp32 for matmuls and collectives. On GPUs the peak is in one of four places.
# fmt: off
PEAKS: Final[dict[str, dict[str, dict[str, dict[str, float]]]]] = {
    "cpu": {
        "backward": {
            "":                   {"attention scores": 2.9, "activations": 7.6, "feed-forward rows": 3.8,
                                   "dispatched rows": 6.0, "gathered tokens": 5.1, "hidden states": 1.0,
                                   "head": 1.2, "dense weights": 2.35, "optimizer state": 0.4},
            "long":               {"attention scores": 0.5},
            "fsdp":               {"dense weights": 0.7},
            "parts":              {"gradients": 1.55},
            "!adapters":          {"layer of experts": 0.6},
            "!mesh adapters":     {"layer of experts": 0.85},
            "fsdp !quantized":    {"experts": 1.7},
            "!fsdp !adapters":    {"experts": 1.45},
            "fsdp parts !adapters": {"experts": 0.75},
            # Gathered over one device, which XLA converts to fp32 all the same; for all micro-batches at once.
            "!fsdp mesh adapters !quantized": {"experts": 0.4},
            "!fsdp mesh adapters !quantized parts": {"experts": 1.4},
        },
    },
    "gpu": {
        "experts": {
            "!adapters":           {"part of experts": 2.0},
            "!adapters several":   {"part of experts": 1.17},
            "!adapters parts":     {"gradients": 1.0, "layer of expert shards": 0.5},
            "!adapters parts expert": {"expert shards": 0.6},  # lost in packing
            "!adapters !parts":    {"gradients done": 1.0},
            "adapters":            {"gradients": 5.0},
            "adapters fsdp":       {"embedding": 0.5, "head": 0.5},
            "adapters fsdp !quantized": {"part of experts": 1.2},
            "adapters fsdp parts !quantized": {"weights": 0.5},  # the loop's copy in another layout
            "quantized":           {"layer of experts": 0.38},  # dequantized
            "":                    {"dispatched rows": 1.5, "hidden rows": 3.6, "gathered tokens": 4.5, "states": 7.0,
                                    "hidden states": 0.5},
            "fsdp":                {"layer of dense weights": 0.7},
            "scan":                {"MoE layers": 1.0},  # weights and gradients in the compute dtype, stacked
            "dots":                {"saved activations": 4.0},
            "!remat":              {"saved activations": 4.0, "embedding": 0.5, "dense weights": 0.5},
        },
        "attention": {
            "!adapters parts":     {"gradients": 1.0},
            "!adapters !parts":    {"gradients done": 1.0},
            "adapters":            {"gradients": 5.0},
            "":                    {"attention scores": 2.0, "feed-forward rows": 2.4, "states": 15.0,
                                    "hidden states": 0.5},
        },
        "embedding": {
            "!adapters":           {"gradients": 1.0, "embedding": 1.3},  # of which 0.3 is lost in packing
        },
        "loss": {
            "!adapters":           {"head": 2.0},
            "!adapters parts":     {"gradients": 1.0},
            "":                    {"logits": 2.0, "hidden states": 0.5},
        },
    },
}
# fmt: on


def quantities(work: Workload, compiler: Compiler) -> Mapping[str, float]:
    """Return the bytes of what a step computes with, in fp32, on a device."""
    model, moe, ways = work.model, work.moe_layers, work.ways(EXPERT)
    D, K, L, M = model.hidden_size, model.num_experts_per_tok or 0, model.num_hidden_layers, work.tokens
    V, heads = model.vocab_size // work.ways(TENSOR), model.num_attention_heads // work.ways(TENSOR)
    dense, shared = model.intermediate_size, (model.n_shared_experts or 0) * model.moe_intermediate_size
    # Without barriers, XLA takes what remat and the dispatcher compute and gather again from the forward pass.
    remat = work.config.step.remat != "none" and compiler.barriers
    kept = 1 / L if remat else 1.0  # share of the layers whose activations are held
    experts = _FP32 * work.elements("routed experts", gather=FSDP)
    strategy = choose_strategy(work.config.dispatch.strategy, ways)
    slots = STRATEGIES[strategy](ways, 1, work.config.dispatch.buffer_factor)
    rows = slots.buffer(M * K * ways, M * K) if strategy == "gather" else ways * slots.buffer(M * K, M * K / ways)
    layer, bf16 = experts / max(moe, 1), work.config.step.compute_dtype == "bfloat16"
    several = count_parts(int(layer / (1 + bf16)), (model.n_routed_experts or 1) // ways) if work.ways(FSDP) > 1 else 1
    shards = _FP32 * work.elements("routed experts")
    in_loop = shards + _FP32 * (work.elements("shared experts") + work.elements("attention") * moe / L)
    later = in_loop if work.config.step.scan_layers else shards / max(moe, 1)  # gradients in fp32 after the peak
    gradients = _FP32 * sum(map(work.elements_of, work.parameters.trained))
    queries = chunk_size(work.length)  # a chunk attends to all keys before its end
    return {
        "optimizer state": work.state_bytes()["optimizer state"],
        "weights": _FP32 * work.elements(),
        "gradients": gradients,
        "experts": experts,
        "layer of experts": layer,
        "part of experts": layer / several,
        "expert shards": shards,
        "layer of expert shards": shards / max(moe, 1),
        "MoE layers": in_loop,
        "gradients done": gradients - _FP32 * work.elements("embedding") - later,
        "embedding": _FP32 * work.elements("embedding", gather=FSDP),
        "dense weights": _FP32 * work.elements(*_DENSE, gather=FSDP),
        "layer of dense weights": _FP32 * work.elements(*_DENSE, gather=FSDP) / L,
        "head": _FP32 * V * D,
        "logits": _FP32 * V * chunk_tokens(M, V),
        "attention scores": _FP32 * kept * L * work.rows * heads * work.length * (work.length + queries) / 2,
        "hidden states": _FP32 * M * D * L,
        "states": _FP32 * M * D,
        # Mostly heads and widths, which the tensor axis shards.
        "saved activations": _FP32 * M * D * L * (0.1 + 0.9 / work.ways(TENSOR)),
        "activations": _FP32 * M * D * kept * L,
        "feed-forward rows": _FP32 * M * kept * ((L - moe) * dense + moe * shared) / work.ways(TENSOR),
        "hidden rows": _FP32 * HEADROOM * rows * model.moe_intermediate_size / several / work.ways(TENSOR),
        "dispatched rows": _FP32 * rows * D,
        "gathered tokens": _FP32 * M * D * ways if ways > 1 and strategy == "gather" else 0,
    }


def temporaries(work: Workload, platform: str = "gpu") -> Mapping[str, int]:
    """Return the bytes of temporaries on a device at their peak, by kind.

    Args:
        work: The step.
        platform: "gpu" or "cpu".
    """
    sizes, phases = quantities(work, COMPILERS[platform]), []
    for cases in PEAKS[platform].values():
        found: dict[str, float] = {}
        for conditions, copies in cases.items():
            if all(_holds(work, sizes, condition) for condition in conditions.split()):
                found |= {name: found.get(name, 0) + times * sizes[name] for name, times in copies.items()}
        phases.append({name: int(size) for name, size in found.items() if size >= 1})
    return max(phases, key=lambda phase: sum(phase.values()))


def _holds(work: Workload, sizes: Mapping[str, float], condition: str) -> bool:
    if condition.startswith("!"):
        return not _holds(work, sizes, condition[1:])
    facts = {
        "adapters": work.adapts,
        "fsdp": work.ways(FSDP) > 1,
        "long": work.length > MAX_SAVED,
        "mesh": work.mesh.size > 1,
        "parts": work.parts > 1,
        "expert": work.ways(EXPERT) > 1,
        "dots": work.config.step.remat == "dots",
        "several": sizes["part of experts"] < sizes["layer of experts"],
        "quantized": work.scheme is not None,
        "scan": work.config.step.scan_layers,
        "remat": work.config.step.remat != "none",
    }
    return facts[condition]
