"""Scoring and perplexity against the logits of one unbatched pair at a time."""

import contextlib
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig, RopeScaling
from dsmoe_jax.generate import Generator, scoring
from dsmoe_jax.generate.prefix_cache import PrefixCache
from dsmoe_jax.generate.programs import bucket
from dsmoe_jax.generate.request import Stats
from dsmoe_jax.generate.score_plan import Batch, Pair, Row
from dsmoe_jax.generate.scoring import Perplexity, Score, perplexity, rolling_windows, score
from dsmoe_jax.model import DeepSeekMoE, split
from tests.helpers import golden, small
from tests.helpers.few_shot import questions
from tests.helpers.meshes import MESHES

pytestmark = pytest.mark.heavy

SMALL = dataclasses.replace(small.SMALL, vocab_size=320)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # fp32, different summation order
DYNAMIC = dataclasses.replace(SMALL, max_position_embeddings=20, rope_scaling=RopeScaling("dynamic", 2.0))

Ids = tuple[list[int], list[int]]


@functools.cache
def model_of(config: ModelConfig) -> DeepSeekMoE:
    return DeepSeekMoE.init(config, seed=2)


def scored(model: DeepSeekMoE, pairs: list[Ids], *, context_length: int = 256, **options) -> list[Score]:
    return score(*split(model), model.config, pairs, context_length=context_length, **options)


def measured(model: DeepSeekMoE, tokens: list[int], *, context_length: int = 256, **options) -> Perplexity:
    return perplexity(*split(model), model.config, tokens, context_length=context_length, **options)


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def twin(model: DeepSeekMoE, pair: Ids) -> Score:
    """Score one pair alone, unpadded, from the logits of all its positions."""
    context, continuation = pair
    logprobs = log_softmax(model(np.asarray([[*context, *continuation][:-1]])).logits[0])[len(context) - 1 :]
    tokens = [float(row[token]) for row, token in zip(logprobs, continuation, strict=True)]
    greedy = [int(row.argmax()) for row in logprobs] == continuation
    return Score(sum(tokens), greedy, tokens)


def check_same(got: list[Score], expected: list[Score]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, **CLOSE)
        np.testing.assert_allclose(one.logprob, other.logprob, **CLOSE)
        assert one.greedy == other.greedy


def random_pair(rng: random.Random, length: int) -> Ids:
    """Return a pair of which the model reads `length` tokens."""
    tokens = [rng.randrange(SMALL.vocab_size) for _ in range(length + 1)]
    cut = rng.randint(1, length)
    return tokens[:cut], tokens[cut:]


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["head", "tied"])
def test_scores_match_the_logits_of_the_model(tied: bool):
    model = model_of(dataclasses.replace(SMALL, tie_word_embeddings=tied))
    rng = random.Random(0)
    pairs = [random_pair(rng, length) for length in (1, 30, 7, 7)]

    got = scored(model, pairs)

    check_same(got, [twin(model, pair) for pair in pairs])


def test_scores_match_the_original():
    ids, logits = (golden.tensors("a_baseline")[name] for name in ("in.input_ids", "logits"))
    cuts = (1, 20)
    pairs = [(row[:cut].tolist(), row[cut:].tolist()) for row, cut in zip(ids, cuts, strict=True)]

    got = scored(golden.model("a_baseline"), pairs)

    for row, cut, expected, one in zip(ids, cuts, log_softmax(logits), got, strict=True):
        picked = [expected[at - 1, row[at]] for at in range(cut, len(row))]
        np.testing.assert_allclose(one.token_logprobs, picked, atol=golden.LOGITS)


@pytest.mark.slow
def test_two_hundred_pairs_match_each_alone_with_few_programs():
    model, rng, budget = model_of(SMALL), random.Random(1), 512
    pairs = [random_pair(rng, rng.randint(1, 60)) for _ in range(200)]
    alone = [scored(model, [pair])[0] for pair in pairs]
    before = scoring._score_batch._cache_size()  # type: ignore[attr-defined]

    got = scored(model, pairs, max_tokens=budget)

    check_same(got, alone)
    lengths = {bucket(len(context) + len(continuation) - 1) for context, continuation in pairs}
    shapes = {(rows, length) for length in lengths for rows in (1, 2, 4, 8, 16, 32) if rows * length <= budget}
    compiled = scoring._score_batch._cache_size() - before  # type: ignore[attr-defined]
    assert 0 < compiled <= len(shapes)
    assert compiled <= 2 * len(lengths)  # full batches and the remainder


