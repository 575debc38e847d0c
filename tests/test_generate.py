"""The generator: what it accepts, what it refuses, and that sampling follows the probabilities it should."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.cache import KVCache
from dsmoe_jax.checkpoint import save
from dsmoe_jax.config import ModelConfig, RopeScaling
from dsmoe_jax.generate import Chat, Generator
from dsmoe_jax.generate.generator import for_generation
from dsmoe_jax.generate.programs import bucket, step
from dsmoe_jax.model import DeepSeekMoE, assemble, merge, split
from tests.helpers import golden, reference
from tests.helpers.hf_folder import make_tokenizer

SMALL = ModelConfig(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_shared_experts=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.3,  # far from flat, so that what is likely is likely
)


@functools.cache
def small_model() -> DeepSeekMoE:
    return DeepSeekMoE.init(SMALL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint with a tokenizer."""
    home = tmp_path_factory.mktemp("generate")
    make_tokenizer(home / "tokenizer", 2048)
    save(small_model(), home / "native", beside=sorted((home / "tokenizer").iterdir()))
    return home / "native"


@pytest.fixture(scope="session")
def generator(folder: Path) -> Generator:
    return Generator.from_pretrained(folder)


# --- prompts and answers ---


def test_text_and_its_token_ids_are_the_same_prompt(generator: Generator):
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode("import os")

    by_text, by_ids = generator(["import os", ids], max_new_tokens=8, ignore_eos=True)

    assert by_text == by_ids
    assert by_text.text == generator.tokenizer.decode(by_text.tokens)
    assert by_text.finish_reason == "length"


def test_a_chat_is_rendered_with_the_generation_prompt(generator: Generator):
    assert generator.tokenizer is not None
    chat = [{"role": "user", "content": "hi"}]

    assert generator.encode(chat) == generator.tokenizer.apply_chat_template(chat, add_generation_prompt=True)


def test_a_stream_is_the_text_of_the_same_call(generator: Generator):
    options = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3, "ignore_eos": True}

    pieces = list(generator.stream("import os", **options))

    assert "".join(pieces) == generator(["import os"], **options)[0].text


def test_answers_do_not_depend_on_the_other_rows(generator: Generator):
    prompts = [[5, 6, 7], list(range(10, 25)), [8]]
    options = {"max_new_tokens": 6, "ignore_eos": True}

    together = generator(prompts, **options)
    swapped = generator(prompts[::-1], **options)[::-1]

    assert [answer.tokens for answer in together] == [answer.tokens for answer in swapped]


def test_an_answer_ends_with_the_end_of_sequence_token_and_its_text_does_not(generator: Generator):
    tokens = generator([[5, 6, 7]], max_new_tokens=8, ignore_eos=True)[0].tokens
    ending = Generator(small_model(), generator.tokenizer, eos_token_id=tokens[3])

    answer = ending([[5, 6, 7]], max_new_tokens=8)[0]

    assert answer.tokens == tokens[: tokens.index(tokens[3]) + 1]
    assert answer.finish_reason == "eos"
    assert answer.text == ending.tokenizer.decode(answer.tokens[:-1])  # type: ignore[union-attr]
    assert "".join(ending.stream([5, 6, 7], max_new_tokens=8)) == answer.text


def test_a_generator_without_a_tokenizer_answers_token_ids():
    answer = Generator(small_model())([[1, 2, 3]], max_new_tokens=2, ignore_eos=True)[0]

    assert len(answer.tokens) == 2
    assert answer.text == ""


def test_the_context_is_the_cache_and_not_max_position_embeddings():
    case = "d_rope_linear"  # max_position_embeddings 32
    prompt = golden.tensors(case)["in.input_ids"][0]  # 40 tokens
    model = golden.model(case)

    answer = Generator(model)([prompt], max_new_tokens=2, ignore_eos=True)[0]

    assert answer.tokens[0] == int(np.argmax(golden.tensors(case)["logits"][0, -1]))


def test_dynamic_ntk_goes_by_the_longest_prompt_of_the_batch_and_not_by_the_bucket():
    scaled = RopeScaling("dynamic", 2.0)
    config = dataclasses.replace(SMALL, max_position_embeddings=6, rope_scaling=scaled)
    model = DeepSeekMoE.init(config, seed=2)
    graph, params = split(model)
    prompts, new = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17]], 6

    @jax.jit
    def read(ids: jax.Array, cache: KVCache, length: jax.Array):
        hidden = merge(graph, params).hidden(ids, cache=cache, rope_length=length)
        return merge(graph, params).logits(hidden.states[:, -1]).argmax(-1), hidden.cache

    answers = Generator(model)(prompts, max_new_tokens=new, ignore_eos=True)

    # One row at a time, without padding, told the length that transformers' left-padded batch has at each step.
    for prompt, answer in zip(prompts, answers, strict=True):
        token, cache = read(jnp.asarray([prompt]), KVCache.empty(config, 1, 16), jnp.int32(9))
        tokens = [int(token[0])]
        for more in range(1, new):
            token, cache = read(token[:, None], cache, jnp.int32(9 + more))
            tokens.append(int(token[0]))
        assert answer.tokens == tokens


