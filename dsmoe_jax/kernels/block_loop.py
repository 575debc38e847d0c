"""The routed experts as one loop over (expert, block of rows): only experts that have rows are read.

Read `_forward` first. Rows are sorted by expert but not padded to blocks: a block takes `block` rows from where its
expert's rows go on, computes them all, and writes zeros for those past its expert's last row; the next block
overwrites that spill. The loop's length depends on the data, which autodiff refuses, hence the custom VJP.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Int
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS


def block_loop(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str) -> Array:
    """See `expert_ffn` for shapes."""
    return _block_loop(rows, gate, up, down, group_sizes, activation)


class _Blocks(NamedTuple):
    expert: Int[Array, "n"]
    start: Int[Array, "n"]  # first row
    end: Int[Array, "n"]  # one past the expert's last row, which may lie beyond the block
    count: Int[Array, ""]  # how many of the n are in use


def block_rows(rows: int, experts: int) -> int:
    """Rows a block takes, for `rows` in all.

    One at a time while experts see hardly more than one row: a matrix-vector product in [out, in] layout runs at the
    speed of memory. Then blocks near the mean of rows per expert, so that few of them are half empty.
    """
    mean = rows / experts
    return 1 if mean <= 2 else max(8, min(128, 1 << round(mean).bit_length() - 1))


def _blocks(group_sizes: Array, rows: int, block: int) -> _Blocks:
    per_expert = (group_sizes + block - 1) // block
    last = jnp.cumsum(per_expert)
    n = -(-rows // block) + group_sizes.shape[0]
    i = jnp.arange(n, dtype=jnp.int32)
    expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32).clip(max=group_sizes.shape[0] - 1)
    ends = jnp.cumsum(group_sizes)
    start = (ends - group_sizes)[expert] + (i - (last - per_expert)[expert]) * block
    return _Blocks(expert, start.astype(jnp.int32), ends[expert].astype(jnp.int32), last[-1])


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _forward(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str) -> Array:
    R, D = rows.shape
    act = ACTIVATION_FUNCTIONS[activation]
    block = block_rows(R, gate.shape[0])
    blocks = _blocks(group_sizes, R, block)
    slack = jnp.pad(rows, ((0, block), (0, 0)))

    def step(i: Array, out: Array) -> Array:
        e, start = blocks.expert[i], blocks.start[i]
        x = jax.lax.dynamic_slice(slack, (start, 0), (block, D))
        hidden = (act(_dot(x, gate[e], (1, 1))) * _dot(x, up[e], (1, 1))).astype(rows.dtype)
        y = _dot(hidden, down[e], (1, 1))
        y = jnp.where(_mine(blocks, i, block), y, 0).astype(rows.dtype)
        return jax.lax.dynamic_update_slice(out, y, (start, 0))

    return jax.lax.fori_loop(0, blocks.count, step, jnp.zeros_like(slack))[:R]


def _mine(blocks: _Blocks, i: Array, block: int) -> Array:
    """[block, 1]: whether a row of block i still belongs to its expert."""
    return (blocks.start[i] + jnp.arange(block) < blocks.end[i])[:, None]


def _vjp_forward(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str):
    out = _forward(rows, gate, up, down, group_sizes, activation)
    return out, (rows, gate, up, down, group_sizes)


def _vjp_backward(activation: str, saved: tuple[Array, ...], grad_out: Array):
    """Recomputes each block's hidden rows; weight gradients grow in place, in fp32."""
    rows, gate, up, down, group_sizes = saved
    R, D = rows.shape
    act = ACTIVATION_FUNCTIONS[activation]
    block = block_rows(R, gate.shape[0])
    blocks = _blocks(group_sizes, R, block)
    slack = jnp.pad(rows, ((0, block), (0, 0)))
    grad_slack = jnp.pad(grad_out, ((0, block), (0, 0)))

    def step(i: Array, grads: tuple[Array, ...]) -> tuple[Array, ...]:
        d_rows, d_gate, d_up, d_down = grads
        e, start = blocks.expert[i], blocks.start[i]
        x = jax.lax.dynamic_slice(slack, (start, 0), (block, D))
        # Rows past the expert's end are another's: without the mask they would leak into this expert's weights.
        dy = jnp.where(_mine(blocks, i, block), jax.lax.dynamic_slice(grad_slack, (start, 0), (block, D)), 0)
        hidden, undo = jax.vjp(lambda g, u: act(g) * u, _dot(x, gate[e], (1, 1)), _dot(x, up[e], (1, 1)))
        dg, du = undo(_dot(dy, down[e], (1, 0)))
        dg, du, hidden = (t.astype(rows.dtype) for t in (dg, du, hidden))
        dx = _dot(dg, gate[e], (1, 0)) + _dot(du, up[e], (1, 0))
        return (
            jax.lax.dynamic_update_slice(d_rows, dx.astype(rows.dtype), (start, 0)),
            d_gate.at[e].add(_dot(dg, x, (0, 0))),
            d_up.at[e].add(_dot(du, x, (0, 0))),
            d_down.at[e].add(_dot(dy, hidden, (0, 0))),
        )

    zeros = tuple(jnp.zeros_like(w, jnp.float32) for w in (gate, up, down))
    d_rows, d_gate, d_up, d_down = jax.lax.fori_loop(0, blocks.count, step, (jnp.zeros_like(slack), *zeros))
    return d_rows[:R], d_gate.astype(gate.dtype), d_up.astype(up.dtype), d_down.astype(down.dtype), None


_block_loop = jax.custom_vjp(_forward, nondiff_argnums=(5,))
_block_loop.defvjp(_vjp_forward, _vjp_backward)