def test_scores_keep_the_order_of_the_pairs():
    model, rng = model_of(SMALL), random.Random(3)
    pairs = [random_pair(rng, length) for length in (3, 40, 5, 40, 17, 1)]
    order = [4, 0, 5, 2, 1, 3]

    got, shuffled = scored(model, pairs), scored(model, [pairs[i] for i in order])

    check_same(shuffled, [got[i] for i in order])


def test_max_tokens_does_not_change_scores():
    model, rng = model_of(SMALL), random.Random(4)
    pairs = [random_pair(rng, length) for length in (3, 20, 24, 30, 11)]

    one_by_one, together = scored(model, pairs, max_tokens=1), scored(model, pairs, max_tokens=4096)

    check_same(one_by_one, together)


def test_greedy_flag_marks_greedy_continuations_only():
    model, prompt = model_of(SMALL), [5, 6, 7]
    output = Generator(model)([prompt], max_new_tokens=6, ignore_eos=True)[0].token_ids
    last_wrong = [*output[:-1], (output[-1] + 1) % SMALL.vocab_size]
    first_wrong = [(output[0] + 1) % SMALL.vocab_size, *output[1:]]

    got = scored(model, [(prompt, output), (prompt, last_wrong), (prompt, first_wrong), (prompt, output[:1])])

    assert [one.greedy for one in got] == [True, False, False, True]


def test_progress_counts_pairs():
    calls: list[Any] = []

    @contextlib.contextmanager
    def meter(what: str, total: int) -> Iterator[Any]:
        calls.append((what, total))
        yield calls.append

    scored(model_of(SMALL), [([1], [2])] * 3, max_tokens=16, progress=meter)

    assert calls == [("scoring", 3), 1, 1, 1]


def few_shot(*, vocab: int = SMALL.vocab_size) -> list[Ids]:
    """Three questions each after two sets of examples, and one without any."""
    sets = [questions(3, shots=4, vocab=vocab, seed=seed) for seed in range(2)]
    return [*sets[0], *questions(1, shots=0, vocab=vocab, seed=9), *sets[1]]


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"max_tokens": 16}, {"prefill_chunk": 32}))],
    ids=str,
)
def test_sharing_tokens_does_not_change_scores(options):
    model, pairs, stats = model_of(SMALL), few_shot(), Stats()
    random.Random(0).shuffle(pairs)

    shared = scored(model, pairs, stats=stats, **options)

    check_same(shared, scored(model, pairs, share_prefixes=False))
    assert stats.prompt_tokens + stats.reused_tokens == sum(len(a) + len(b) - 1 for a, b in pairs)
    assert stats.prompt_tokens < stats.reused_tokens / 4


def test_prefix_of_an_earlier_call_is_reused():
    model, pairs, cache = model_of(SMALL), few_shot(), PrefixCache(10**8)
    first, second = Stats(), Stats()

    expected = scored(model, pairs[:12], stats=first, prefix_cache=cache)
    got = scored(model, pairs[:12], stats=second, prefix_cache=cache)

    check_same(got, expected)
    assert len(cache) == 1
    shared = len(cache._entries[0].token_ids)
    assert first.prompt_tokens - second.prompt_tokens == shared - 1  # the last token is read for its logits


@pytest.mark.slow
def test_sharing_tokens_on_a_mesh_matches_one_device():
    config = dataclasses.replace(SMALL, n_routed_experts=8)
    one, many = (DeepSeekMoE.init(config, mesh=mesh) for mesh in (None, MESHES["expert=2,tensor=2,fsdp=2"]))
    pairs = few_shot()[:12]

    check_same(scored(many, pairs), scored(one, pairs, share_prefixes=False))


def test_no_pairs_give_no_scores():
    assert scored(model_of(SMALL), []) == []


