"""One MoE block of the 16B and its components, forward and with gradients. Start at `cases`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.kernels.attention import CausalMask
from dsmoe_jax.layers.rope import rotation
from dsmoe_jax.layers.sorted_rows import Sorted
from dsmoe_jax.model import DeepSeekMoE
from tests.benchmarks import plan
from tests.benchmarks.gpu import experts, timing, work
from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.gpu.sizes import Sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the block, then its components; the expert MLP is in `experts`."""
    config = dataclasses.replace(sizes.model, num_hidden_layers=1, first_k_dense_replace=0, vocab_size=64)
    (B, T), dtype = sizes.block_shape, jnp.dtype(sizes.dtype)
    D, A, E = config.hidden_size, config.num_experts_per_tok or 0, config.n_routed_experts or 0
    block: Any = DeepSeekMoE.init(config, dtype=dtype).layers[0]
    x = timing.noise(timing.shape(dtype, B, T, D))

    def place() -> tuple[Any, Any]:
        """Compute angles and mask within each program, as the model does; one document per sequence."""
        turn = rotation(config, jnp.broadcast_to(jnp.arange(T)[None], (B, T)), T, dtype)
        documents = jnp.zeros((B, T), jnp.int32)
        return turn, CausalMask(query_segments=documents, key_segments=documents)

    whole = plan.flops(config, B, T, head_tokens=0)
    ids = jax.random.randint(jax.random.key(0), (B * T, A), 0, E, jnp.int32)
    rows = jax.jit(lambda ids: Sorted.by_expert(ids, E).rows)(ids)
    flat = x.reshape(B * T, D)
    y = timing.noise(timing.shape(dtype, B * T * A, D))

    def of(module: Any, call: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return a function of one module's weights and the states: others would count as read and get gradients."""
        graph, params = nnx.split(module)
        return lambda params, x: call(nnx.merge(graph, params), x), (params, x)

    pieces: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
        "whole": (*of(block, lambda block, x: block(x, *place())[0]), whole),
        "attention with projections": (
            *of(block.attention, lambda attention, x: attention(x, *place())[0]),
            B * T * (8 * D * D + 2 * D * (T + 1)),
        ),
        "router": (*of(block.moe.router, lambda router, x: router(x).scores), 2 * B * T * D * E),
        "shared experts": (
            *of(block.moe.shared, lambda shared, x: shared(x)),
            work.expert_flops(B * T, D, config.moe_intermediate_size * (config.n_shared_experts or 0)),
        ),
        "gathers": (rows.gather, (flat,), 0),
        "combine": (rows.combine, (y,), 0),
    }
    yield piece(sizes, "sort", lambda ids: Sorted.by_expert(ids, E), (ids,), 0)
    for name, (function, operands, flops) in pieces.items():
        yield piece(sizes, name, function, operands, flops)
        both = piece(sizes, f"{name}, forward and backward", _with_gradients(function), operands, 3 * flops)
        yield both
        if "attention" in name:
            for backend in ("pallas", "cudnn"):
                by_backend = functools.partial(timing.by_attention, backend, both.run)
                yield Case(f"{both.key}.{backend}", f"{both.name}, by {backend}", by_backend)
    del both, block, pieces, function, operands
    yield experts.case(sizes, B * T, "both", None)


def piece(sizes: Sizes, name: str, function: Callable[..., Any], operands: tuple[Any, ...], flops: int) -> Case:
    """Return one row."""
    tokens = sizes.block_shape[0] * sizes.block_shape[1]
    run = lambda: timing.timed(function, *operands, seconds=sizes.turn_seconds, flops=flops, tokens=tokens)  # noqa: E731
    return Case(f"block.{name}", name, run)


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*operands: Any) -> Any:
        y, back = jax.vjp(function, *operands)
        return y, back(jnp.ones_like(y))

    return both
