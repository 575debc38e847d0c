"""Each layer against the NumPy reference: router, dispatch, rope, norm, attention and the KV cache."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.attention import attention
from dsmoe_jax.kernels.operand import Experts
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.layers.norm import RMSNorm
from dsmoe_jax.layers.rope import rotate, rotation
from dsmoe_jax.layers.router import Router
from dsmoe_jax.layers.sorted_rows import Sorted
from dsmoe_jax.layers.token_dispatcher import routed_experts
from dsmoe_jax.model import DeepSeekMoE, merge, split
from tests.helpers import reference
from tests.helpers.hf_folder import tiny

FP32 = 2e-6  # absolute, on values near 1: a few roundings
LOGITS = 1e-4  # absolute, on logits of rms 1: the rounding of a model in fp32


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# Router


def router(dtype: Any = jnp.float32, **changes: Any) -> Router:
    """A router over 8 experts with two ties: 2 and 5, 0 and 7."""
    layer = Router(tiny(**changes), rngs=nnx.Rngs(0), dtype=dtype)
    weights = np.asarray(normal(8, 32) / 8).copy()
    weights[5], weights[7] = weights[2], weights[0]
    assert layer.weight is not None
    layer.weight[...] = jnp.asarray(weights, dtype)
    return layer


ROUTED = (2, 5, 32)  # a batch of 2, 5 tokens each


@pytest.mark.parametrize("k", [1, 3, 8], ids="k={}".format)
def test_the_router_selects_the_first_k_of_a_stable_sort(k: int):
    layer, x = router(num_experts_per_tok=k), normal(*ROUTED)
    assert layer.weight is not None

    got = layer(x)

    scores = reference.softmax(np.asarray(x, np.float64) @ np.asarray(layer.weight[...], np.float64).T)
    order = np.argsort(-np.asarray(got.scores), axis=-1, kind="stable")[..., :k]
    np.testing.assert_allclose(got.scores, scores, rtol=0, atol=FP32)
    np.testing.assert_array_equal(got.scores[..., 2], got.scores[..., 5])
    np.testing.assert_array_equal(got.ids, order)
    np.testing.assert_array_equal(got.weights, np.take_along_axis(np.asarray(got.scores), order, axis=-1))


def test_scores_sum_to_one_and_top_k_weights_to_less():
    routing = router(num_experts_per_tok=3)(normal(*ROUTED))

    np.testing.assert_allclose(routing.scores.sum(-1), 1, rtol=0, atol=FP32)
    assert routing.weights.sum(-1).max() < 1 - 1e-3


def test_norm_topk_prob_normalizes_the_weights_alone():
    x = normal(*ROUTED)
    raw = router(num_experts_per_tok=3)(x)

    normed = router(num_experts_per_tok=3, norm_topk_prob=True)(x)

    np.testing.assert_array_equal(normed.ids, raw.ids)
    np.testing.assert_array_equal(normed.scores, raw.scores)
    np.testing.assert_allclose(normed.weights, raw.weights / raw.weights.sum(-1, keepdims=True), rtol=0, atol=FP32)


def test_norm_topk_prob_leaves_the_score_of_a_single_expert():
    routing = router(num_experts_per_tok=1, norm_topk_prob=True)(normal(*ROUTED))

    np.testing.assert_array_equal(routing.weights[..., 0], routing.scores.max(-1))


def test_a_bf16_model_routes_in_fp32():
    layer, wide = router(jnp.bfloat16, num_experts_per_tok=3), router(num_experts_per_tok=3)
    assert layer.weight is not None
    assert wide.weight is not None
    wide.weight[...] = layer.weight[...].astype(jnp.float32)
    x = normal(*ROUTED, dtype=jnp.bfloat16)

    routing = layer(x)

    assert layer.weight.dtype == jnp.bfloat16
    assert routing.scores.dtype == routing.weights.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, routing, wide(x.astype(jnp.float32)))


# Dispatch and combine

TOKENS, TOP_K, EXPERTS, WIDTH = 7, 3, 6, 8


@functools.cache
def routed():
    """States, the experts of each token (never expert 4), their weights, and the sorted pairs."""
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation([0, 1, 2, 3, 5])[:TOP_K] for _ in range(TOKENS)])
    ordered = Sorted.by_expert(jnp.asarray(ids, jnp.int32), EXPERTS)
    return normal(TOKENS, WIDTH), ids, jnp.asarray(rng.uniform(size=ids.shape), jnp.float32), ordered


def test_rows_are_sorted_by_expert_then_token():
    _, ids, _, (rows, group_sizes) = routed()

    pairs = [(ids.flat[pair], pair) for pair in rows.pair.tolist()]

    assert pairs == sorted(pairs)
    assert group_sizes.tolist() == [int((ids == e).sum()) for e in range(EXPERTS)]
    assert group_sizes[4] == 0
    np.testing.assert_array_equal(rows.pair[rows.row].reshape(-1), np.arange(TOKENS * TOP_K))


def test_pairs_without_an_expert_come_last_without_a_row():
    _, ids, _, _ = routed()
    ids = np.where(ids < 3, ids, 3)

    rows, group_sizes = Sorted.by_expert(jnp.asarray(ids, jnp.int32), 3)

    assert (ids.reshape(-1)[rows.pair][int(group_sizes.sum()) :] == 3).all()
    np.testing.assert_array_equal(rows.valid, ids < 3)


@pytest.mark.parametrize("size", [1, 4, 21, 30])
def test_windows_contain_every_row_once(size: int):
    _, ids, _, ordered = routed()
    count = -(-TOKENS * TOP_K // size)

    windows = [ordered.window(index, size) for index in range(count)]

    np.testing.assert_array_equal(sum(np.asarray(rows.valid, int) for rows, _ in windows), np.ones_like(ids))
    np.testing.assert_array_equal(sum(sizes for _, sizes in windows), ordered.group_sizes)
    for rows, group_sizes in windows:
        experts = ids.reshape(-1)[rows.pair][: int(group_sizes.sum())]
        np.testing.assert_array_equal(np.bincount(experts, minlength=EXPERTS), group_sizes)
        np.testing.assert_array_equal(
            np.asarray(rows.pair)[np.asarray(rows.row)[rows.valid]], np.arange(ids.size).reshape(ids.shape)[rows.valid]
        )


@pytest.mark.parametrize("size", [1, 3, 21])
def test_slots_contain_every_row_once_on_its_experts_device(size: int):
    _, ids, _, ordered = routed()
    ways, own = 3, EXPERTS // 3

    seen = np.zeros_like(ids)
    for index in range(-(-TOKENS * TOP_K // size)):
        rows, expert = ordered.slots(ways, index, size)
        seen += np.asarray(rows.valid, int)
        by_device = zip(rows.pair.reshape(ways, -1), expert.reshape(ways, -1), strict=True)
        for device, (pairs, experts) in enumerate(by_device):
            taken = np.asarray(experts) < own
            np.testing.assert_array_equal(ids.reshape(-1)[np.asarray(pairs)[taken]], device * own + experts[taken])
        assert int((expert < own).sum()) == int(rows.valid.sum())
        np.testing.assert_array_equal(
            np.asarray(rows.pair)[np.asarray(rows.row)[rows.valid]], np.arange(ids.size).reshape(ids.shape)[rows.valid]
        )

    assert seen.tolist() == np.ones_like(ids).tolist()


def test_combine_returns_each_token_k_times_gathered():
    x, _, weights, (rows, _) = routed()

    np.testing.assert_allclose(rows.combine(rows.gather(x)), TOP_K * x, rtol=0, atol=FP32)
    np.testing.assert_array_equal(rows.gather_weights(weights)[rows.row], weights)


@pytest.mark.parametrize("size", [4, 30])
def test_rows_move_back_by_the_transpose_of_the_gather(size: int):
    x, _, weights, ordered = routed()
    rows = ordered.window(0, size).rows
    used = np.arange(size) < TOKENS * TOP_K  # gradients of unused rows are zeros
    y, y_weights = normal(size, WIDTH) * used[:, None], normal(size) * used

    grads = jax.vjp(rows.gather, x)[1](y)[0], jax.vjp(rows.gather_weights, weights)[1](y_weights)[0]

    want = rows.combine(y), rows.combine_weights(y_weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e1 * FP32), grads, want)


def test_the_backward_pass_scatters_no_floats():
    x, ids, weights, (rows, _) = routed()
    experts = Experts(*(normal(EXPERTS, *shape) for shape in ((4, WIDTH), (4, WIDTH), (WIDTH, 4))))
    routed_sums = lambda x, w: routed_experts(x, jnp.asarray(ids), w, experts, activation="silu")[0]  # noqa: E731

    ours = jax.jit(lambda x, w: jax.vjp(routed_sums, x, w)[1](x)).lower(x, weights).as_text()
    naive = jax.jit(lambda x: jax.vjp(rows.gather, x)[1](rows.gather(x))).lower(x).as_text()

    float_scatter = r"stablehlo\.scatter\"[^^]*\^bb0\(%\w+: tensor<f32>"
    assert re.search(float_scatter, naive)
    assert not re.search(float_scatter, ours)


def test_combine_adds_bf16_rows_in_fp32():
    rows = routed()[3].rows
    y = normal(TOKENS * TOP_K, WIDTH, dtype=jnp.bfloat16)

    got = rows.combine(y)

    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, rows.combine(y.astype(jnp.float32)))


# Rotary positions

ROPES = {
    "plain": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic, short": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 12},
    "dynamic, at the limit": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 10},
    "dynamic, beyond": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 6},
}
LENGTH = 10


def turned(x: jax.Array, positions: Any, config: ModelConfig, length: int = LENGTH) -> jax.Array:
    return rotate(x, rotation(config, jnp.asarray(positions), length, jnp.float32))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_rotates_pairs_like_complex_numbers(rope: str):
    config, x = tiny(**ROPES[rope]), normal(2, LENGTH, 4, 8)
    positions = np.array([np.arange(LENGTH), [0, 0, 1, 2, 5, 5, 9, 40, 3, 7]])

    got = turned(x, positions, config)

    angles = positions[:, :, None] * reference.frequencies(config, LENGTH)
    np.testing.assert_allclose(got, reference.rotate(np.asarray(x), angles), rtol=0, atol=1e1 * FP32)


def test_dynamic_scaling_begins_beyond_the_trained_length():
    x, positions = normal(1, LENGTH, 1, 8), np.arange(LENGTH)[None]

    plain, short, limit, beyond = (
        turned(x, positions, tiny(**changes))
        for changes in ({}, ROPES["dynamic, short"], ROPES["dynamic, at the limit"], ROPES["dynamic, beyond"])
    )

    np.testing.assert_array_equal(short, plain)
    np.testing.assert_array_equal(limit, plain)
    assert np.abs(beyond - plain).max() > 0.1


@pytest.mark.parametrize("rope", ["plain", "linear", "dynamic, beyond"])
def test_scores_depend_on_relative_positions_alone(rope: str):
    config, q, k = tiny(**ROPES[rope]), normal(1, LENGTH, 1, 8), normal(1, LENGTH, 1, 8, seed=1)

    here, there = (
        jnp.einsum("bqnh,bsnh->qs", *(turned(x, shift + np.arange(LENGTH)[None], config) for x in (q, k)))
        for shift in (0, 11)
    )

    np.testing.assert_allclose(here, there, rtol=0, atol=1e1 * FP32)


def test_angles_are_computed_in_fp32_and_rounded_once():
    config, positions = tiny(), jnp.array([[1000]])

    got, wide = (rotation(config, positions, 1001, dtype) for dtype in (jnp.bfloat16, jnp.float32))

    assert got.cos.dtype == got.sin.dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), got, wide)


# RMSNorm


def test_rms_norm_matches_its_formula_with_eps():
    norm, x = RMSNorm(32, eps=0.5, rngs=nnx.Rngs(0)), normal(2, 5, 32)
    norm.weight[...] = normal(32, seed=1)

    got = norm(x)

    want = reference.rms_norm(np.asarray(x, np.float64), np.asarray(norm.weight[...], np.float64), 0.5)
    np.testing.assert_allclose(got, want, rtol=0, atol=FP32)


def test_rms_norm_rounds_to_bf16_before_it_multiplies():
    norm = RMSNorm(32, eps=1e-6, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    weight, x = normal(32, seed=1, dtype=jnp.bfloat16), normal(2, 5, 32, dtype=jnp.bfloat16)
    norm.weight[...] = weight

    got = norm(x)

    wide = np.asarray(x, np.float32)
    unit = jnp.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6))
    cast_first = unit.astype(jnp.bfloat16) * weight[None, None]
    cast_last = (unit * weight.astype(jnp.float32)[None, None]).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, cast_first)
    assert not np.array_equal(cast_first, cast_last)


# Attention

B, T, S, H = 2, 5, 9, 8
scaled_dot_product = jax.jit(attention, static_argnames=("causal", "dropout"))


def by_head(x: jax.Array) -> jax.Array:
    """[B, S, K, H] to the kernel's [B, K, S, H]."""
    return x.transpose(0, 2, 1, 3)


