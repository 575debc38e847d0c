"""The engine: many requests at once give the answers that each would get alone, whatever is in the batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import RopeScaling
from dsmoe_jax.generate import Engine, Generator, SamplingParams
from dsmoe_jax.generate.programs import bucket, extend, insert, prefill, step
from dsmoe_jax.generate.request import Output, Prefix
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from tests.helpers.small import SMALL, small_model

pytestmark = pytest.mark.heavy

CHUNK = 32


def generator(**options) -> Generator:
    defaults: dict[str, Any] = {"prefill_chunk": CHUNK, "max_batch_size": 4}
    return Generator(small_model(), **defaults | options)


def prompts(count: int, longest: int = 100, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, SMALL.vocab_size, rng.integers(1, longest)).tolist() for _ in range(count)]


def asked(count: int, seed: int = 0, most: int = 24) -> list[SamplingParams]:
    """Parameters of all kinds."""
    rng = np.random.default_rng(seed)
    kinds: list[dict] = [
        {},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.1, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "frequency_penalty": 0.4, "logit_bias": {7: 3.0}, "n": 3},
        {"logprobs": 2},
        {"ignore_eos": True, "stop_token_ids": [9, 10, 11]},
    ]
    return [
        SamplingParams(max_new_tokens=int(rng.integers(1, most)), seed=i, **kinds[i % len(kinds)]) for i in range(count)
    ]


def run(engine: Engine, limit: int = 10_000) -> None:
    while engine.busy:
        engine.step()
        limit -= 1
        assert limit, "the engine does not come to an end"


def submit(engine: Engine, ids: Sequence[int], **keywords) -> list[Output]:
    return engine.submit(ids, SamplingParams.of(**keywords))


# --- the same answers ---


def test_answers_do_not_depend_on_what_else_is_in_the_batch():
    given, params = prompts(8, 40), asked(8, most=12)

    together = generator()(given, params)
    alone = [answer for prompt, one in zip(given, params, strict=True) for answer in generator()([prompt], one)]

    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.finish_reason for answer in together] == [answer.finish_reason for answer in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for ours, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-4)
            assert ours.top.keys() == theirs.top.keys()


def test_a_prompt_in_pieces_is_answered_like_one_at_once():
    prompt = np.random.default_rng(3).integers(2, SMALL.vocab_size, 3 * CHUNK + 5).tolist()

    at_once, in_pieces = (
        generator(prefill_chunk=chunk)([prompt], max_new_tokens=12, ignore_eos=True)[0] for chunk in (512, CHUNK)
    )

    assert at_once.token_ids == in_pieces.token_ids


def test_requests_that_come_later_fill_rows_that_are_free():
    given = prompts(6)
    want = generator()(given, max_new_tokens=10, ignore_eos=True)
    engine = generator(max_batch_size=2).engine()
    answers = []

    for prompt in given:
        answers += submit(engine, prompt, max_new_tokens=10, ignore_eos=True)
        engine.step()
        engine.step()
    run(engine)

    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in want]


def test_rows_are_given_first_come_first_served():
    engine, order = generator(max_batch_size=2).engine(), []
    answers = [submit(engine, prompt, max_new_tokens=3, ignore_eos=True)[0] for prompt in prompts(8, 30)]

    while engine.busy:
        engine.step()
        order += [i for i, answer in enumerate(answers) if answer.num_sampled and i not in order]

    assert order == list(range(8))


def test_an_answer_goes_on_while_a_long_prompt_is_read():
    engine = generator().engine()
    (first,) = submit(engine, [5, 6], max_new_tokens=40, ignore_eos=True)
    engine.step()
    engine.step()
    (long,) = submit(engine, [7] * (8 * CHUNK), max_new_tokens=2, ignore_eos=True)

    while not long.num_sampled:
        before = first.num_sampled
        engine.step()
        assert first.num_sampled == before + 1 or first.num_sampled == 40


def test_few_rows_stand_free_while_requests_wait():
    made = generator()
    made(prompts(40, 30), [SamplingParams(max_new_tokens=n % 20 + 1, ignore_eos=True) for n in range(40)])

    assert made.stats.idle_fraction < 0.2


# --- the seed ---


def test_n_answers_differ_and_the_first_is_that_of_n_1():
    options = {"temperature": 1.0, "seed": 5, "max_new_tokens": 8, "ignore_eos": True}

    several = generator()([[5, 6, 7]], n=3, **options)
    (one,) = generator()([[5, 6, 7]], **options)

    assert several[0].token_ids == one.token_ids
    assert len({tuple(answer.token_ids) for answer in several}) == 3


def test_the_prompt_of_n_answers_is_read_once():
    made = generator()

    made([[5] * 20], n=6, max_new_tokens=2)

    assert made.stats.prompt_tokens == 20


def test_without_a_seed_the_same_prompt_is_answered_differently_and_a_new_generator_repeats_it():
    def three() -> list[list[int]]:
        answers = generator()([[5, 6, 7]] * 3, temperature=1.0, max_new_tokens=8, ignore_eos=True)
        return [answer.token_ids for answer in answers]

    assert len({tuple(tokens) for tokens in three()}) == 3
    assert three() == three()


# --- programs ---


def test_200_prompt_lengths_compile_no_more_programs_than_there_are_buckets():
    made, rng = generator(), np.random.default_rng(0)
    lengths = rng.integers(1, CHUNK + 1, 200)
    for program in (prefill, extend, insert, step):
        program.clear_cache()  # type: ignore[attr-defined]

    for length in lengths:
        made([[5] * int(length)], max_new_tokens=3, ignore_eos=True)

    buckets = {bucket(int(length)) for length in lengths}
    cached = {bucket(int(length) + 3) for length in lengths}
    assert prefill._cache_size() <= len(buckets)  # type: ignore[attr-defined]
    assert step._cache_size() <= len(cached)  # type: ignore[attr-defined]


# --- the cache ---


def test_the_cache_grows_by_buckets_and_the_answer_does_not_notice(monkeypatch: pytest.MonkeyPatch):
    want = generator()([[5, 6]], max_new_tokens=60, ignore_eos=True)[0].token_ids
    monkeypatch.setattr("dsmoe_jax.generate.engine._LOOKAHEAD", 4)
    made = generator()

    (got,) = made([[5, 6]], max_new_tokens=60, ignore_eos=True)

    assert got.token_ids == want
    # Two layers of keys and values, two heads of 16 fp32 numbers, 96 slots: a bucket.
    assert made.stats.cache_bytes == 2 * 2 * 2 * 16 * 4 * bucket(61)


def test_an_int8_cache_takes_a_third_and_hardly_changes_the_logits():
    full, small = generator(), generator(cache_dtype="int8")
    options = {"max_new_tokens": 12, "ignore_eos": True, "logprobs": 1}

    exact, rounded = (made([[5, 6, 7, 8] * 10], **options)[0] for made in (full, small))

    assert small.stats.cache_bytes * 3 <= full.stats.cache_bytes
    same = [ours == theirs for ours, theirs in zip(exact.token_ids, rounded.token_ids, strict=True)]
    agree = same.index(False) if False in same else len(same)
    assert agree >= 6
    for ours, theirs in zip(exact.logprobs[:agree], rounded.logprobs[:agree], strict=True):  # type: ignore[index]
        assert abs(ours.logprob - theirs.logprob) < 0.1
    assert any(
        ours.logprob != theirs.logprob
        for ours, theirs in zip(exact.logprobs or [], rounded.logprobs or [], strict=True)
    )


def test_a_prefix_is_not_read_again_and_changes_nothing():
    made, history = generator(), list(range(2, 60))
    engine = made.engine()
    (answer,) = engine.submit(history, SamplingParams(max_new_tokens=6, ignore_eos=True), retain_prefix=True)
    run(engine)
    again = [*history, *answer.token_ids, 11, 12, 13]

    engine = made.engine()
    (reused,) = engine.submit(again, SamplingParams(max_new_tokens=6, ignore_eos=True), prefix=answer.prefix)
    run(engine)

    assert reused.token_ids == made([again], max_new_tokens=6, ignore_eos=True)[0].token_ids
    assert engine.stats.reused_tokens == len(history) + 5
    assert engine.stats.prompt_tokens == 4


def test_of_a_prefix_only_what_is_shared_is_used():
    made = generator()
    engine = made.engine()
    (answer,) = engine.submit(list(range(2, 60)), SamplingParams(max_new_tokens=4, ignore_eos=True), retain_prefix=True)
    run(engine)
    other = [*range(2, 40), 99, 98, 97]

    engine = made.engine()
    (reused,) = engine.submit(other, SamplingParams(max_new_tokens=6, ignore_eos=True), prefix=answer.prefix)
    run(engine)

    assert engine.stats.reused_tokens == 38
    assert reused.token_ids == made([other], max_new_tokens=6, ignore_eos=True)[0].token_ids


def test_the_whole_prompt_may_be_known_but_for_its_last_token():
    prefix = Prefix((1, 2, 3), None)  # type: ignore[arg-type]

    assert prefix.match([1, 2, 3]) == 2
    assert prefix.match([1, 2, 3, 4]) == 2
    assert prefix.match([1, 5]) == 1
    assert prefix.match([4]) == 0


# --- memory ---


def test_a_request_that_cannot_fit_is_refused_with_the_numbers_and_the_others_go_on():
    need = 2 * 2 * 2 * 16 * 4 * 64  # bytes of one row of 64 tokens
    made = generator(cache_bytes=need)

    fits, too_long = made([[5] * 40, [5] * 80], max_new_tokens=24, ignore_eos=True, errors="return")

    assert len(fits.token_ids) == 24
    assert too_long.finish_reason == "error"
    assert too_long.error is not None
    assert "80 tokens and max_new_tokens 24 need" in too_long.error


def test_rows_wait_for_memory():
    need = 2 * 2 * 2 * 16 * 4 * 64
    given = prompts(6, 30)
    want = generator()(given, max_new_tokens=20, ignore_eos=True)
    made = generator(cache_bytes=2 * need)

    got = made(given, max_new_tokens=20, ignore_eos=True)

    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    assert made.stats.cache_bytes <= 2 * need


# --- ending early ---


def test_a_cancelled_answer_frees_its_row_and_the_others_go_on():
    want = generator()([[5, 6], [7, 8]], max_new_tokens=12, ignore_eos=True)
    engine = generator(max_batch_size=1).engine()
    (first,), (second,), (third,) = (
        submit(engine, ids, max_new_tokens=12, ignore_eos=True) for ids in ([5, 6], [9], [7, 8])
    )
    for _ in range(4):
        engine.step()

    engine.cancel(first)
    engine.cancel(second)
    run(engine)

    assert first.finish_reason == second.finish_reason == "abort"
    assert first.token_ids == want[0].token_ids[: len(first.token_ids)]
    assert second.token_ids == []
    assert third.token_ids == want[1].token_ids


@pytest.mark.parametrize("stop", ["eos", "stop"])
def test_an_answer_ends_at_the_first_ending_token(stop: str):
    tokens = generator()([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)[0].token_ids
    ending = generator(eos_token_id=tokens[3] if stop == "eos" else None)

    (answer,) = ending([[5, 6, 7]], max_new_tokens=8, stop_token_ids=[tokens[3]] if stop == "stop" else [])

    assert answer.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None if stop == "eos" else tokens[3])


# --- dynamic NTK ---


def test_under_dynamic_ntk_past_what_was_trained_nothing_is_read_in_pieces_or_from_a_prefix():
    config = dataclasses.replace(SMALL, max_position_embeddings=16, rope_scaling=RopeScaling("dynamic", 2.0))
    made = Generator(DeepSeekMoE.init(config, seed=2), prefill_chunk=16)
    prompt = np.random.default_rng(1).integers(2, SMALL.vocab_size, 40).tolist()
    at_once = Generator(DeepSeekMoE.init(config, seed=2), prefill_chunk=512)

    got, want = (one([prompt], max_new_tokens=6, ignore_eos=True)[0].token_ids for one in (made, at_once))

    assert got == want


def test_a_short_dynamic_prompt_is_answered_as_without_scaling():
    config = dataclasses.replace(SMALL, rope_scaling=RopeScaling("dynamic", 2.0))
    scaled = Generator(assemble(config, split(small_model())[1]), prefill_chunk=CHUNK)
    prompt = [[5] * 50]

    (got,), (want,) = (made(prompt, max_new_tokens=8, ignore_eos=True) for made in (scaled, generator()))

    assert got.token_ids == want.token_ids
    assert scaled.stats.prompt_tokens == 50
