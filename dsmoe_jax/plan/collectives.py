"""Bytes that a training step communicates, by kind and mesh axes: `traffic`.

Compiled programs for simulated devices agree (`tests/benchmarks/plan_check.py`). What XLA decides, and differs between
its compilers, is in `Compiler`.
"""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import jax

from dsmoe_jax.layers.token_dispatcher import STRATEGIES, choose_strategy
from dsmoe_jax.plan.workload import Workload
from dsmoe_jax.quantize import kind_of
from dsmoe_jax.sharding import BATCH_AXES, DATA, EXPERT, FSDP, TENSOR

_FP32: Final = 4


class Traffic(NamedTuple):
    """One kind of communication of a step."""

    kind: str  # as in HLO
    axes: tuple[str, ...]
    bytes: int  # per device and step: the gathered result, or the operand that is reduced or exchanged
    what: str


class Compiler(NamedTuple):
    """What XLA's compiler for a platform makes of a step."""

    bf16: bool  # communicates bf16; else everything is converted to fp32
    scatters: bool  # turns an all-reduce and the slice of its result into a reduce-scatter
    barriers: bool  # keeps optimization barriers, so that the backward pass gathers again
    hoists: bool  # gathers weights for the forward pass once for all micro-batches
    partitions_top_k: bool  # else the scores of all tokens are gathered


# XLA:CPU of jax 0.10 drops optimization barriers, so that the backward pass reuses gathered experts and, in spite of
# remat, recomputes nothing; that of 0.12 keeps them.
_CPU_BARRIERS: Final = jax.__version_info__ >= (0, 11)
COMPILERS: Final[dict[str, Compiler]] = {
    "cpu": Compiler(bf16=False, scatters=False, barriers=_CPU_BARRIERS, hoists=True, partitions_top_k=False),
    "gpu": Compiler(bf16=True, scatters=True, barriers=True, hoists=False, partitions_top_k=True),
}


def traffic(work: Workload, platform: str = "gpu") -> list[Traffic]:
    """Return the communication of a step, balanced routing assumed (no overflow passes).

    Args:
        work: The step.
        platform: "gpu" or "cpu".
    """
    compiler = COMPILERS[platform]
    per_part = (
        *_gradients(work, compiler),
        *_dispatch(work, compiler),
        *_tensor(work, compiler),
        *_router(work, compiler),
    )
    found = (*_weights(work, compiler), *_norm(work), *(one._replace(bytes=one.bytes * work.parts) for one in per_part))
    return [one for one in found if work.ways(*one.axes) > 1 and one.bytes]


def _size(work: Workload, compiler: Compiler) -> int:
    """Return the bytes of a value in the compute dtype."""
    return 2 if compiler.bf16 and work.config.step.compute_dtype == "bfloat16" else _FP32


def _active(work: Workload, *axes: str) -> tuple[str, ...]:
    return tuple(axis for axis in axes if work.ways(axis) > 1)


def _weights(work: Workload, compiler: Compiler) -> Iterator[Traffic]:
    """All-gathers of weights over fsdp."""
    parts, remat, size = work.parts, work.config.step.remat != "none", _size(work, compiler)
    forward = 1 if compiler.hoists else parts  # the loop over micro-batches does not change weights
    experts = compiler.barriers or parts > 1
    for weight in (*work.parameters.base, *(work.parameters.trained if work.adapts else ())):
        if work.scheme and kind_of(weight.name):
            continue  # tiles span rows: replicated
        full = work.elements_of(weight, FSDP)
        if full == work.elements_of(weight):
            continue
        # Backward, in every micro-batch: recomputation and gradient share a gather, except on tensor and expert axes.
        twice = work.ways(TENSOR) > 1 and work.ways(EXPERT) > 1 and ".down." not in weight.name
        again = {"norms": 1 + remat, "router": remat, "embedding": 0, "head": 0, "routed experts": experts}
        # Without remat the gradient reuses the gather of the forward pass, except for a dense layer on a tensor axis.
        own = not remat and work.ways(TENSOR) > 1 and weight.part == "dense feed-forward"
        # Nothing orders the embedding of a frozen base, which the loop over micro-batches does not change.
        once = 1 if work.adapts and weight.part == "embedding" else forward
        count = once * (1 + own) + parts * again.get(weight.part, remat * (1 + twice))
        bytes_each = _FP32 if weight.part == "router" else size  # the router computes in fp32
        yield Traffic("all-gather", (FSDP,), full * bytes_each * count, f"{weight.part} weights")