def queries_keys_values(heads: int = 4, kv_heads: int = 4) -> tuple[jax.Array, ...]:
    return normal(B, T, heads, H), normal(B, S, kv_heads, H, seed=1), normal(B, S, kv_heads, H, seed=2)


def causal_with_padding() -> np.ndarray:
    """Queries are the last 5 of 9; sequence 0 is left-padded, sequence 1 right-padded."""
    mask = np.tril(np.ones((T, S), bool), k=S - T)
    padding = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    return mask[None] & padding[:, None]


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_attention_matches_the_reference_per_head(kv_heads: int):
    q, k, v = queries_keys_values(kv_heads=kv_heads)
    mask = causal_with_padding()

    got = scaled_dot_product(q, by_head(k), by_head(v), jnp.asarray(mask))

    want = reference.attention(*(np.asarray(x, np.float64) for x in (q, k, v)), mask=mask)
    np.testing.assert_allclose(got, want, rtol=0, atol=FP32)


def test_masked_keys_do_not_change_the_output():
    q, k, v = queries_keys_values()
    mask = causal_with_padding()
    unread = np.flatnonzero(~mask[0].any(axis=0))

    got = scaled_dot_product(q, by_head(k), by_head(v), jnp.asarray(mask))

    k, v = (x.at[0, unread].set(1e4) for x in (k, v))
    np.testing.assert_array_equal(got[0], scaled_dot_product(q, by_head(k), by_head(v), jnp.asarray(mask))[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
def test_a_fully_masked_query_is_finite_with_its_gradients(dtype: Any):
    q, k, v = (x.astype(dtype) for x in queries_keys_values())
    mask = jnp.asarray(causal_with_padding()).at[0, 2].set(False)

    out = scaled_dot_product(q, by_head(k), by_head(v), mask)
    grads = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, mask).astype(jnp.float32).sum(), argnums=(0, 1, 2)))(
        q, by_head(k), by_head(v)
    )

    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, *grads))
    if dtype == jnp.float32:
        np.testing.assert_allclose(out[0, 2], v[0].mean(axis=0), rtol=0, atol=FP32)


