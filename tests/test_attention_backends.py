"""The choice of attention backend, our kernel interpreted, and the arguments of cuDNN; `tests/gpu` runs both."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels import attention as module
from dsmoe_jax.kernels.attention import VARIABLE, CausalMask, attention
from dsmoe_jax.sharding import MeshConfig, make_mesh
from tests.helpers.conformance import BF16, FP32, assert_near
from tests.test_causal_mask import masks

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
    module._unsupported.cache_clear()
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
        ("bfloat16", H, {"dropout": 0.5, "dropout_key": jax.random.key(0)}, "it needs no dropout"),
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
    module._unsupported.cache_clear()

    with pytest.warns(UserWarning, match="it needs an NVIDIA GPU, got 'cpu'"):
        attention(*operands(), causal=True, backend="cudnn")


def test_an_unknown_backend_is_rejected():
    with pytest.raises(ValueError, match="attention backend must be one of plain, pallas, cudnn, got 'flash'"):
        attention(*operands(), causal=True, backend="flash")


# --- our kernel ---

RMS = 1e-3  # of the largest value
LONG = 37  # three tiles of queries and keys, the last ones short


@functools.cache
def by_each(name: str, dtype: str, head_dim: int = 12) -> list[dict[str, Any]]:
    """Outputs and gradients by our kernel, interpreted, and by plain XLA in fp32."""
    from dsmoe_jax.kernels import pallas_attention as pallas

    mask, _, slots = masks(LONG)[name]
    rng = np.random.default_rng(0)
    shapes = ((B, LONG, N, head_dim), (B, K, slots, head_dim), (B, K, slots, head_dim), (B, LONG, N, head_dim))
    *operands, grad = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    positions = pallas.Positions.of(mask, *operands[:2])
    tiles = pallas.Tiles(*(pallas.Tile(16, 16, 4, 2),) * 3)
    found = []
    for function, cast in (
        (lambda q, k, v: pallas.flash_attention(q, k, v, positions, tiles=tiles, interpret=True), dtype),
        (lambda q, k, v: attention(q, k, v, mask, backend="plain"), jnp.float32),
    ):

        @jax.jit
        def both(operands: Any, grad: Any, function: Any = function) -> Any:
            out, pull = jax.vjp(function, *operands)
            return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(grad)), strict=True))

        found.append(both([x.astype(cast) for x in operands], grad.astype(cast)))
    return found


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="jax 0.12 refuses spans beyond an array: widths that are no power of two"
)
@pytest.mark.parametrize("result", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("shared", "float32", FP32), ("cached", "float32", FP32), ("shared", "bfloat16", BF16)],
)
def test_our_kernel_equals_plain_attention(name: str, dtype: str, tolerance: float, result: str):
    """With padding, segments and grouped heads, and for queries after the first keys."""
    got, want = by_each(name, dtype)

    assert got[result].dtype == dtype
    assert_near(got[result], want[result], tolerance)
    rms = np.sqrt(np.mean(np.square(np.asarray(got[result], np.float32) - want[result])))
    assert rms <= RMS * np.abs(want[result]).max()


def test_a_query_without_keys_gets_zeros_and_no_gradient():
    q, k, v, _ = operands(jnp.float32)
    mask = CausalMask(valid=jnp.broadcast_to(jnp.arange(T) > 1, (B, T)))

    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, backend="pallas"), q, k, v)
    dq, dk, dv = pull(jnp.ones_like(out))

    for unmatched in (out[:, :2], dq[:, :2], dk[:, :, :2], dv[:, :, :2]):
        assert not np.any(unmatched)
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


def test_our_kernel_runs_on_the_shards_of_a_mesh():
    q, k, v, _ = operands(jnp.float32)
    documents = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), 12), (B, T))

    def loss(backend: str) -> Any:
        mask = CausalMask(query_segments=documents, key_segments=documents)
        out = lambda q, k, v: attention(q, k, v, mask, backend=backend)  # noqa: E731
        return jax.grad(lambda *x: jnp.sin(out(*x)).sum(), argnums=(0, 1, 2))

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
        program = jax.jit(loss("pallas")).lower(q, k, v).compile()
        got, text = program(q, k, v), program.as_text()

    for one, want in zip(got, loss("plain")(q, k, v), strict=True):
        assert_near(one, want, FP32)
    assert "all-gather" not in (text or "")


def test_uneven_sequences_take_plain_attention():
    q, k, v, _ = operands(jnp.float32)
    module._unsupported.cache_clear()

    with (
        jax.set_mesh(make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])),
        pytest.warns(UserWarning, match="it needs sequences and heads that divide over the mesh"),
    ):
        got = jax.jit(lambda q, k, v: attention(q, k, v, CausalMask(), backend="pallas"))(q, k, v)

    assert_near(got, attention(q, k, v, CausalMask()), FP32)
