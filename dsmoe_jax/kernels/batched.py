"""The routed experts as batched matmuls over [E, C, D]: plain XLA. Start at `forward`.

Each expert has a capacity of C rows, a little above the mean. Overflowing rows take further passes, so no row is
dropped and memory is bounded under any routing. The number of passes depends on the data, which autodiff rejects, so
the backward pass is explicit.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.kernels.operand import GradMask, Inputs, dequantized_in_place, expert_of_rows, swiglu

HEADROOM: Final = 1.25  # capacity over the mean: one pass for a balanced router


class _Slots(NamedTuple):
    """The slots of one pass, C per expert, and their rows."""

    row: Int[Array, "E C"]  # the row in each slot
    used: Bool[Array, "E C"]
    slot: Int[Array, "R"]  # the slot of each row, in E·C
    served: Bool[Array, "R"]  # rows of this pass

    def put(self, x: Array) -> Array:
        """Copy row-wise values [R, …] into the slots, [E, C, …]."""
        return jnp.where(_expand(self.used, x.ndim + 1), x[self.row], 0)

    def take(self, y: Array, otherwise: Array) -> Array:
        """Copy slots [E, C, …] to their rows; rows of other passes keep `otherwise`."""
        y = y.reshape(-1, *y.shape[2:])[self.slot].astype(otherwise.dtype)
        return jnp.where(_expand(self.served, y.ndim), y, otherwise)


def _expand(mask: Array, ndim: int) -> Array:
    return mask.reshape(*mask.shape, *(1,) * (ndim - mask.ndim))


def capacity(rows: int, experts: int) -> int:
    """Return the slots per expert: a multiple of 8 above the mean, at most all rows."""
    return min(rows, -(-int(HEADROOM * rows / experts + 1) // 8) * 8)


class Part(NamedTuple):
    """A part of the experts, whose rows are some of all sorted rows."""

    start: Int[Array, ""]  # first row
    parts: int  # parts of equal numbers of experts
    by_row: list[Array]  # outputs, or gradients by row, of the parts before; empty for the first


def _slots(group_sizes: Array, rows: int, index: Array | int, part: Part | None = None) -> _Slots:
    C = _capacity(group_sizes, rows, part)
    starts = jnp.cumsum(group_sizes) - group_sizes
    offset = index * C + jnp.arange(C)[None, :]
    if part is None:
        expert, valid = expert_of_rows(group_sizes, rows)
    else:
        starts += part.start
        expert, valid = expert_of_rows(jnp.append(part.start, group_sizes), rows)
        expert, valid = jnp.maximum(expert - 1, 0), valid & (expert > 0)
    within = jnp.arange(rows) - starts[expert] - index * C
    return _Slots(
        row=(starts[:, None] + offset).clip(max=rows - 1),
        used=offset < group_sizes[:, None],
        slot=expert * C + within.clip(0, C - 1),
        served=valid & (within >= 0) & (within < C),
    )


def _capacity(group_sizes: Array, rows: int, part: Part | None) -> int:
    return capacity(rows, len(group_sizes) * (1 if part is None else part.parts))


def _over_passes(
    one_pass: Callable[[Any, Any], Any], start: Any, group_sizes: Array, rows: int, part: Part | None = None
) -> Any:
    """Run `one_pass(index, carry)` until the fullest expert is done, the first pass outside the loop."""
    C, carry = _capacity(group_sizes, rows, part), one_pass(0, start)
    return carry if rows <= C else jax.lax.fori_loop(1, -(-group_sizes.max() // C), one_pass, carry)


def _on_slots(inputs: Inputs, activation: str) -> Float[Array, "E C D"]:
    return jax.vmap(lambda expert: swiglu(expert, activation))(dequantized_in_place(inputs))


def forward(
    inputs: Inputs, group_sizes: Int[Array, "E"], activation: str, part: Part | None = None
) -> Float[Array, "R D"]:
    """Compute `expert_ffn`."""
    rows = len(inputs.rows)

    def one_pass(index: Array | int, out: Array) -> Array:
        slots = _slots(group_sizes, rows, index, part)
        return slots.take(_on_slots(inputs.map_rows(slots.put), activation), out)

    before = part.by_row if part is not None else []
    return _over_passes(one_pass, before[0] if before else jnp.zeros_like(inputs.rows), group_sizes, rows, part)


def backward(
    inputs: Inputs,
    group_sizes: Int[Array, "E"],
    activation: str,
    grad_out: Float[Array, "R D"],
    needs_grad: GradMask,
    part: Part | None = None,
) -> list[Array]:
    """Compute the gradients of the leaves that need one; recomputes hidden rows, sums weight gradients in fp32."""
    rows = len(inputs.rows)
    by_row, leaves = needs_grad.select(inputs.by_row()), needs_grad.select(jax.tree.leaves(inputs))

    def one_pass(index: Array | int, grads: list[Array]) -> list[Array]:
        slots = _slots(group_sizes, rows, index, part)
        dy = slots.put(grad_out).astype(jnp.float32)
        pieces = needs_grad.vjp(lambda placed: _on_slots(placed, activation), inputs.map_rows(slots.put), dy)
        return [
            slots.take(piece, grad) if is_row else grad + piece.astype(jnp.float32)
            for is_row, grad, piece in zip(by_row, grads, pieces, strict=True)
        ]

    zeros = [jnp.zeros_like(leaf, None if is_row else jnp.float32) for is_row, leaf in zip(by_row, leaves, strict=True)]
    if part is not None and part.by_row:
        before = iter(part.by_row)
        zeros = [next(before) if is_row else zero for is_row, zero in zip(by_row, zeros, strict=True)]
    grads = _over_passes(one_pass, zeros, group_sizes, rows, part)
    return [grad.astype(leaf.dtype) for grad, leaf in zip(grads, leaves, strict=True)]