@pytest.mark.parametrize("tokens", [5, 64, 150])
def test_chunked_causal_attention_equals_the_full_mask(tokens: int):
    q, k, v = (normal(B, tokens, heads, H, seed=heads) for heads in (4, 2, 2))
    valid = np.arange(tokens)[None] < np.array([[tokens], [tokens - 2]])
    mask = jnp.asarray(np.tril(np.ones((tokens, tokens), bool))[None] & valid[:, None])

    def with_gradients(causal: bool) -> Any:
        out = lambda q, k, v: attention(q, by_head(k), by_head(v), mask, causal=causal)  # noqa: E731
        return jax.jit(lambda *x: (out(*x), jax.grad(lambda *x: jnp.sin(out(*x)).sum(), argnums=(0, 1, 2))(*x)))

    got, want = with_gradients(causal=True)(q, k, v), with_gradients(causal=False)(q, k, v)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=FP32, atol=FP32), got, want)


def test_without_a_key_there_is_no_dropout():
    q, k, v = queries_keys_values()
    mask = jnp.asarray(causal_with_padding())

    got = scaled_dot_product(q, by_head(k), by_head(v), mask, dropout=0.5)

    np.testing.assert_array_equal(got, scaled_dot_product(q, by_head(k), by_head(v), mask))


