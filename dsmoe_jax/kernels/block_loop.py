"""The routed experts as one loop over (expert, block of rows): only the weights of experts with rows are read.

Read `forward` first. Rows are sorted by expert but not padded to blocks: a block takes the next `size` rows, computes
them all, and writes zeros for those past its expert's last row; the next block overwrites that spill. The loop's length
depends on the data, which autodiff rejects, so the backward pass is an explicit loop. It computes in fp32 whatever the
storage dtype: it is the backend for CPUs, where XLA has no fast bf16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.kernels.operand import GradMask, Inputs, swiglu


class _Blocks(NamedTuple):
    size: int
    expert: Int[Array, "n"]
    start: Int[Array, "n"]  # first row
    end: Int[Array, "n"]  # one past the expert's last row, which may lie beyond the block
    count: Int[Array, ""]  # blocks in use

    def valid(self, i: Array) -> Bool[Array, "size 1"]:
        """Return which rows of block i belong to its expert."""
        return (self.start[i] + jnp.arange(self.size) < self.end[i])[:, None]


def block_rows(rows: int, experts: int) -> int:
    """Return rows per block, for `rows` in all.

    1 up to a mean of 2 rows per expert: a matrix-vector product in [out, in] layout runs at memory bandwidth. Then the
    power of two at or above the mean: on two cores a block of 64 rows takes 10 % longer than one of 32, dominated by
    loading and packing weights, and one of 128 takes 50 % longer than one of 64.
    """
    mean = rows / experts
    return 1 if mean <= 2 else min(max(8, 1 << (round(mean) - 1).bit_length()), 128)


def _blocks(group_sizes: Array, rows: int) -> _Blocks:
    experts = group_sizes.shape[0]
    size = block_rows(rows, experts)
    per_expert = (group_sizes + size - 1) // size
    last = jnp.cumsum(per_expert)
    i = jnp.arange(-(-rows // size) + experts, dtype=jnp.int32)
    expert = jnp.searchsorted(last, i, side="right", method="compare_all").astype(jnp.int32).clip(max=experts - 1)
    ends = jnp.cumsum(group_sizes)
    start = (ends - group_sizes)[expert] + (i - (last - per_expert)[expert]) * size
    return _Blocks(size, expert, start.astype(jnp.int32), ends[expert].astype(jnp.int32), last[-1])


def _with_slack(x: Array, blocks: _Blocks) -> Array:
    """Pad for the spill of the last block, whose slice would else be clamped to fit."""
    return jnp.pad(x, ((0, blocks.size), *((0, 0),) * (x.ndim - 1)))


def _slice(x: Array, start: Array, size: int) -> Array:
    """Return `size` entries of x from `start` on, floats in fp32.

    bf16 is sliced as bits behind a barrier: XLA hoists a cast out of the loop and converts all experts, and up to jax
    0.10.1 it converts a whole bf16 array even to slice it.
    """
    if x.dtype == jnp.bfloat16:
        x, start = jax.lax.optimization_barrier((x, start))
        bits = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(x, jnp.uint16), start, size)
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    piece = jax.lax.dynamic_slice_in_dim(x, start, size)
    return piece.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else piece


def _block(inputs: Inputs, blocks: _Blocks, i: Array) -> Inputs:
    """Return the rows of block i and the operands of its expert, floats in fp32."""
    experts = jax.tree.map(lambda leaf: _slice(leaf, blocks.expert[i], 1)[0], inputs.experts)
    return inputs.map_rows(lambda x: _slice(x, blocks.start[i], blocks.size))._replace(experts=experts)


def forward(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str) -> Float[Array, "R D"]:
    """Compute `expert_ffn`."""
    rows = len(inputs.rows)
    blocks = _blocks(group_sizes, rows)
    padded = inputs.map_rows(lambda x: _with_slack(x, blocks))

    def step(i: Array, out: Array) -> Array:
        y = jnp.where(blocks.valid(i), swiglu(_block(padded, blocks, i), activation), 0)
        return jax.lax.dynamic_update_slice_in_dim(out, y, blocks.start[i], axis=0)

    # In fp32 for the reason given in `_slice`.
    out = jax.lax.fori_loop(0, blocks.count, step, jnp.zeros_like(padded.rows, jnp.float32))
    return out[:rows].astype(inputs.rows.dtype)


def backward(
    inputs: Inputs, group_sizes: Int[Array, "E"], activation: str, grad_out: Float[Array, "R D"], needs_grad: GradMask
) -> list[Array]:
    """Compute the gradients of the leaves that need one; recomputes hidden rows, sums in fp32."""
    rows = len(inputs.rows)
    blocks = _blocks(group_sizes, rows)
    padded = inputs.map_rows(lambda x: _with_slack(x, blocks))
    grad_padded = _with_slack(grad_out, blocks)
    by_row = needs_grad.select(inputs.by_row())

    def step(i: Array, grads: list[Array]) -> list[Array]:
        # Rows past the expert's end belong to the next one: unmasked they would leak into this expert's gradients.
        dy = jnp.where(blocks.valid(i), _slice(grad_padded, blocks.start[i], blocks.size), 0)
        pieces = needs_grad.vjp(lambda block: swiglu(block, activation), _block(padded, blocks, i), dy)
        return [
            jax.lax.dynamic_update_slice_in_dim(grad, piece, blocks.start[i], axis=0)
            if is_row
            else grad.at[blocks.expert[i]].add(piece)
            for is_row, grad, piece in zip(by_row, grads, pieces, strict=True)
        ]

    leaves = needs_grad.select(jax.tree.leaves(padded))
    grads = jax.lax.fori_loop(0, blocks.count, step, [jnp.zeros_like(leaf, jnp.float32) for leaf in leaves])
    return [
        (grad[:rows] if is_row else grad).astype(leaf.dtype)
        for is_row, grad, leaf in zip(by_row, grads, leaves, strict=True)
    ]
