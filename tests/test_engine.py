"""`Engine`: outputs do not depend on the batch; scheduling, KV cache, prefixes and cancellation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import RopeScaling
from dsmoe_jax.generate import Completion, Engine, Generator, SamplingParams
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


def mixed_params(count: int, seed: int = 0, longest: int = 24) -> list[SamplingParams]:
    """Return sampling parameters of all kinds."""
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
        SamplingParams(max_new_tokens=int(rng.integers(1, longest)), seed=i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def run(engine: Engine, limit: int = 10_000) -> None:
    while engine.busy:
        engine.step()
        limit -= 1
        assert limit, "the engine does not terminate"


def submit(engine: Engine, ids: Sequence[int], **keywords) -> list[Output]:
    return engine.submit(ids, SamplingParams(**keywords))


def flat(completions: list[Any]) -> list[Completion]:
    """Return the completions of all prompts, those of n > 1 in their place."""
    return [one for entry in completions for one in (entry if isinstance(entry, list) else [entry])]


def test_outputs_do_not_depend_on_the_rest_of_the_batch():
    batch, params = prompts(8, 16), mixed_params(8, longest=12)

    together = flat(generator()(batch, params))
    alone = flat([generator()(prompt, one) for prompt, one in zip(batch, params, strict=True)])

    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.finish_reason for output in together] == [output.finish_reason for output in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for ours, theirs in zip(one.logprobs or [], other.logprobs or [], strict=True):
            np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-4)
            assert ours.top.keys() == theirs.top.keys()


def test_chunked_prefill_matches_one_call():
    prompt = np.random.default_rng(3).integers(2, SMALL.vocab_size, 3 * CHUNK + 5).tolist()

    at_once, in_pieces = (
        generator(prefill_chunk=chunk)([prompt], max_new_tokens=12, ignore_eos=True)[0] for chunk in (512, CHUNK)
    )

    assert at_once.token_ids == in_pieces.token_ids


@pytest.mark.slow
def test_later_requests_fill_idle_rows():
    batch = prompts(6)
    want = generator()(batch, max_new_tokens=10, ignore_eos=True)
    engine = generator(max_batch_size=2).engine()
    outputs = []

    for prompt in batch:
        outputs += submit(engine, prompt, max_new_tokens=10, ignore_eos=True)
        engine.step()
        engine.step()
    run(engine)

    assert [output.token_ids for output in outputs] == [output.token_ids for output in want]


def test_admission_is_first_come_first_served():
    engine, order = generator(max_batch_size=2).engine(), []
    outputs = [submit(engine, prompt, max_new_tokens=3, ignore_eos=True)[0] for prompt in prompts(8, 30)]

    while engine.busy:
        engine.step()
        order += [i for i, output in enumerate(outputs) if output.num_sampled and i not in order]

    assert order == list(range(8))


def test_decoding_continues_during_a_long_prefill():
    engine = generator().engine()
    (first,) = submit(engine, [5, 6], max_new_tokens=40, ignore_eos=True)
    engine.step()
    engine.step()
    (long,) = submit(engine, [7] * (8 * CHUNK), max_new_tokens=2, ignore_eos=True)

    while not long.num_sampled:
        before = first.num_sampled
        engine.step()
        assert first.num_sampled == before + 1 or first.num_sampled == 40


def test_few_rows_are_idle_while_requests_wait():
    made = generator()
    made(prompts(40, 30), [SamplingParams(max_new_tokens=n % 20 + 1, ignore_eos=True) for n in range(40)])

    assert made.stats.idle_fraction < 0.2


def test_n_outputs_differ_and_the_first_is_that_of_n_1():
    options = {"temperature": 1.0, "seed": 5, "max_new_tokens": 8, "ignore_eos": True}

    (several,) = generator()([[5, 6, 7]], n=3, **options)
    (one,) = generator()([[5, 6, 7]], **options)

    assert several[0].token_ids == one.token_ids
    assert len({tuple(output.token_ids) for output in several}) == 3


def test_prompt_of_n_outputs_is_prefilled_once():
    made = generator()

    made([[5] * 20], n=6, max_new_tokens=2)

    assert made.stats.prompt_tokens == 20


def test_default_seed_is_the_number_of_the_request():
    def three() -> list[list[int]]:
        outputs = generator()([[5, 6, 7]] * 3, temperature=1.0, max_new_tokens=8, ignore_eos=True)
        return [output.token_ids for output in outputs]

    assert len({tuple(tokens) for tokens in three()}) == 3
    assert three() == three()


@pytest.mark.slow
def test_200_prompt_lengths_compile_one_program_per_bucket():
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


def test_growing_the_cache_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch):
    want = generator()([[5, 6]], max_new_tokens=60, ignore_eos=True)[0].token_ids
    monkeypatch.setattr("dsmoe_jax.generate.engine._LOOKAHEAD", 4)
    made = generator()

    (got,) = made([[5, 6]], max_new_tokens=60, ignore_eos=True)

    assert got.token_ids == want
    # Two layers of keys and values, two heads of 16 fp32 numbers, 96 slots: a bucket.
    assert made.stats.cache_bytes == 2 * 2 * 2 * 16 * 4 * bucket(61)


def test_int8_cache_takes_a_third_and_keeps_logits_close():
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


def test_prefix_is_reused_without_changing_the_output():
    made, history = generator(), list(range(2, 60))
    engine = made.engine()
    (output,) = engine.submit(history, SamplingParams(max_new_tokens=6, ignore_eos=True), retain_prefix=True)
    run(engine)
    again = [*history, *output.token_ids, 11, 12, 13]

    engine = made.engine()
    (reused,) = engine.submit(again, SamplingParams(max_new_tokens=6, ignore_eos=True), prefix=output.prefix)
    run(engine)

    assert reused.token_ids == made([again], max_new_tokens=6, ignore_eos=True)[0].token_ids
    assert engine.stats.reused_tokens == len(history) + 5
    assert engine.stats.prompt_tokens == 4


def test_only_the_common_part_of_a_prefix_is_reused():
    made = generator()
    engine = made.engine()
    (output,) = engine.submit(list(range(2, 60)), SamplingParams(max_new_tokens=4, ignore_eos=True), retain_prefix=True)
    run(engine)
    other = [*range(2, 40), 99, 98, 97]

    engine = made.engine()
    (reused,) = engine.submit(other, SamplingParams(max_new_tokens=6, ignore_eos=True), prefix=output.prefix)
    run(engine)

    assert engine.stats.reused_tokens == 38
    assert reused.token_ids == made([other], max_new_tokens=6, ignore_eos=True)[0].token_ids


def test_prefix_never_matches_the_last_token():
    prefix = Prefix((1, 2, 3), None)  # type: ignore[arg-type]

    assert prefix.match([1, 2, 3]) == 2
    assert prefix.match([1, 2, 3, 4]) == 2
    assert prefix.match([1, 5]) == 1
    assert prefix.match([4]) == 0


def test_request_too_large_for_the_cache_is_rejected():
    need = 2 * 2 * 2 * 16 * 4 * 64  # bytes of one row of 64 tokens
    made = generator(cache_bytes=need)

    fits, too_long = made([[5] * 40, [5] * 80], max_new_tokens=24, ignore_eos=True, errors="return")

    assert len(fits.token_ids) == 24
    assert too_long.finish_reason == "error"
    assert too_long.error is not None
    assert "80 tokens and max_new_tokens 24 need" in too_long.error


def test_requests_wait_for_cache_memory():
    need = 2 * 2 * 2 * 16 * 4 * 64
    batch = prompts(6, 30)
    want = generator()(batch, max_new_tokens=20, ignore_eos=True)
    made = generator(cache_bytes=2 * need)

    got = made(batch, max_new_tokens=20, ignore_eos=True)

    assert [output.token_ids for output in got] == [output.token_ids for output in want]
    assert made.stats.cache_bytes <= 2 * need


def test_canceled_output_releases_its_row():
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
def test_output_ends_at_the_first_stop_token(stop: str):
    tokens = generator()([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)[0].token_ids
    ending = generator(eos_token_id=tokens[3] if stop == "eos" else None)

    (output,) = ending([[5, 6, 7]], max_new_tokens=8, stop_token_ids=[tokens[3]] if stop == "stop" else [])

    assert output.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None if stop == "eos" else tokens[3])


def test_stretched_dynamic_ntk_prompts_are_prefilled_at_once():
    config = dataclasses.replace(SMALL, max_position_embeddings=16, rope_scaling=RopeScaling("dynamic", 2.0))
    made = Generator(DeepSeekMoE.init(config, seed=2), prefill_chunk=16)
    prompt = np.random.default_rng(1).integers(2, SMALL.vocab_size, 40).tolist()
    at_once = Generator(DeepSeekMoE.init(config, seed=2), prefill_chunk=512)

    got, want = (one([prompt], max_new_tokens=6, ignore_eos=True)[0].token_ids for one in (made, at_once))

    assert got == want


def test_short_dynamic_ntk_prompt_matches_no_scaling():
    config = dataclasses.replace(SMALL, rope_scaling=RopeScaling("dynamic", 2.0))
    scaled = Generator(assemble(config, split(small_model())[1]), prefill_chunk=CHUNK)
    prompt = [[5] * 50]

    (got,), (want,) = (made(prompt, max_new_tokens=8, ignore_eos=True) for made in (scaled, generator()))

    assert got.token_ids == want.token_ids
    assert scaled.stats.prompt_tokens == 50


def test_routing_is_that_of_a_forward_pass():
    engine = generator().engine()
    outputs = [
        *engine.submit(
            [5, 6, 7], SamplingParams(max_new_tokens=6, ignore_eos=True, n=2, temperature=1.0), routing=True
        ),
        *engine.submit([8] * 20, SamplingParams(max_new_tokens=4, ignore_eos=True)),
    ]

    run(engine)

    for output in outputs[:2]:
        ids = [*output.request.token_ids, *output.token_ids]
        routing = small_model()(np.array([ids])).routing[1]
        assert len(output.routing) == len(output.token_ids) - 1  # the last is not read
        np.testing.assert_array_equal([one.ids[0] for one in output.routing], routing.ids[0, 3:-1])
        np.testing.assert_allclose([one.weights[0] for one in output.routing], routing.weights[0, 3:-1], atol=1e-5)
    assert not outputs[2].routing


def test_routing_changes_no_bit_of_the_others():
    found = []
    for routing in (False, True):
        engine = generator().engine()
        engine.submit([5, 6, 7], SamplingParams(max_new_tokens=8, ignore_eos=True), routing=routing)
        (other,) = engine.submit([9, 3], SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=3))
        run(engine)
        found.append((other.token_ids, other.logprobs))

    assert found[0] == found[1]


def test_a_canceled_prompt_is_not_read_on():
    engine = generator().engine()
    (long,) = engine.submit([5] * 10 * CHUNK, SamplingParams())
    engine.step()
    engine.step()

    engine.cancel(long)

    assert not engine.busy
    assert engine.stats.prompt_tokens == 2 * CHUNK
    (other,) = engine.submit([5, 6], SamplingParams(max_new_tokens=2))
    run(engine)
    assert len(other.token_ids) == 2


def test_an_output_counts_its_reused_tokens():
    engine = generator(prefix_cache_bytes=10**8).engine()
    prompt = prompts(1, 90)[0][:1] * 80
    (first,) = engine.submit(prompt, SamplingParams(max_new_tokens=3), retain_prefix=True)
    run(engine)

    (second,) = engine.submit([*prompt, 7, 8], SamplingParams(max_new_tokens=3))
    assert not engine.num_running
    run(engine)

    assert (first.num_reused, second.num_reused) == (0, 80)
    assert engine.stats.reused_tokens == 80
    assert engine.prefix_cache_bytes > 0
    assert engine.kv_cache == (0, 0.0)