def test_dropout_drops_its_rate_and_scales_the_rest():
    """With equal scores and one-hot values the output equals the probabilities."""
    rate, keys = 0.25, 512
    q, k = jnp.zeros((1, 64, 1, keys)), jnp.zeros((1, 1, keys, keys))
    mask = jnp.ones((1, 64, keys), bool)

    out = scaled_dot_product(q, k, jnp.eye(keys)[None, None], mask, dropout=rate, dropout_key=jax.random.key(0))

    dropped = np.asarray(out == 0)
    deviation = (rate * (1 - rate) / dropped.size) ** 0.5
    assert abs(dropped.mean() - rate) < 5 * deviation
    np.testing.assert_allclose(out[~dropped], 1 / keys / (1 - rate), rtol=1e-5)


# The KV cache


@functools.cache
def cached_model(rope: str) -> tuple[DeepSeekMoE, Any, Any]:
    """A model and its jitted cached forward, compiled once per chunk length."""
    model = reference.random_model(tiny(**ROPES[rope]))
    graph, params = split(model)

    @jax.jit
    def read(ids, mask, cache):
        model = merge(graph, params)
        hidden = model.hidden(ids, mask, cache=cache)
        return model.logits(hidden.last_hidden_state), hidden.cache

    return model, read, params


IDS = np.random.default_rng(3).integers(0, 64, (2, 8))
SLOTS = 12  # padding needs slots as well


