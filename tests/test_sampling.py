"""Sampling: probabilities, thresholds, penalties, log-probabilities and validation of `SamplingParams`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.generate import sampling
from dsmoe_jax.generate.sampling import PenaltyState, Sampler, log_probabilities, penalty_arrays, sample_tokens
from dsmoe_jax.generate.sampling_params import BOUNDS, SamplingParams

heaviest = jax.jit(sampling._heaviest)
DRAWS = 4000
FAR = 3.7  # standard deviations: exceeded by chance once in ten thousand tests
LOGITS = np.random.default_rng(0).normal(size=12) * 1.5
PROMPT, OUTPUT = [1, 4, 4, 7], [4, 4, 9, 2, 2, 2]


def state_of(params: SamplingParams, vocab_size: int, prompt: list[int], output: list[int]) -> PenaltyState:
    """Return the state of one row after these output tokens."""
    ids = np.array([*prompt, 0, 3, 5], np.int32)  # padding, which must not count
    state = PenaltyState.empty(1, vocab_size).reset_row(
        0, jnp.asarray(ids), len(prompt), *map(jnp.asarray, penalty_arrays(params))
    )
    for token in output:
        state = state.add_tokens(jnp.array([token]), jnp.array([True]))
    return state


def draws(
    logits: np.ndarray,
    params: SamplingParams,
    state: PenaltyState | None = None,
    *,
    seed: int | None = None,
    index: int = 0,
) -> np.ndarray:
    """Return the tokens of DRAWS steps of one row."""
    sampler = Sampler.of([(params, seed or params.seed or 0, index)], logits.size)
    return np.asarray(_draws(jnp.asarray(logits, jnp.float32)[None], sampler, state))


@jax.jit
def _draws(logits: jax.Array, sampler: Sampler | None, state: PenaltyState | None) -> jax.Array:
    return jax.vmap(lambda drawn: sample_tokens(logits, sampler, state, drawn[None])[0])(jnp.arange(DRAWS))


def expected_logits(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Steps 1 to 3 per token, as documented by SamplingParams."""
    adjusted = []
    for token, logit in enumerate(logits.astype(float)):
        logit += dict(params.logit_bias or ()).get(token, 0)
        if token in prompt or token in output:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        if token in output:
            logit -= params.presence_penalty
        adjusted.append(logit - params.frequency_penalty * output.count(token))
    return adjusted


def expected_probabilities(logits: list[float], params: SamplingParams) -> np.ndarray:
    """Steps 4 to 8 per token."""
    scaled = [logit / params.temperature for logit in logits]
    probs = {token: np.exp(x - max(scaled)) for token, x in enumerate(scaled)}
    ranked = sorted(probs, key=lambda token: -probs[token])
    kept = ranked[: params.top_k]
    total, nucleus, reached = sum(probs[token] for token in kept), [], 0.0
    for token in kept:
        if reached < params.top_p * total:
            nucleus.append(token)
        reached += probs[token]
    kept = [token for token in nucleus if probs[token] >= params.min_p * probs[ranked[0]]]
    out = np.zeros(len(logits))
    out[kept] = [probs[token] for token in kept]
    return out / out.sum()


def assert_drawn_from(counts: np.ndarray, want: np.ndarray) -> None:
    assert counts[want == 0].sum() == 0
    likely = want > 0
    chi_square = ((counts[likely] - DRAWS * want[likely]) ** 2 / (DRAWS * want[likely])).sum()
    # Wilson and Hilferty (1931): the cube root of chi-square over its degrees of freedom is close to normal.
    freedom = max(likely.sum() - 1, 1)
    assert chi_square <= freedom * (1 - 2 / (9 * freedom) + FAR * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 12},
        {"top_k": 500},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 0.5},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.95, "min_p": 0.15},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"logit_bias": {0: 2.0, 5: -100.0, 11: 0.7}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {4: 3, 7: -1.5}},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "logit_bias": {4: 2}},
    ],
    ids=str,
)
def test_samples_follow_the_expected_probabilities(fields: dict[str, Any], request: pytest.FixtureRequest):
    params = SamplingParams(**{"temperature": 1.0, "seed": len(request.node.name), **fields})
    state = state_of(params, 12, PROMPT, OUTPUT) if params.adjusts_logits else None
    want = expected_probabilities(expected_logits(LOGITS, params, PROMPT, OUTPUT), params)

    counts = np.bincount(draws(LOGITS, params, state), minlength=12)

    assert_drawn_from(counts, want)


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = np.array([1.0, 1e4, 9.9e3])

    for temperature in (1e-5, 1e-30, 1e-42, 1e-300):
        assert set(draws(logits, SamplingParams(temperature=temperature, top_k=2, top_p=0.9))) == {1}


