"""Gradients that are ready, reduced and summed over micro-batches, before the backward pass goes on to the next part.

Start at `enter`. XLA would otherwise reduce and sum the gradients of all layers at the end, and hold the activations
and unsharded gradients that they are computed from until then.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dsmoe_jax.axes import Array

States = TypeVar("States")
Params = dict[str, Array]


def enter(x: States, weights: Params, sums: Mapping[str, Array] | None) -> tuple[States, Params]:
    """Return the input and the weights of a part of the model as they are; the backward pass ends the part.

    Args:
        x: The input; the part before waits for its gradient and those of the weights.
        weights: Weights by name.
        sums: Sums of gradients by name. The gradient by a sum is the sum with that of the weight added, so that
          differentiating by `sums`, not by weights, accumulates.

    Returns:
        `x` and `weights`.
    """
    if sums is None:
        return _ordered(x, weights)
    return _summed(x, weights, {name: sums[name] for name in weights})


@jax.custom_vjp
def _ordered(x: Any, weights: Params) -> tuple[Any, Params]:
    return x, weights


_ordered.defvjp(lambda x, weights: ((x, weights), None), lambda _, grads: jax.lax.optimization_barrier(grads))


@jax.custom_vjp
def _summed(x: Any, weights: Params, sums: Params) -> tuple[Any, Params]:
    return x, weights


def _sum_backward(sums: Params, grads: tuple[Any, Params]) -> tuple[Any, None, Params]:
    dx, dweights = grads
    added = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, dweights)
    dx, added = jax.lax.optimization_barrier((dx, added))
    return dx, None, added


_summed.defvjp(lambda x, weights, sums: ((x, weights), sums), _sum_backward)


def row_major(params: Mapping[str, Array]) -> Params:
    """Pin the layout of weights that a loop reads.

    All-gathers prefer the sharded dimension outermost, for which XLA would copy all weights before the loop.
    """
    if jax.default_backend() != "gpu":
        return dict(params)
    return {name: with_layout_constraint(x, Layout(tuple(range(jnp.ndim(x))))) for name, x in params.items()}
