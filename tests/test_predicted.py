"""The predicted time of compiled programs: matmuls, bytes, loops."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsmoe_jax.plan.cards import CARDS
from tests.benchmarks.predicted import Prediction, predict

M, K, TRIPS = 256, 128, 5
X, W = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((K, K), jnp.float32)
MATMUL_BYTES = 4 * (2 * M * K + K * K)


def of(function: Any, *operands: Any) -> Prediction:
    text = jax.jit(function).lower(*operands).compile().as_text() or ""
    return predict(text, CARDS["h100"], {"fsdp": 1})


def test_loops_of_known_length_are_multiplied():
    once = of(jnp.dot, X, W)
    often = of(lambda x, w: jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=TRIPS)[0], X, W)

    assert once.flops == 2 * M * K * K
    assert once.bytes == pytest.approx(MATMUL_BYTES, rel=0.01)
    assert often.flops == TRIPS * once.flops
    assert often.bytes > TRIPS * once.bytes
    assert (once.unknown_loops, often.unknown_loops) == (0, 0)


def test_loops_of_unknown_length_are_counted_apart():
    found = of(lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), X, W)

    assert found.unknown_loops == 1
    assert found.flops == 0


def test_a_slice_of_a_large_array_is_read_alone():
    table = jax.ShapeDtypeStruct((1000, M, K), jnp.float32)

    found = of(lambda table, i: jnp.sin(table[i]) + 1, table, jax.ShapeDtypeStruct((), jnp.int32))

    assert found.bytes < 10 * 4 * M * K


def test_the_longer_of_memory_and_compute_counts():
    found, card = of(jnp.dot, X, W), CARDS["h100"]

    slow, fast = found.seconds
    assert MATMUL_BYTES / card.bandwidth < fast < slow < 3 * MATMUL_BYTES / card.bandwidth
