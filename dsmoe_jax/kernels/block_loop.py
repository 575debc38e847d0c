"""The routed experts as one loop over blocks of an expert's rows; experts without rows are not read.

Start at `forward`. Rows are not padded to blocks: a block computes one of a few sizes and writes zeros past its
expert's last row, which the next block overwrites. The loop length depends on the data, which autodiff rejects, so the
backward pass is an explicit loop. Compute is in fp32 for every storage dtype: XLA has no fast bf16 on CPUs.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.kernels.operand import Blocks, GradMask, Inputs, swiglu

_LADDER_ROWS: Final = 1024  # with fewer rows, compiling five sizes takes longer than they save


def block_rows(rows: int, experts: int) -> int:
    """Return the rows per block: 1 up to a mean of 2 per expert, then the power of two at or above the mean.

    A matrix-vector product in [out, in] layout runs at memory bandwidth. On two cores a block of 64 rows takes 10%
    longer than one of 32, dominated by loading and packing weights, and one of 128 takes 50% longer than one of 64.
    """
    mean = rows / experts
    return 1 if mean <= 2 else min(max(8, 1 << (round(mean) - 1).bit_length()), 128)


def ladder(rows: int, experts: int) -> tuple[int, ...]:
    """Return the block sizes, ascending; a block has the smallest that holds the remaining rows of its expert.

    Routing is skewed: blocks of one size are 53 to 70 % full.
    """
    size = block_rows(rows, experts)
    if rows < _LADDER_ROWS:
        return (size,)
    return (size // 4, size // 2, size * 3 // 4, size, size * 2) if size >= 32 else (size,)


def _split(group_sizes: Array, rows: int) -> tuple[Blocks, tuple[int, ...]]:
    """Return the blocks and their sizes."""
    experts = len(group_sizes)
    sizes = ladder(rows, experts)
    return Blocks.split(group_sizes, sizes[-1], -(-rows // sizes[-1]) + experts), sizes


def _by_size(compute: Callable[[int, Array], Any], blocks: Blocks, sizes: tuple[int, ...]) -> Callable[[Array], Any]:
    """Return a function of i: `compute` with the size of block i.

    Its results are small and of one shape: XLA copies what passes through the branches.
    """
    if len(sizes) == 1:
        return functools.partial(compute, sizes[0])

    def chosen(i: Array) -> Any:
        too_small = blocks.end[i] - blocks.start[i] > jnp.array(sizes[:-1])
        return jax.lax.switch(too_small.sum(dtype=jnp.int32), [functools.partial(compute, size) for size in sizes], i)

    return chosen


def _valid(blocks: Blocks, i: Array, size: int) -> Bool[Array, "size 1"]:
    """Return which rows of block i belong to its expert."""
    return (blocks.start[i] + jnp.arange(size) < blocks.end[i])[:, None]


def _pad(x: Array, size: int) -> Array:
    """Pad for the last block, whose slice would otherwise be clamped to fit."""
    return jnp.pad(x, ((0, size), *((0, 0),) * (x.ndim - 1)))


def _slice(x: Array, start: Array, size: int) -> Array:
    """Slice `size` entries at `start`, floats in fp32.

    bf16 is sliced as bits behind a barrier: XLA would hoist the cast out of the loop and convert all experts, and up to
    jax 0.10.1 converts the entire bf16 array even to slice it.
    """
    if x.dtype == jnp.bfloat16:
        x, start = jax.lax.optimization_barrier((x, start))
        bits = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(x, jnp.uint16), start, size)
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    piece = jax.lax.dynamic_slice_in_dim(x, start, size)
    return piece.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else piece


def _block(inputs: Inputs, blocks: Blocks, i: Array, size: int) -> Inputs:
    """Return the rows of block i and the operands of its expert, floats in fp32."""
    experts = jax.tree.map(lambda leaf: _slice(leaf, blocks.expert[i], 1)[0], inputs.experts)
    return inputs.map_rows(lambda x: _slice(x, blocks.start[i], size))._replace(experts=experts)


def forward(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str) -> Float[Array, "R D"]:
    """Compute `expert_ffn`."""
    rows = len(inputs.rows)
    blocks, sizes = _split(group_sizes, rows)
    padded = inputs.map_rows(lambda x: _pad(x, sizes[-1]))

    def compute(size: int, i: Array) -> Array:
        y = jnp.where(_valid(blocks, i, size), swiglu(_block(padded, blocks, i, size), activation), 0)
        return _pad(y, sizes[-1] - size)

    by_size = _by_size(compute, blocks, sizes)

    def step(i: Array, out: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(out, by_size(i), blocks.start[i], axis=0)

    # fp32: see `_slice`.
    out = jax.lax.fori_loop(0, blocks.count, step, jnp.zeros_like(padded.rows, jnp.float32))
    return out[:rows].astype(inputs.rows.dtype)


def backward(
    inputs: Inputs, group_sizes: Int[Array, "E"], activation: str, grad_out: Float[Array, "R D"], needs_grad: GradMask
) -> list[Array]:
    """Compute the gradients of the leaves that need one; recomputes hidden rows, sums in fp32."""
    rows = len(inputs.rows)
    blocks, sizes = _split(group_sizes, rows)
    padded = inputs.map_rows(lambda x: _pad(x, sizes[-1]))
    grad_padded = _pad(grad_out, sizes[-1])
    by_row = needs_grad.select(inputs.by_row())

    def compute(size: int, i: Array) -> list[Array]:
        # Mask the rows of the next expert, which would leak into this expert's gradients.
        dy = jnp.where(_valid(blocks, i, size), _slice(grad_padded, blocks.start[i], size), 0)
        pieces = needs_grad.vjp(lambda block: swiglu(block, activation), _block(padded, blocks, i, size), dy)
        return [
            _pad(piece, sizes[-1] - size) if is_row else piece for is_row, piece in zip(by_row, pieces, strict=True)
        ]

    by_size = _by_size(compute, blocks, sizes)

    def step(i: Array, grads: list[Array]) -> list[Array]:
        write = lambda grad, piece: jax.lax.dynamic_update_slice_in_dim(grad, piece, blocks.start[i], axis=0)  # noqa: E731
        add = lambda grad, piece: grad.at[blocks.expert[i]].add(piece)  # noqa: E731
        updates = zip(by_row, grads, by_size(i), strict=True)
        return [(write if is_row else add)(grad, piece) for is_row, grad, piece in updates]

    leaves = needs_grad.select(jax.tree.leaves(padded))
    grads = jax.lax.fori_loop(0, blocks.count, step, [jnp.zeros_like(leaf, jnp.float32) for leaf in leaves])
    grads = [grad[:rows] if is_row else grad for is_row, grad in zip(by_row, grads, strict=True)]
    return [grad.astype(leaf.dtype) for grad, leaf in zip(grads, leaves, strict=True)]
