"""The routed experts as batched matmuls over [E, C, D]: plain XLA, full speed wherever batched matmuls are.

Read `forward` first. Each expert gets C places, a little above the mean of its rows; experts with more rows are served
in further passes over the same places, so nothing is dropped and memory stays bounded however skewed the routing is.
Rows go to their places and back by gathers. The number of passes depends on the data, which autodiff refuses, so the
backward pass repeats the passes itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.kernels.operand import Inputs, Wanted, expert_of_rows, swiglu

_HEADROOM = 1.25  # places above the mean: a balanced router then needs one pass


class _Places(NamedTuple):
    """Where one pass puts which rows."""

    row: Int[Array, "E C"]  # the row in each place
    taken: Bool[Array, "E C"]
    place: Int[Array, "R"]  # the place, in E·C, of each row
    served: Bool[Array, "R"]  # whether this pass serves the row

    def put(self, x: Array) -> Array:
        """Row-wise values [R, …] into the places, [E, C, …]."""
        return jnp.where(_beside(self.taken, x.ndim + 1), x[self.row], 0)

    def take(self, y: Array, otherwise: Array) -> Array:
        """Values of places [E, C, …] back to the rows that were served; the others keep theirs."""
        y = y.reshape(-1, *y.shape[2:])[self.place].astype(otherwise.dtype)
        return jnp.where(_beside(self.served, y.ndim), y, otherwise)


def _beside(mask: Array, ndim: int) -> Array:
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))


def capacity(rows: int, experts: int) -> int:
    """Places per expert: a multiple of 8 above the mean, or all rows where those are fewer."""
    return min(rows, -(-int(_HEADROOM * rows / experts + 1) // 8) * 8)


def _places(group_sizes: Array, rows: int, index: Array | int) -> _Places:
    C = capacity(rows, group_sizes.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes
    offset = index * C + jnp.arange(C)[None, :]
    expert, has_one = expert_of_rows(group_sizes, rows)
    within = jnp.arange(rows) - starts[expert] - index * C
    return _Places(
        row=(starts[:, None] + offset).clip(max=rows - 1),
        taken=offset < group_sizes[:, None],
        place=expert * C + within.clip(0, C - 1),
        served=has_one & (within >= 0) & (within < C),
    )


def _over_passes(one_pass: Callable[[Any, Any], Any], start: Any, group_sizes: Array, rows: int) -> Any:
    """`one_pass(index, carry)` for as many passes as the fullest expert needs; the first stands outside the loop."""
    C, carry = capacity(rows, group_sizes.shape[0]), one_pass(0, start)
    return carry if rows <= C else jax.lax.fori_loop(1, -(-group_sizes.max() // C), one_pass, carry)


def _on_places(inputs: Inputs, activation: str) -> Float[Array, "E C D"]:
    return jax.vmap(lambda own: swiglu(own, activation))(inputs)


def forward(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str) -> Float[Array, "R D"]:
    """See `expert_ffn`."""
    rows = len(inputs.rows)

    def one_pass(index: Array | int, out: Array) -> Array:
        places = _places(group_sizes, rows, index)
        return places.take(_on_places(inputs.map_rows(places.put), activation), out)

    return _over_passes(one_pass, jnp.zeros_like(inputs.rows), group_sizes, rows)


def backward(
    inputs: Inputs, group_sizes: Int[Array, "E"], activation: str, grad_out: Float[Array, "R D"], wanted: Wanted
) -> list[Array]:
    """The gradients of the wanted leaves of `inputs`; recomputes hidden rows, and sums those of weights in fp32."""
    rows = len(inputs.rows)
    by_row, asked = wanted.of(inputs.by_row()), wanted.of(jax.tree.leaves(inputs))

    def one_pass(index: Array | int, grads: list[Array]) -> list[Array]:
        places = _places(group_sizes, rows, index)
        dy = places.put(grad_out).astype(jnp.float32)
        pieces = wanted.gradients(lambda placed: _on_places(placed, activation), inputs.map_rows(places.put), dy)
        return [
            places.take(piece, grad) if own_rows else grad + piece.astype(jnp.float32)
            for own_rows, grad, piece in zip(by_row, grads, pieces, strict=True)
        ]

    zeros = [jnp.zeros_like(leaf, None if own else jnp.float32) for own, leaf in zip(by_row, asked, strict=True)]
    grads = _over_passes(one_pass, zeros, group_sizes, rows)
    return [grad.astype(leaf.dtype) for grad, leaf in zip(grads, asked, strict=True)]