def _gradients(work: Workload, compiler: Compiler) -> Iterator[Traffic]:
    """Reductions of gradients over the axes of the batch, in every micro-batch."""
    for weight in work.parameters.trained:
        size = _FP32 if weight.part in ("router", "routed experts") else _size(work, compiler)
        full, shard = (work.elements_of(weight, axis) * size for axis in (FSDP, ""))
        experts, what = weight.part == "routed experts", f"{weight.part} gradients"
        axes = (DATA, *([FSDP] if full == shard else []), *([] if experts else [EXPERT]))
        if experts and work.elements_of(weight, TENSOR) == work.elements_of(weight):  # an adapter
            axes += (TENSOR,)
        others = _active(work, *axes)  # over which a device has the same shard
        if full != shard and not experts and not compiler.scatters:
            if weight.part in ("embedding", "head", "norms"):  # in one go
                yield Traffic("all-reduce", _active(work, *BATCH_AXES), full, what)
                continue
            yield Traffic("all-reduce", (FSDP,), full, what)
        elif full != shard:
            yield Traffic("reduce-scatter", (FSDP,), full, what)
        if experts and not work.adapts:  # cast after the reduction over fsdp
            shard = shard // size * _size(work, compiler)
        yield Traffic("all-reduce", others, shard, what)


def _norm(work: Workload) -> Iterator[Traffic]:
    """The gradient norm, summed by row (`clip_by_global_norm`)."""
    sharded = [weight for weight in work.parameters.trained if weight.spec.axes[-1] == "embed"]
    rows = sum(work.elements_of(weight, FSDP) // weight.spec.shape[-1] for weight in sharded)
    yield Traffic("all-reduce", (FSDP,), rows * _FP32, "gradient norm")


def _dispatch(work: Workload, compiler: Compiler) -> Iterator[Traffic]:
    """Tokens to experts and back, in every MoE layer."""
    ways, layers = work.ways(EXPERT), work.moe_layers
    if ways == 1 or not layers:
        return
    M, D, K = work.tokens, work.model.hidden_size, work.model.num_experts_per_tok or 1
    size = _size(work, compiler)
    # The backward pass needs the tokens again: recomputed layers and barriers gather or send them a second time.
    passes = 2 if compiler.barriers or work.config.step.remat != "none" else 1
    options, strategy = work.config.dispatch, choose_strategy(work.config.dispatch.strategy, ways)
    if strategy == "gather":
        tokens = layers * M * ways
        yield Traffic("all-gather", (EXPERT,), passes * tokens * (D * size + K * (4 + _FP32)), "tokens")
        yield Traffic("all-gather", (EXPERT,), tokens * D * _FP32, "gradients of tokens")
        yield Traffic("reduce-scatter", (EXPERT,), tokens * (2 * D + K) * _FP32, "sums of experts, gradients of tokens")
        return
    slots = STRATEGIES[strategy](ways, 1, options.buffer_factor).buffer(M * K, M * K / ways)
    rows = layers * slots * ways
    there = passes * (D * size + 4 + _FP32)
    back = D * size * 2 + D * size + 2 * _FP32
    yield Traffic("all-to-all", (EXPERT,), rows * (there + back), "rows")


def _tensor(work: Workload, compiler: Compiler) -> Iterator[Traffic]:
    """Sums of activations over the tensor axis."""
    model, remat = work.model, work.config.step.remat == "full"  # `dots` saves the sums
    L, moe, shared = model.num_hidden_layers, work.moe_layers, bool(model.n_shared_experts)
    M, K, V = work.tokens, model.num_experts_per_tok or 1, model.vocab_size
    forward = L + (L - moe) + moe * (1 + shared)  # attention, dense feed-forward, routed and shared experts
    # Below the first adapters nothing needs a gradient.
    backward = 3 * (L - work.adapts) + 2 * (L - moe) + moe * (1 + 2 * shared)
    # Layers recompute the output of attention, which the residual needs.
    states = forward + backward + L * remat + 2  # and embedding, cross-entropy
    yield Traffic("all-reduce", (TENSOR,), states * M * model.hidden_size * _size(work, compiler), "activations")
    yield Traffic("all-reduce", (TENSOR,), (moe * M * K + (3 * M if V % work.ways(TENSOR) == 0 else 0)) * _FP32, "sums")


def _router(work: Workload, compiler: Compiler) -> Iterator[Traffic]:
    """Scores of all tokens, where XLA does not partition the top-k."""
    if compiler.partitions_top_k:
        return
    axes, remat = _active(work, *BATCH_AXES), work.config.step.remat != "none"
    scores = work.tokens * math.prod(work.ways(axis) for axis in axes) * (work.model.n_routed_experts or 0)
    yield Traffic("all-gather", axes, work.moe_layers * scores * _FP32 * (1 + remat), "router scores")
