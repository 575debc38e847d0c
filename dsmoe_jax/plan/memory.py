"""Temporaries of a training step at their peak, estimated: `temporaries`.

XLA's schedule and its packing of buffers are not modeled. `PEAKS` has how often each quantity is live at the peak,
fitted to compiled steps; `tests/benchmarks/plan_check.py` compares the result with other ones.
"""

from collections.abc import Mapping
from typing import Final

from dsmoe_jax.plan.workload import Workload
from dsmoe_jax.sharding import EXPERT, FSDP, TENSOR

_FP32: Final = 4
_CHUNK_BYTES: Final = 64 << 20  # of fp32 logits, as in `train.loss`
_DENSE: Final = ("attention", "dense feed-forward", "shared experts")

# Copies that are live at the peak of the backward pass, by platform and case. All quantities are in fp32.
# fmt: off
PEAKS: Final[dict[str, dict[str, dict[str, float]]]] = {
    "cpu": {
        "all": {"attention scores": 4.43, "hidden states": 22.1, "head and its gradient": 1.87},
        "fsdp": {"optimizer state": 1.0, "routed experts": 2.16},
        "fsdp, adapters": {"optimizer state": 1.0, "routed experts": 1.5},
        "one": {"optimizer state": 0.74, "dense weights": 1.06, "layer of experts": 0.85},
        "accumulation": {"gradients": 1.97},
        "accumulation, fsdp": {"layer of experts": 1.13, "gradients": 1.0},
    },
    "gpu": {},
}
# fmt: on


def quantities(work: Workload) -> Mapping[str, float]:
    """Return the bytes of what a step computes with, in fp32, on a device."""
    model, moe = work.model, max(work.moe_layers, 1)
    V, D = model.vocab_size // work.ways(TENSOR), model.hidden_size
    heads = model.num_attention_heads // work.ways(TENSOR)
    layers = 1 if work.config.step.remat != "none" else model.num_hidden_layers
    experts = _FP32 * work.elements("routed experts", gather=FSDP)
    return {
        "optimizer state": work.state_bytes()["optimizer state"],
        "weights in the compute dtype": _FP32 * work.elements(),
        "gradients": _FP32 * sum(map(work.elements_of, work.parameters.trained)),
        "routed experts": experts,
        "layer of experts": experts / moe,
        "dense weights": _FP32 * work.elements(*_DENSE, gather=FSDP),
        "head and its gradient": _FP32 * V * D,
        "logits": _FP32 * V * min(work.tokens, max(1, _CHUNK_BYTES // (_FP32 * V))),
        "attention scores": _FP32 * layers * work.rows * heads * work.length**2 / 2,
        "hidden states": _FP32 * model.num_hidden_layers * work.tokens * D,
        "rows of experts": _FP32 * work.tokens * (model.num_experts_per_tok or 0) * D * work.ways(EXPERT),
    }


def temporaries(work: Workload, platform: str = "gpu") -> Mapping[str, int]:
    """Return the bytes of temporaries on a device at their peak, by kind.

    Args:
        work: The step.
        platform: "gpu" or "cpu".
    """
    sizes = quantities(work)
    found: dict[str, float] = {}
    for case, copies in PEAKS[platform].items():
        if _applies(work, case):
            found |= {name: found.get(name, 0) + times * sizes[name] for name, times in copies.items()}
    return {name: int(size) for name, size in found.items() if size >= 1}


def _applies(work: Workload, case: str) -> bool:
    fsdp, conditions = work.ways(FSDP) > 1, case.split(", ")
    holds = {"all": True, "fsdp": fsdp, "one": not fsdp, "adapters": work.adapts, "accumulation": work.parts > 1}
    return all(holds[condition] for condition in conditions)