@pytest.mark.parametrize("rope", ["plain", "linear"])
@pytest.mark.parametrize("chunks", [(4, 4), (4, 1, 1, 1, 1), (1, 4, 1, 1, 1)], ids=str)
def test_chunked_prefill_and_decode_equal_one_forward(chunks: tuple[int, ...], rope: str):
    model, read, _ = cached_model(rope)
    cache, logits, start = KVCache.empty(model.config, 2, SLOTS), [], 0

    for length in chunks:
        ids = jnp.asarray(IDS[:, start : start + length], jnp.int32)
        out, cache = read(ids, jnp.ones_like(ids), cache)
        logits.append(out)
        start += length

    np.testing.assert_allclose(np.concatenate(logits, 1), reference.forward(model, IDS).logits, rtol=0, atol=LOGITS)
    assert cache.lengths.tolist() == [8, 8]


@pytest.mark.parametrize("rope", ["plain", "linear"])
def test_sequences_of_different_lengths_continue_in_the_cache(rope: str):
    """Chunks are right-padded; sequence 0 has 2, 4 and 1 tokens, sequence 1 has 4, 1 and 1."""
    model, read, _ = cached_model(rope)
    cache = KVCache.empty(model.config, 2, SLOTS)
    valid = [(2, 4), (4, 1), (1, 1)]
    logits: list[list[np.ndarray]] = [[], []]
    done = [0, 0]

    for width, counts in zip((4, 4, 1), valid, strict=True):
        ids, mask = np.full((2, width), 63), np.arange(width) < np.array(counts)[:, None]
        for row, count in enumerate(counts):
            ids[row, :count] = IDS[row, done[row] : done[row] + count]
            done[row] += count
        out, cache = read(jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32), cache)
        for row, count in enumerate(counts):
            logits[row].append(np.asarray(out[row, :count]))

    assert cache.lengths.tolist() == done == [7, 6]
    want = reference.forward(model, IDS).logits
    for row in range(2):
        np.testing.assert_allclose(np.concatenate(logits[row]), want[row, : done[row]], rtol=0, atol=LOGITS)


def test_prefill_of_an_empty_cache_equals_writing_by_slot():
    """`prefill=True` asserts an empty cache and skips reading it; sequences of 4 and 2 tokens, right-padded."""
    model, read, params = cached_model("plain")
    graph = split(model)[0]
    ids, mask = jnp.asarray(IDS[:, :4], jnp.int32), jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
    slow_logits, slow = read(ids, mask, KVCache.empty(model.config, 2, SLOTS))

    @jax.jit
    def fill(params, ids, mask):
        model = merge(graph, params)
        hidden = model.hidden(ids, mask, cache=KVCache.empty(model.config, 2, SLOTS), prefill=True)
        return model.logits(hidden.last_hidden_state), hidden.cache

    logits, cache = fill(params, ids, mask)

    assert cache.lengths.tolist() == slow.lengths.tolist() == [4, 2]
    for row, count in enumerate([4, 2]):
        np.testing.assert_allclose(logits[row, :count], slow_logits[row, :count], rtol=0, atol=LOGITS)
        for layer, slow_layer in zip(cache.layers, slow.layers, strict=True):
            for got, want in zip(jax.tree.leaves(layer), jax.tree.leaves(slow_layer), strict=True):
                got, want = (x.reshape(2, -1, *x.shape[1:])[row, :, :count] for x in (got, want))
                np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS)