def test_greedy_takes_the_first_argmax_after_penalties():
    params = SamplingParams(repetition_penalty=10.0)
    logits = np.array([1.0, 5.0, 3.0, 3.0, -2.0])

    free = sample_tokens(jnp.asarray(logits)[None], None, None, jnp.zeros(1, jnp.int32))
    penalized = sample_tokens(jnp.asarray(logits)[None], None, state_of(params, 5, [1], []), jnp.zeros(1, jnp.int32))

    assert (free.tolist(), penalized.tolist()) == ([1], [2])


def test_greedy_and_sampled_rows_share_a_batch():
    hot = SamplingParams(temperature=1.0)
    rows = [(None, 0, 0), (hot, 3, 0), (SamplingParams(top_k=1, top_p=0.1), 0, 0)]
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (3, 1))
    sampler = Sampler.of(rows, 12)

    tokens = jax.vmap(lambda drawn: sample_tokens(logits, sampler, None, jnp.full(3, drawn)))(jnp.arange(DRAWS))

    assert set(np.asarray(tokens)[:, [0, 2]].flat) == {LOGITS.argmax()}
    assert_drawn_from(np.bincount(tokens[:, 1], minlength=12), expected_probabilities(list(LOGITS), hot))
    assert Sampler.of([rows[0], rows[2]], 12) is None
    # Filters of greedy rows do not make the others search for a threshold.
    assert sampler is not None
    assert (sampler.top_k == 12).all()
    assert (sampler.top_p == 1).all()


def test_sample_does_not_depend_on_the_batch():
    fields: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]
    params = [SamplingParams(temperature=1.2, **more) for more in fields]
    rows = [(p, 100 + i, i % 2) for i, p in enumerate(params)] + [(None, 0, 0)]
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 300)), jnp.float32)
    drawn = jnp.array([0, 7, 3, 1_000_000, 2])

    def batch(order: list[int]) -> list[int]:
        sampler = Sampler.of([rows[i] for i in order], 300)
        where = jnp.array(order)
        return jax.jit(sample_tokens)(logits[where], sampler, None, drawn[where]).tolist()

    together = batch([0, 1, 2, 3, 4])

    assert batch([4, 2, 0, 3, 1, 0]) == [together[i] for i in (4, 2, 0, 3, 1, 0)]
    assert [batch([i])[0] for i in range(5)] == together


def test_seed_index_and_position_change_the_sample():
    params = SamplingParams(temperature=1.0)
    base = draws(LOGITS, params, seed=1)

    others = [draws(LOGITS, params, seed=seed, index=index) for seed, index in ((2, 0), ((1 << 31) + 1, 0), (1, 1))]

    assert (base == draws(LOGITS, params, seed=1)).all()
    by_chance = (expected_probabilities(list(LOGITS), params) ** 2).sum()
    for other in [*others, np.roll(base, 1)]:
        assert abs((base == other).mean() - by_chance) < 5 * np.sqrt(0.25 / DRAWS)


def test_disabled_filters_change_no_bit():
    logits = np.random.default_rng(2).normal(size=1000) * 20
    plain = SamplingParams(temperature=1.0, seed=4)
    # The other row enables every filter, so that none is skipped.
    filtered = SamplingParams(temperature=1.0, top_k=5, top_p=0.5, min_p=0.3)
    sampler = Sampler.of([(plain, 4, 0), (filtered, 4, 0)], 1000)
    both = jnp.tile(jnp.asarray(logits, jnp.float32), (2, 1))

    empty = PenaltyState.empty(2, 1000)
    step = lambda drawn: sample_tokens(both, sampler, empty, jnp.full(2, drawn))[0]  # noqa: E731
    sampled = jax.jit(jax.vmap(step))(jnp.arange(50))

    assert np.asarray(sampled).tolist() == draws(logits, plain)[:50].tolist()
    assert (PenaltyState.empty(2, 1000).apply(both) == both).all()
    # Even tokens whose probability underflows float32 are not dropped.
    assert sampler is not None
    assert jnp.isfinite(sampling._filter_logits(20 * both, sampler)[0]).all()


