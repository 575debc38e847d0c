"""Which backend computes attention, and what is given to cuDNN. What cuDNN makes of it, `tests/gpu` asks a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels import attention as module
from dsmoe_jax.kernels.attention import VARIABLE, attention
from tests.helpers.conformance import BF16, assert_near

B, T, N, K, H = 2, 24, 4, 2, 16


def operands(dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    """Queries, keys, values and the mask of two packed documents a row, the last tokens padding."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, K, T, H), (B, K, T, H))
    document = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([9, 11, 4]))
    mask = jnp.tri(T, dtype=bool) & (document[:, None] == document[None, :])
    return [*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), jnp.broadcast_to(mask[None], (B, T, T))]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As if there were one: `jax.nn` computes by plain XLA what cuDNN is asked for; the options of every call."""
    original, asked = jax.nn.dot_product_attention, []

    def heard(*given: Any, implementation: str, **options: Any) -> jax.Array:
        asked.append(options | {"implementation": implementation})
        return original(*given, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", heard)
    module._beyond_cudnn.cache_clear()
    return asked


def test_cudnn_is_given_the_documents_and_promised_that_they_are_causal(on_a_gpu: list[dict[str, Any]]):
    q, k, v, mask = operands()

    got, plain = (attention(q, k, v, mask, causal=True, backend=backend) for backend in ("cudnn", "plain"))

    (options,) = on_a_gpu
    assert (options["implementation"], options["is_causal"]) == ("cudnn", True)
    assert_near(got, plain, BF16)


def test_the_environment_names_the_backend(on_a_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "cudnn")

    attention(*operands(), causal=True)
    attention(*operands(), causal=True, backend="plain")

    assert len(on_a_gpu) == 1


def test_steps_over_a_cache_are_computed_plainly(on_a_gpu: list[dict[str, Any]]):
    attention(*operands(), causal=False, backend="cudnn")

    assert not on_a_gpu


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "reason"),
    [
        ("float32", H, {}, "it needs bfloat16 or float16, not float32"),
        ("bfloat16", 12, {}, "heads of a multiple of 8 up to 128 wide, not 12"),
        ("bfloat16", H, {"dropout": 0.5, "dropout_key": jax.random.key(0)}, "it has no dropout"),
    ],
)
def test_what_cudnn_cannot_serve_is_computed_plainly_and_said(
    dtype: str, head_dim: int, options: dict[str, Any], reason: str, on_a_gpu: list[dict[str, Any]]
):
    q, k, v, mask = operands(jnp.dtype(dtype))
    q, k, v = (x[..., :head_dim] for x in (q, k, v))

    with pytest.warns(UserWarning, match=f"attention backend 'cudnn' cannot run here .*{reason}.*plain instead"):
        got = attention(q, k, v, mask, causal=True, backend="cudnn", **options)

    np.testing.assert_array_equal(got, attention(q, k, v, mask, causal=True, backend="plain", **options))
    assert not on_a_gpu


def test_without_a_gpu_plain_takes_its_place():
    module._beyond_cudnn.cache_clear()

    with pytest.warns(UserWarning, match="it needs an NVIDIA GPU, this is 'cpu'"):
        attention(*operands(), causal=True, backend="cudnn")


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="attention backend 'flash' does not exist, only plain, cudnn"):
        attention(*operands(), causal=True, backend="flash")
