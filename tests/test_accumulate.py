"""Gradients summed within the backward pass: the same numbers, a part at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.train.accumulate import enter

WEIGHTS = {"a": jnp.asarray([[1.0, 2.0], [3.0, -1.0]]), "b": jnp.asarray([[0.5, 1.0], [-2.0, 4.0]])}
SUMS = {name: jnp.full((2, 2), 10.0) for name in WEIGHTS}
X = jnp.asarray([[1.0, -1.0]])


def loss(weights: Any, sums: Any) -> Any:
    """Two parts, one after the other."""
    x = X
    for name in weights:
        x, part = enter(x, {name: weights[name]}, sums)
        x = jnp.sin(x @ part[name])
    return x.sum()


def test_the_gradient_by_a_sum_is_the_new_sum():
    new = jax.jit(jax.grad(loss, argnums=1))(WEIGHTS, SUMS)

    grads = jax.grad(loss)(WEIGHTS, None)
    jax.tree.map(np.testing.assert_array_equal, new, jax.tree.map(jnp.add, SUMS, grads))


def test_each_part_waits_for_the_sums_of_the_next():
    program = jax.make_jaxpr(jax.grad(loss, argnums=1))(WEIGHTS, SUMS)

    names = [equation.primitive.name for equation in program.jaxpr.eqns]
    first = names.index("optimization_barrier")
    assert names.count("optimization_barrier") == 2
    assert names[:first].count("dot_general") == 4  # both forward, and the second backward by input and weight
    assert names[first:].count("dot_general") >= 1