def test_half_precision_logits_are_sampled_in_fp32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)[None]
    sampler = Sampler.of([(SamplingParams(temperature=0.7), 1, 0)], 12)

    half, full = (_draws(x, sampler, None) for x in (logits, logits.astype(jnp.float32)))

    assert half.tolist() == full.tolist()
    assert PenaltyState.empty(1, 12).apply(logits).dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_logits_give_a_token_of_the_vocabulary(bad: float):
    logits = np.full(8, bad)

    assert 0 <= int(sample_tokens(jnp.asarray(logits)[None], None, None, jnp.array([0]))[0]) < 8
    assert set(draws(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.5))) <= set(range(8))


@pytest.mark.parametrize("seed", range(20))
def test_threshold_matches_sorting(seed: int):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=200) * 10.0 ** rng.integers(-20, 20)
    x[rng.random(200) < 0.2] = -np.inf
    x[rng.random(200) < 0.3] = rng.choice(x, 1)  # ties
    x[rng.random(200) < 0.1] = 0.0
    x[rng.random(200) < 0.1] = -0.0
    x = x.astype(np.float32)
    weight = rng.integers(0, 5, size=200)
    weight[x.argmax()] = 1
    ranked = np.sort(x)[::-1]

    for need in (1, 2, 7, 100, 199, 200):
        by_count = heaviest(jnp.asarray(x)[None], jnp.ones((1, 200), int), jnp.array([need]))
        assert np.asarray(by_count)[0].tolist() == (x >= ranked[need - 1]).tolist()

    for need in (1, int(weight.sum() // 2), int(weight.sum())):
        by_weight = heaviest(jnp.asarray(x)[None], jnp.asarray(weight)[None], jnp.array([need]))
        highest = max(t for t in x if weight[x >= t].sum() >= need)
        assert np.asarray(by_weight)[0].tolist() == (x >= highest).tolist()

    too_much = heaviest(jnp.asarray(x)[None], jnp.asarray(weight)[None], jnp.array([10_000]))
    assert np.asarray(too_much).all()


def test_threshold_separates_adjacent_floats():
    bits = np.arange(-8, 8, dtype=np.int32)
    x = np.concatenate([(np.float32(value).view(np.int32) + bits).view(np.float32) for value in (-3.0, 7e-5, 1e30)])

    for need in range(1, x.size + 1):
        kept = heaviest(jnp.asarray(x)[None], jnp.ones((1, x.size), int), jnp.array([need]))
        assert kept.sum() == need
        assert x[np.asarray(kept)[0]].min() == np.sort(x)[-need]


def test_every_row_has_its_own_threshold():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 50)), jnp.float32)

    kept = heaviest(x, jnp.ones(x.shape, jnp.int32), jnp.array([1, 5, 50, 20, 2]))

    assert kept.sum(axis=1).tolist() == [1, 5, 50, 20, 2]


def test_ties_at_the_threshold_are_kept():
    logits = np.array([2.0, 1.0, 1.0, 1.0, 0.0])

    assert set(draws(logits, SamplingParams(temperature=1.0, top_k=2))) == {0, 1, 2, 3}
    assert set(draws(logits, SamplingParams(temperature=1.0, top_p=0.5))) == {0, 1, 2, 3}


def test_reset_row_changes_no_other_row():
    old = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={3: 9.0})
    state = PenaltyState.empty(3, 6)
    take = jax.jit(lambda state, row, ids, count, *rest: state.reset_row(row, ids, count, *rest))
    for row in range(3):
        state = take(state, row, jnp.array([1, 2, 0]), 2, *penalty_arrays(old))
        state = state.add_tokens(jnp.array([4, 4, 4]), jnp.array([True] * 3))
    before = jax.tree.map(np.asarray, state)

    state = take(state, 1, jnp.array([5, 1, 1]), 1, *penalty_arrays(SamplingParams()))

    fresh = PenaltyState.empty(3, 6).reset_row(
        1, jnp.array([5]), 1, *map(jnp.asarray, penalty_arrays(SamplingParams()))
    )
    for now, was, new in zip(state, before, fresh, strict=True):
        assert np.asarray(now)[1].tolist() == np.asarray(new)[1].tolist()
        assert np.asarray(now)[[0, 2]].tolist() == was[[0, 2]].tolist()
    assert np.asarray(state.prompt_mask)[1].nonzero()[0].tolist() == [5]
    assert take._cache_size() == 1  # type: ignore[attr-defined]


