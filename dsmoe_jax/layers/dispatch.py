"""From tokens to rows sorted by expert, and back. Start at `route_rows`.

Both directions are index gathers, in the forward and in the backward pass: a gather's own gradient would be a
scatter-add, which is slow everywhere and not repeatable on GPU, so each brings the gather that undoes it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int


class RowOrder(NamedTuple):
    """Where each of the R = M·A (token, choice) pairs stands among the rows."""

    choice: Int[Array, "R"]  # row -> pair; the row's token is choice // A
    row: Int[Array, "M A"]  # pair -> row
    group_sizes: Int[Array, "E"]  # rows of each expert


def route_rows(ids: Int[Array, "M A"], experts: int) -> RowOrder:
    """Sort the pairs by expert, stably: within an expert, rows keep the order of the tokens."""
    flat = ids.reshape(-1)
    choice = jnp.argsort(flat, stable=True)
    row = jnp.argsort(choice, stable=True).reshape(ids.shape)
    group_sizes = (flat[:, None] == jnp.arange(experts)[None, :]).sum(axis=0, dtype=jnp.int32)
    return RowOrder(choice, row, group_sizes)


@jax.custom_vjp
def dispatch(x: Float[Array, "M D"], order: RowOrder) -> Float[Array, "R D"]:
    """Each token's state once for every expert it visits."""
    return x[order.choice // order.row.shape[1]]


def _dispatch_forward(x: Array, order: RowOrder):
    return dispatch(x, order), order


def _dispatch_backward(order: RowOrder, grad_rows: Array):
    return grad_rows[order.row].astype(jnp.float32).sum(axis=1).astype(grad_rows.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(rows: Float[Array, "R D"], weights: Float[Array, "M A"], order: RowOrder) -> Float[Array, "M D"]:
    """The weighted sum over a token's experts, in fp32."""
    return jnp.einsum("ma,mad->md", weights, rows[order.row].astype(jnp.float32), precision="highest").astype(
        rows.dtype
    )


def _combine_forward(rows: Array, weights: Array, order: RowOrder):
    return combine(rows, weights, order), (rows, weights, order)


def _combine_backward(saved: tuple[Array, Array, RowOrder], grad: Array):
    rows, weights, order = saved
    grad = grad.astype(jnp.float32)
    token = order.choice // weights.shape[1]
    grad_rows = weights.reshape(-1)[order.choice][:, None] * grad[token]
    grad_weights = jnp.einsum("md,mad->ma", grad, rows[order.row].astype(jnp.float32), precision="highest")
    return grad_rows.astype(rows.dtype), grad_weights, None


combine.defvjp(_combine_forward, _combine_backward)
