"""The matmul with weights [out, in], for any number of tokens, of floats or int8 codes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels.matmul import matmul
from tests.helpers.conformance import BF16, FP32, assert_near

I, O = 24, 40  # noqa: E741


@pytest.mark.parametrize("tokens", [(1,), (2, 1), (16,), (17,), (65,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FP32), (jnp.bfloat16, BF16)])
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_matmul_equals_numpy(
    platform: str, codes: bool, dtype: Any, tolerance: float, tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    rng = np.random.default_rng(len(tokens))
    x = jnp.asarray(rng.normal(size=(*tokens, I)), dtype)
    values = rng.integers(-127, 128, (O, I)) if codes else rng.normal(size=(O, I))
    weight = jnp.asarray(values, jnp.int8 if codes else dtype)

    got = jax.jit(lambda x, weight: matmul(x, weight))(x, weight)

    assert got.dtype == dtype
    assert_near(got, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T, tolerance)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="newer compilers hoist the cast past the barrier")
def test_few_tokens_do_not_cast_all_codes():
    """The program has no array as large as the codes in another dtype."""
    x, weight = jnp.ones((8, 512)), jnp.ones((1024, 512), jnp.int8)

    memory = jax.jit(matmul).lower(x, weight).compile().memory_analysis()

    assert memory is not None
    assert memory.temp_size_in_bytes < weight.size


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_half_precision_weights_are_cast(tokens: int):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(tokens, I)).astype(np.float32), rng.normal(size=(O, I)).astype(np.float16)

    assert_near(matmul(jnp.asarray(x), jnp.asarray(weight)), x @ weight.T.astype(np.float64), FP32)


def test_gradients_pass_through_codes():
    x, weight = jnp.ones((3, 4)), jnp.arange(20, dtype=jnp.int8).reshape(5, 4)

    grad = jax.grad(lambda x: matmul(x, weight).sum())(x)

    np.testing.assert_allclose(grad, np.broadcast_to(np.asarray(weight, np.float32).sum(0), (3, 4)))