def test_add_tokens_counts_active_rows_only():
    state = PenaltyState.empty(3, 4)

    for active in ([True, False, True], [True, False, False]):
        state = state.add_tokens(jnp.array([2, 2, 0]), jnp.array(active))

    assert state.output_counts.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_take_gathers_rows_in_any_order():
    params = SamplingParams(presence_penalty=1.0)
    state = PenaltyState.empty(3, 4).reset_row(2, jnp.array([1]), 1, *map(jnp.asarray, penalty_arrays(params)))

    gathered = state.take(jnp.array([2, 0, 2, 2]))

    assert gathered.prompt_mask[:, 1].tolist() == [True, False, True, True]
    assert gathered.presence.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_maximum_number_of_biases_fits():
    biases = {token: token / 10 - 15 for token in range(300)}

    state = state_of(SamplingParams(logit_bias=biases), 320, [0], [])

    np.testing.assert_allclose(state.bias[0, :300], list(biases.values()), rtol=1e-6)
    assert not state.bias[0, 300:].any()


def test_log_probabilities_match_log_softmax():
    logits = np.random.default_rng(3).normal(size=(2, 40)) * 3
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    token = np.array([5, 17])

    found = log_probabilities(jnp.asarray(logits, jnp.float32), jnp.asarray(token), 4)

    ranked = np.argsort(-logits, axis=1)[:, :4]
    np.testing.assert_allclose(found.token, exact[[0, 1], token], rtol=1e-5)
    np.testing.assert_allclose(found.top, np.take_along_axis(exact, ranked, axis=1), rtol=1e-5)
    assert found.top_ids.tolist() == ranked.tolist()


