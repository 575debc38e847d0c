"""The choice of attention backend and the arguments of cuDNN; `tests/gpu` runs cuDNN itself."""

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
    """Queries, keys, values and the mask of two packed documents per sequence, then padding."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, K, T, H), (B, K, T, H))
    document = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([9, 11, 4]))
    mask = jnp.tri(T, dtype=bool) & (document[:, None] == document[None, :])
    return [*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), jnp.broadcast_to(mask[None], (B, T, T))]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Pretend to have a GPU: plain XLA computes the cuDNN calls, whose options are returned."""
    original, calls = jax.nn.dot_product_attention, []

    def recorded(*args: Any, implementation: str, **options: Any) -> jax.Array:
        calls.append(options | {"implementation": implementation})
        return original(*args, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    module._cudnn_unsupported.cache_clear()
    return calls


def test_cudnn_gets_the_mask_and_the_causal_flag(on_a_gpu: list[dict[str, Any]]):
    q, k, v, mask = operands()

    got, plain = (attention(q, k, v, mask, causal=True, backend=backend) for backend in ("cudnn", "plain"))

    (options,) = on_a_gpu
    assert (options["implementation"], options["is_causal"]) == ("cudnn", True)
    assert_near(got, plain, BF16)


def test_the_environment_selects_the_backend(on_a_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "cudnn")

    attention(*operands(), causal=True)
    attention(*operands(), causal=True, backend="plain")

    assert len(on_a_gpu) == 1


def test_decode_steps_use_plain(on_a_gpu: list[dict[str, Any]]):
    attention(*operands(), causal=False, backend="cudnn")

    assert not on_a_gpu


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "reason"),
    [
        ("float32", H, {}, "it needs bfloat16 or float16, got float32"),
        ("bfloat16", 12, {}, "a multiple of 8 up to 128, got 12"),
        ("bfloat16", H, {"dropout": 0.5, "dropout_key": jax.random.key(0)}, "it has no dropout"),
    ],
)
def test_unsupported_cudnn_falls_back_with_the_reason(
    dtype: str, head_dim: int, options: dict[str, Any], reason: str, on_a_gpu: list[dict[str, Any]]
):
    q, k, v, mask = operands(jnp.dtype(dtype))
    q, k, v = (x[..., :head_dim] for x in (q, k, v))

    with pytest.warns(UserWarning, match=f"attention backend 'cudnn' cannot run here .*{reason}.*using plain"):
        got = attention(q, k, v, mask, causal=True, backend="cudnn", **options)

    np.testing.assert_array_equal(got, attention(q, k, v, mask, causal=True, backend="plain", **options))
    assert not on_a_gpu


def test_without_a_gpu_cudnn_falls_back():
    module._cudnn_unsupported.cache_clear()

    with pytest.warns(UserWarning, match="it needs an NVIDIA GPU, got 'cpu'"):
        attention(*operands(), causal=True, backend="cudnn")


def test_an_unknown_backend_is_rejected():
    with pytest.raises(ValueError, match="attention backend must be one of plain, cudnn, got 'flash'"):
        attention(*operands(), causal=True, backend="flash")
