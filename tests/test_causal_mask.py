"""Causal masks by parts: equal to an array of the same mask, without one of T × T."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dsmoe_jax.kernels.attention import CausalMask, attention
from dsmoe_jax.model import DeepSeekMoE, merge, split
from tests.helpers import small

B, N, K, H = 2, 4, 2, 8


def segments(tokens: int) -> np.ndarray:
    """Three segments in the first sequence, two in the second."""
    at = np.arange(tokens)[None]
    return ((at >= [[tokens // 5], [tokens // 2]]).astype(np.int32) + (at >= [[tokens // 2], [tokens]])).astype(
        np.int32
    )


def masks(tokens: int) -> dict[str, tuple[CausalMask, np.ndarray, int]]:
    """The parts, the array [B, T, S] and S by name."""
    causal = np.tril(np.ones((tokens, tokens), bool))[None]
    valid = np.arange(tokens)[None] < np.array([[tokens], [tokens - 2]])
    documents = segments(tokens)
    same = documents[:, :, None] == documents[:, None, :]
    start, slots = np.array([3, 0], np.int32), tokens + 4
    cached = np.arange(slots)[None, None] <= (start[:, None] + np.arange(tokens))[:, :, None]
    shared = documents == 0
    return {
        "causal": (CausalMask(), causal, tokens),
        "padding": (CausalMask(valid=jnp.asarray(valid)), causal & valid[:, None], tokens),
        "segments": (
            CausalMask(query_segments=jnp.asarray(documents), key_segments=jnp.asarray(documents)),
            causal & same,
            tokens,
        ),
        "shared": (
            CausalMask(None, *map(jnp.asarray, (valid, documents, documents, shared))),
            causal & valid[:, None] & (same | shared[:, None]),
            tokens,
        ),
        "cached": (CausalMask(jnp.asarray(start)), cached, slots),
    }


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *((name, 5) for name in masks(5)),
        ("shared", 600),
        pytest.param("cached", 600, marks=pytest.mark.slow),
        *(pytest.param(name, tokens, marks=pytest.mark.slow) for name in masks(5) for tokens in (150, 601)),
    ],
)
def test_mask_by_parts_equals_the_array(name: str, tokens: int):
    parts, array, slots = masks(tokens)[name]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, tokens, N, H), (B, K, slots, H), (B, K, slots, H))
    operands = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def with_gradients(mask: Any) -> Any:
        out = functools.partial(attention, mask=jnp.broadcast_to(mask, (B, *mask.shape[1:])) if mask is array else mask)
        loss = lambda *x: jnp.sin(out(*x)).sum()  # noqa: E731
        return jax.jit(lambda *x: (out(*x), jax.grad(loss, argnums=(0, 1, 2))(*x)))(*operands)

    got, want = with_gradients(parts), with_gradients(array)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), got, want)


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every value of a program, nested ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_training_makes_no_array_of_all_scores(remat: str):
    tokens = 640
    graph, params = split(DeepSeekMoE.init(small.SMALL))
    ids, documents = jnp.zeros((1, tokens), jnp.int32), jnp.asarray(segments(tokens)[:1])

    def loss(params: Any) -> Any:
        return merge(graph, params).hidden(ids, segment_ids=documents, remat=remat).last_hidden_state.sum()

    program = jax.make_jaxpr(jax.grad(loss))(params)

    shapes = {shape for shape in shapes_in(program.jaxpr) if shape.count(tokens) > 1}
    assert not shapes