def test_generation_config_names_the_end_of_sequence(tmp_path: Path):
    shutil.copytree(golden.folder("a_baseline"), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))

    assert Generator.from_pretrained(tmp_path / "hf").eos_token_ids == {7, 9}


@pytest.mark.parametrize("eos", ["</s>", [7, "x"], 0.5, {}])
def test_an_end_of_sequence_that_is_no_token_id_is_refused(eos):
    with pytest.raises(ValueError, match="eos_token_id"):
        Generator(small_model(), eos_token_id=eos)


def test_a_chat_keeps_its_history_and_forgets_on_reset(generator: Generator):
    chat = Chat(generator, max_new_tokens=4)

    first = "".join(chat.send("hello"))
    after_one = list(chat.messages)
    next(chat.send("and now?")).strip()
    after_two = list(chat.messages)
    chat.reset()

    assert after_one == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    assert [message["role"] for message in after_two] == ["user", "assistant"] * 2
    assert chat.messages == []


# --- shapes ---


def test_buckets_waste_at_most_a_third_and_are_few():
    sizes = {bucket(n) for n in range(1, 4097)}

    assert all(bucket(n) >= n for n in range(1, 4097))
    assert all(bucket(n) * 2 <= n * 3 for n in range(16, 4097))
    assert len(sizes) == 17


def test_a_new_prompt_length_in_the_same_bucket_is_no_new_program(generator: Generator):
    options = {"max_new_tokens": 4, "ignore_eos": True}
    generator([[5] * 9], **options)
    before = step._cache_size()  # type: ignore[attr-defined]

    for length in (10, 11, 12):
        generator([[5] * length], **options)

    assert step._cache_size() == before  # type: ignore[attr-defined]


# --- refusals ---


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([], {}, "non-empty list"),
        ("text", {}, "non-empty list"),
        ([""], {}, "empty"),
        ([[]], {}, "empty"),
        ([[1, 2048]], {}, "2048 is outside the vocabulary of 2048"),
        ([[-1]], {}, "-1 is outside"),
        ([[0.5]], {}, "int"),
        ([[1] * 5000], {}, "5000 tokens and max_new_tokens 128 exceed the context_length of 4096"),
        ([[1]], {"max_new_tokens": 4096}, "exceed the context_length"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"seed": -1}, "seed"),
        ([[{"role": "pirate", "content": "arr"}]], {}, "pirate"),
    ],
)
def test_a_bad_call_is_refused_in_one_line(generator: Generator, prompts, options: dict, reason: str):
    with pytest.raises(ValueError, match=reason) as refused:
        generator(prompts, **options)

    assert "\n" not in str(refused.value)


def test_text_without_a_tokenizer_is_refused():
    generator = Generator(small_model())

    with pytest.raises(ValueError, match="needs a tokenizer"):
        generator(["text"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generator.stream([1, 2])


def test_a_stream_refuses_a_bad_prompt_before_its_first_piece(generator: Generator):
    with pytest.raises(ValueError, match="context_length"):
        generator.stream("import os", max_new_tokens=10_000)


# --- the seed, and what the weights become ---


def test_the_seed_decides(generator: Generator):
    def answer(seed: int) -> list[int]:
        return generator([[5, 6]], max_new_tokens=8, temperature=1.0, seed=seed, ignore_eos=True)[0].tokens

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_on_cpu_half_precision_weights_outside_the_experts_are_widened_and_it_is_said(caplog: pytest.LogCaptureFixture):
    model = reference.random_model(SMALL, dtype=jnp.bfloat16)
    wide = assemble(model.config, {name: value.astype(jnp.float32) for name, value in split(model)[1].items()})
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]

    with caplog.at_level("INFO", logger="dsmoe_jax"):
        answers = Generator(model)(prompts, max_new_tokens=6, ignore_eos=True)

    params = for_generation(split(model)[1])
    assert {name for name, value in params.items() if value.dtype == jnp.bfloat16} == {
        f"layers.1.moe.experts.{part}" for part in ("gate", "up", "down")
    }
    assert "widened from bfloat16 to float32" in caplog.text
    want = Generator(wide)(prompts, max_new_tokens=6, ignore_eos=True)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in want]