def test_the_most_likely_tokens_are_returned():
    model = model_of(SMALL)
    pairs = [([5, 6], [7, 8, 9]), ([5, 6], [10]), ([11], [12] * 30)]

    got, plain = scored(model, pairs, top=3), scored(model, pairs)

    for (context, continuation), one, other in zip(pairs, got, plain, strict=True):
        logits = model(np.array([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        table = log_softmax(logits)
        assert one.top_logprobs is not None
        assert other.top_logprobs is None
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
        for row, top, token, logprob in zip(table, one.top_logprobs, continuation, one.token_logprobs, strict=True):
            assert [*top] == np.argsort(-row)[:3].tolist()
            assert [*top.values()] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-5)
            assert top.get(token, logprob) == logprob  # equal to the bit


def test_logits_are_computed_in_chunks():
    model = model_of(SMALL)
    pairs = [Pair(np.arange(128, dtype=np.int32), 127)] * 8
    batch = Batch(8, 128, [Row([i], 127, 127) for i in range(8)])

    lowered = scoring._score_batch.lower(*split(model), None, scoring._Inputs.of(batch, pairs, 0)).as_text()  # type: ignore[attr-defined]

    assert "tensor<128x320xf32>" in lowered  # of one chunk
    assert "1024x320x" not in lowered
    assert "8x128x320x" not in lowered


def test_scores_on_a_mesh_match_one_device():
    config = dataclasses.replace(SMALL, n_routed_experts=8)
    one, many = (DeepSeekMoE.init(config, mesh=mesh) for mesh in (None, MESHES["expert=2,tensor=2,fsdp=2"]))
    rng = random.Random(6)
    pairs = [random_pair(rng, length) for length in (3, 9, 12)]

    got = scored(many, pairs)

    check_same(got, scored(one, pairs))


@pytest.mark.slow
def test_stretched_pairs_do_not_depend_on_their_batch():
    model, rng = model_of(DYNAMIC), random.Random(7)
    lengths = (19, 20, 21, 22, 22, 24, 3, 40)  # the scaling begins after 20; 21 to 24 share a bucket
    pairs = [random_pair(rng, length) for length in lengths]

    got = scored(model, [*pairs, *few_shot()])

    check_same(got[: len(pairs)], [twin(model, pair) for pair in pairs])
    check_same(got[len(pairs) :], [twin(model, pair) for pair in few_shot()])


def test_rolling_windows_match_examples():
    text = list(range(10, 22))

    # fmt: off
    assert rolling_windows(text, prefix=0, window=5) == [
        ([0],                [10, 11, 12, 13, 14]),
        ([14],               [15, 16, 17, 18, 19]),
        ([16, 17, 18, 19],   [20, 21]),
    ]
    assert rolling_windows(text, prefix=0, window=5, stride=3) == [
        ([0],                [10, 11, 12, 13, 14]),
        ([12, 13, 14],       [15, 16, 17]),
        ([15, 16, 17],       [18, 19, 20]),
        ([16, 17, 18, 19, 20], [21]),
    ]
    assert rolling_windows(text, prefix=None, window=5) == [
        ([10],               [11, 12, 13, 14, 15]),
        ([15],               [16, 17, 18, 19, 20]),
        ([16, 17, 18, 19, 20], [21]),
    ]
    # fmt: on
    assert rolling_windows([10], prefix=0, window=5) == [([0], [10])]
    assert rolling_windows([10], prefix=None, window=5) == []
    assert rolling_windows([], prefix=0, window=5) == []


def test_windows_predict_every_token_once():
    rng = random.Random(8)
    for _ in range(500):
        window = rng.randint(1, 12)
        stride, length = rng.randint(1, window), rng.randint(1, 60)
        prefix = rng.choice([None, -1])
        text = list(range(length))
        full = text if prefix is None else [prefix, *text]

        windows = rolling_windows(text, prefix=prefix, window=window, stride=stride)

        assert list(itertools.chain.from_iterable(new for _, new in windows)) == full[1:]
        for i, (context, new) in enumerate(windows):
            end = full.index(new[-1]) + 1
            assert [*context, *new] == full[max(0, end - window - 1) : end]
            assert len(context) >= (1 if i == 0 else window - stride + 1)
            assert len(new) <= (window if i == 0 else stride)


@pytest.mark.parametrize("stride", [None, 3], ids="stride={}".format)
@pytest.mark.parametrize("prefix", [0, None], ids="prefix={}".format)
def test_perplexity_matches_windows_scored_alone(stride: int | None, prefix: int | None):
    model, rng = model_of(SMALL), random.Random(9)
    text = [rng.randrange(SMALL.vocab_size) for _ in range(50)]

    got = measured(model, text, prefix=prefix, window=16, stride=stride, text_bytes=170)

    windows = rolling_windows(text, prefix=prefix, window=16, stride=stride)
    nll = -sum(twin(model, pair).logprob for pair in windows)
    assert got.num_tokens == (50 if prefix == 0 else 49)
    np.testing.assert_allclose(got.nll, nll, **CLOSE)
    np.testing.assert_allclose(got.perplexity, math.exp(nll / got.num_tokens), rtol=1e-4)
    assert got.bits_per_byte is not None
    np.testing.assert_allclose(got.bits_per_byte, nll / math.log(2) / 170, **CLOSE)


def test_default_window_is_max_position_embeddings():
    model, text = model_of(DYNAMIC), list(range(40))

    got = measured(model, text, prefix=0)

    assert got == measured(model, text, prefix=0, window=20)
    assert measured(model, text, prefix=0, context_length=16) == measured(model, text, prefix=0, window=16)
    assert got.bits_per_byte is None


# fmt: off
BAD_PAIRS = {
    "no context":      ([],         [1],      r"pair 1: the context is empty"),
    "nothing to score": ([1],       [],       r"pair 1: the continuation is empty"),
    "past the end":    ([1, 320],   [1],      r"pair 1: context id 320 is outside the vocabulary of 320"),
    "negative":        ([1],        [2, -1],  r"pair 1: continuation id -1 is outside the vocabulary of 320"),
    "floats":          ([1.5],      [1],      r"pair 1: the context must be token ids \[T\], got float64 \[1\]"),
    "text":            ("import",   [1],      r"pair 1: the context must be token ids \[T\], got <U6 \[\]"),
    "nested":          ([1],        [[1]],    r"pair 1: the continuation must be token ids \[T\], got int64 \[1, 1\]"),
    "too long":        ([1] * 30,   [1] * 4,  r"pair 1: 30 tokens of context and 4 of .* context_length of 32"),
}
BAD_TEXTS = {
    "no tokens":        ([],     {"prefix": 0},                    r"no token to predict: tokens has length 0"),
    "one alone":        ([1],    {"prefix": None},                 r"no token to predict: tokens has length 1"),
    "prefix":           ([1],    {"prefix": 320},                  r"context id 320 is outside the vocabulary of 320"),
    "window past context": ([1], {"prefix": 0, "window": 33},      r"window must be at most context_length 32, got 33"),
    "no window":        ([1],    {"prefix": 0, "window": 0},       r"window must be at least 1, got 0"),
    "no stride":        ([1],    {"prefix": 0, "stride": 0},       r"stride must be in \[1, 32\], got 0"),
    "wide stride":      ([1],    {"prefix": 0, "window": 4, "stride": 5}, r"stride must be in \[1, 4\], got 5"),
    "no bytes":         ([1],    {"prefix": 0, "text_bytes": 0},   r"text_bytes must be at least 1, got 0"),
}
# fmt: on


@pytest.mark.parametrize(("context", "continuation", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_invalid_pair_is_named(context, continuation, message: str):
    with pytest.raises(ValueError, match=message) as refused:
        scored(model_of(SMALL), [([1], [2]), (context, continuation)], context_length=32)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("tokens", "options", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_invalid_perplexity_arguments_are_rejected(tokens, options, message: str):
    with pytest.raises(ValueError, match=message):
        measured(model_of(SMALL), tokens, context_length=32, **options)


@pytest.mark.parametrize("name", ["context_length", "max_tokens"])
def test_limits_must_be_positive(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        scored(model_of(SMALL), [([1], [2])], **{name: 0})


def test_longest_pair_that_fits_is_scored():
    model = model_of(SMALL)
    pair = ([1] * 30, [1] * 3)

    assert len(scored(model, [pair], context_length=32)[0].token_logprobs) == 3
    check_same(scored(model, [pair], context_length=32), [twin(model, pair)])