def test_log_probability_of_the_token_alone():
    found = log_probabilities(jnp.zeros((3, 10)), jnp.array([0, 1, 2]), 0)

    assert found.top.shape == found.top_ids.shape == (3, 0)
    np.testing.assert_allclose(found.token, -np.log(10), rtol=1e-6)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens must be in \[1, 16777216\], got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an int, got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int, got True"),
        ({"temperature": -0.1}, r"temperature must be in \[0, 1000\], got -0.1"),
        ({"temperature": NAN}, "temperature must be in .*, got nan"),
        ({"temperature": INF}, "temperature must be in .*, got inf"),
        ({"temperature": False}, "temperature must be a number, got False"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": 10**400}, r"temperature must be in \[0, 1000\], got 1000000"),
        ({"temperature": np.zeros((40, 40))}, "temperature must be a number, got array"),
        ({"top_k": -2}, r"top_k must be in \[1, 16777216\], got -2"),
        ({"top_k": False}, "top_k must be an int or None, got False"),
        ({"top_k": "5"}, "top_k must be an int or None, got '5'"),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\], got -0.1"),
        ({"top_p": 1.1}, "top_p must be in .*, got 1.1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.01}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in .*, got 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be in"),
        ({"presence_penalty": 2.5}, r"presence_penalty must be in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": -2.5}, r"frequency_penalty must be in \[-2, 2\], got -2.5"),
        ({"logit_bias": {-1: 1.0}}, r"token id in logit_bias must be in \[0, 2147483647\], got -1"),
        ({"logit_bias": {"7": 1.0}}, "token id in logit_bias must be an int, got '7'"),
        ({"logit_bias": {7: 101.0}}, r"logit_bias\[7\] must be in \[-100, 100\], got 101.0"),
        ({"logit_bias": {7: NAN}}, r"logit_bias\[7\] must be in .*, got nan"),
        ({"logit_bias": {7: None}}, r"logit_bias\[7\] must be a number, got None"),
        ({"logit_bias": [1, 2]}, r"logit_bias must map token ids to numbers, got \[1, 2\]"),
        ({"logit_bias": "text"}, "logit_bias must map token ids to numbers, got 'text'"),
        ({"logit_bias": 0}, "logit_bias must map token ids to numbers, got 0"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias must have at most 300 entries, got 301"),
        ({"seed": -2}, "seed must be in .*, got -2"),
        ({"seed": 1 << 32}, "seed must be in .*, got 4294967296"),
        ({"seed": 1.0}, "seed must be an int or None, got 1.0"),
        ({"stop": ""}, "stop must not contain an empty string"),
        ({"stop": ["a", ""]}, "stop must not contain an empty string"),
        ({"stop": [1]}, r"stop must be a string or a list of strings, got \[1\]"),
        ({"stop": b"x"}, "stop must be a string or a list of strings"),
        ({"stop": ["x"] * 65}, "stop must have at most 64 strings, got 65"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids, got 3"),
        ({"stop_token_ids": [1, -2]}, "token id in stop_token_ids must be in .*, got -2"),
        ({"stop_token_ids": ["a\nb"]}, "token id in stop_token_ids must be an int"),
        ({"n": 0}, r"n must be in \[1, 1024\], got 0"),
        ({"n": 1025}, r"n must be in \[1, 1024\], got 1025"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"logprobs": 21}, r"logprobs must be in \[0, 20\], got 21"),
        ({"logprobs": True}, "logprobs must be an int or None, got True"),
        ({"topk": 5}, "unknown sampling parameter 'topk'; did you mean 'top_k'?"),
        ({"max_tokens": 0}, r"max_tokens must be in \[1, 16777216\], got 0"),
        (
            {"max_tokens": 5, "max_new_tokens": 128},
            "max_new_tokens and its alias max_tokens must be equal, got 128 and 5",
        ),
        ({"zebra": 5}, "unknown sampling parameter 'zebra'; allowed: max_new_tokens, temperature, top_k, "),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_invalid_parameter_is_rejected_in_one_line(fields: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=f"^{reason}") as refused:
        SamplingParams(**fields)

    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_every_number_has_a_bound():
    others = {"logit_bias", "stop", "stop_token_ids", "ignore_eos"}

    assert {field.name for field in dataclasses.fields(SamplingParams)} == BOUNDS.keys() | others


def test_bounds_are_inclusive():
    for name, bound in BOUNDS.items():
        for value in [bound.low, bound.high, *([None] if bound.optional else [])]:
            assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_none_means_the_default(name: str):
    fields: dict[str, Any] = {name: None}
    assert SamplingParams(**fields) == SamplingParams()


def test_max_tokens_is_an_alias_of_max_new_tokens():
    params = SamplingParams(max_tokens=5)

    assert params == SamplingParams(max_new_tokens=5) == SamplingParams(max_new_tokens=5, max_tokens=5)
    assert dataclasses.replace(params, max_new_tokens=6) == SamplingParams(max_tokens=6)
    none: Any = None
    assert SamplingParams(max_tokens=none).max_new_tokens == 128


@pytest.mark.parametrize("fields", [{"top_k": 0}, {"top_k": -1}, {"top_k": np.int64(-1)}, {"seed": -1}], ids=str)
def test_disabling_values_mean_none(fields: dict[str, Any]):
    assert SamplingParams(**fields) == SamplingParams()


@pytest.mark.parametrize("top_p", [0, 1e-9, 1e-300])
def test_top_p_near_zero_is_greedy(top_p: float):
    assert set(draws(LOGITS, SamplingParams(temperature=2.0, top_p=top_p))) == {int(LOGITS.argmax())}


def test_values_are_stored_in_canonical_form():
    one: dict[str, Any] = {"temperature": 1, "top_k": np.int64(3), "logit_bias": {9: 1, 2: np.float32(-0.5)}}
    other: dict[str, Any] = {"temperature": 1.0, "top_k": 3, "logit_bias": [(2, -0.5), (9, 1.0)]}

    first = SamplingParams(**one, stop="x", stop_token_ids=[4, 5])
    second = SamplingParams(**other, stop=["x"], stop_token_ids=(4, 5))

    assert first == second
    assert len({first, second, dataclasses.replace(first)}) == 1
    assert first.logit_bias == ((2, -0.5), (9, 1.0))
    assert SamplingParams(logit_bias={}) == SamplingParams(logit_bias=None) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "adjusts"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_k": 4}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": {0: 1.0}}, True),
    ],
)
def test_adjusts_logits_only_with_biases_or_penalties(fields: dict[str, Any], adjusts: bool):
    assert SamplingParams(**fields).adjusts_logits is adjusts


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_token_outside_the_vocabulary_is_rejected(name: str):
    fields: dict[str, Any] = {name: {99: 1.0, 100: 1.0} if name == "logit_bias" else [100, 99]}
    params = SamplingParams(**fields)

    params.check_vocabulary(101)
    with pytest.raises(ValueError, match=f"^{name}: token 100 is outside the vocabulary of 100$"):
        params.check_vocabulary(100)
