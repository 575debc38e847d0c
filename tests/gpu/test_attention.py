"""Attention on a GPU, by every backend: equal to its reference, and block-diagonal for packed documents.

Start at `test_packed_documents_are_independent`. cuDNN supports full sequences in half precision only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels.attention import CausalMask, attention
from dsmoe_jax.model import merge, split
from tests.helpers import golden, reference
from tests.helpers.conformance import assert_near

B, T, N, K, H = 2, 150, 4, 2, 16  # three chunks of queries, the last one short; two query heads read one of keys
LENGTHS = (70, 1, 59)  # of the documents of a row; then padding

FP32 = 1e-5  # of the largest value: sums of up to 150 products, in another order
BF16 = 2e-2  # of the largest value: probabilities and results are rounded, eps is 0.0078
STATES = 1e-5  # absolute, of states of rms 1

every_dtype = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("plain", "float32", FP32), ("plain", "bfloat16", BF16), ("cudnn", "bfloat16", BF16)],
)


def skip_without(backend: str) -> None:
    if backend == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")


def operands(dtype: str, seed: int = 0) -> list[jax.Array]:
    """Queries, keys, values and a gradient."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, K, T, H), (B, K, T, H), (B, T, N, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents() -> np.ndarray:
    """The document of each token [T], 0 for padding."""
    return np.repeat([1, 2, 3, 0], [*LENGTHS, T - sum(LENGTHS)])


def packed() -> jax.Array:
    """The attention mask [B, T, T]; the second sequence is one document."""
    causal, of = np.tri(T, dtype=bool), documents()
    return jnp.asarray(np.stack([causal & (of[:, None] == of[None, :]), causal]))


@functools.cache
def program(causal: bool = True, backend: str = "plain"):
    """(output, gradients of queries, keys and values) of (queries, keys, values, gradient, mask)."""

    def run(q: Any, k: Any, v: Any, grad: Any, mask: Any):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, causal=causal, backend=backend), q, k, v)
        return out, pull(grad)

    return jax.jit(run)


@every_dtype
@pytest.mark.parametrize("causal", [True, False], ids="causal={}".format)
def test_attention_equals_the_reference(causal: bool, backend: str, dtype: str, tolerance: float):
    skip_without(backend)
    q, k, v, grad = operands(dtype)

    out, _ = program(causal, backend)(q, k, v, grad, packed())

    q, k, v = (np.asarray(x, np.float64) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))
    assert out.dtype == dtype
    assert_near(out, reference.attention(q, k, v, np.asarray(packed())), tolerance)


@every_dtype
def test_gradients_equal_those_of_the_cpu_in_fp32(backend: str, dtype: str, tolerance: float, cpu: Any):
    skip_without(backend)
    given = operands(dtype)
    exact = jax.device_put([x.astype(jnp.float32) for x in given], cpu)

    _, grads = program(backend=backend)(*given, packed())

    _, wants = program()(*exact, jax.device_put(packed(), cpu))
    for got, want, name in zip(grads, wants, "qkv", strict=True):
        assert_near(got, want, tolerance, name)


@every_dtype
def test_packed_documents_are_independent(backend: str, dtype: str, tolerance: float):
    """Bit for bit: probabilities across documents are exactly zero."""
    del tolerance
    skip_without(backend)
    of = jnp.asarray(documents())
    same, other = operands(dtype), operands(dtype, seed=1)
    mine = of == 3
    by_query, by_key = mine[None, :, None, None], mine[None, None, :, None]
    changed = [
        jnp.where(here, one, 100 * two)
        for here, one, two in zip((by_query, by_key, by_key), same[:3], other[:3], strict=True)
    ]
    grad = jnp.where(by_query, same[3], 0)

    read = program(backend=backend)
    (out, grads), (again, _) = (read(*operands, grad, packed()) for operands in (same[:3], changed))

    np.testing.assert_array_equal(out[0, mine], again[0, mine])
    for by_token in (grads[0][0], grads[1][0].swapaxes(0, 1), grads[2][0].swapaxes(0, 1)):
        assert not np.any(by_token[~mine])
        assert np.any(by_token[mine])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FP32), ("bfloat16", BF16)])
def test_our_kernel_equals_plain_attention_of_the_cpu(dtype: str, tolerance: float, cpu: Any):
    """Packed documents, grouped heads, a short last tile."""
    *given, grad = operands(dtype)
    segments = jnp.asarray(np.stack([documents(), np.zeros(T, np.int64)]), jnp.int32)

    def run(backend: str, given: Any, grad: Any, segments: Any) -> Any:
        mask = CausalMask(query_segments=segments, key_segments=segments)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, backend=backend), *given)
        return out, *pull(grad)

    got = jax.jit(functools.partial(run, "pallas"))(given, grad, segments)

    exact = jax.device_put(([x.astype(jnp.float32) for x in given], grad.astype(jnp.float32), segments), cpu)
    for one, want, name in zip(got, jax.jit(functools.partial(run, "plain"))(*exact), ("out", *"qkv"), strict=True):
        assert_near(one, want, tolerance, name)


def test_a_model_treats_packed_documents_separately():
    model = golden.model("a_baseline")
    graph, params = split(model)
    lengths = (9, 1, 14)
    ids = jnp.asarray(golden.tensors("a_baseline")["in.input_ids"])  # [2, 24]
    segments = jnp.broadcast_to(jnp.repeat(jnp.arange(1, 4), jnp.array(lengths)), ids.shape)
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(length) for length in lengths]), ids.shape)
    ends = np.cumsum(lengths)
    # Each document alone in its row, padding to its right.
    alone = np.zeros((3 * len(ids), max(lengths)), np.int32)
    for n, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        alone[n :: len(lengths), :length] = ids[:, end - length : end]

    @jax.jit
    def read(params: Any, ids: Any, segments: Any, positions: Any):
        return merge(graph, params).hidden(ids, segment_ids=segments, position_ids=positions).last_hidden_state

    got = read(params, ids, segments, positions)
    want = read(params, jnp.asarray(alone), None, None)

    for n, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        np.testing.assert_allclose(got[:, end - length : end], want[n::3, :length], rtol=0, atol=STATES)
