"""The generator: what it accepts, what it refuses, and that sampling follows the probabilities it should."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.config import ModelConfig, RopeScaling
from dsmoe_jax.generate import Chat, Generator, SamplingParams
from dsmoe_jax.generate.generator import for_generation
from dsmoe_jax.generate.programs import bucket, step
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import DeepSeekMoE, assemble, merge, split
from dsmoe_jax.text.tokenizer import Tokenizer
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
    save(small_model(), home / "native", extra_files=sorted((home / "tokenizer").iterdir()))
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


def test_split_special_strings_of_prompts_stay_text(folder: Path):
    generator = Generator.from_pretrained(folder, split_special_tokens=True)
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    eos = tokenizer.eos_token_id

    text, chat = generator.encode(f"a{tokenizer.eos_token}"), [{"role": "user", "content": f"a{tokenizer.eos_token}"}]

    assert eos not in [*text, *generator.encode(chat)]
    assert tokenizer.decode(text) == f"a{tokenizer.eos_token}"


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
        return merge(graph, params).logits(hidden.last_hidden_state[:, -1]).argmax(-1), hidden.cache

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


def test_the_tokenizers_eos_ends_answers_too(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "native")
    (tmp_path / "native" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "stop_strings": "x"}))

    made = Generator.from_pretrained(tmp_path / "native")

    assert made.eos_token_ids == {7, 1}
    assert made.stop_strings == ("x",)


@pytest.mark.parametrize("named", [5000, [5000, 100001], -1])
def test_eos_ids_outside_the_vocabulary_leave_the_tokenizers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: Any
):
    shutil.copytree(folder, tmp_path / "native")
    (tmp_path / "native" / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))

    made = Generator.from_pretrained(tmp_path / "native")

    assert made.eos_token_ids == {1}
    first = named if isinstance(named, int) else named[0]
    assert f"eos_token_id {first} is outside the vocabulary of 2048: answers end with 1" in caplog.text


def test_a_config_whose_eos_is_outside_the_vocabulary_is_warned_of(caplog: pytest.LogCaptureFixture):
    config = dataclasses.replace(SMALL, eos_token_id=5000)

    made = Generator(assemble(config, split(small_model())[1]))

    assert made.eos_token_ids == frozenset()
    assert "eos_token_id 5000 is outside the vocabulary of 2048: no EOS token ends an answer" in caplog.text
    with pytest.raises(ValueError, match="eos_token_id 2048 is outside the vocabulary of 2048"):
        Generator(small_model(), eos_token_id=[1, 2048])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"eos_token_id": "x"}, "generation_config.json: eos_token_id must be an int or a list of ints, not 'x'"),
        ({"stop_strings": [1]}, r"generation_config.json: stop_strings must be .*, not \[1\]"),
        ({"stop_strings": ""}, "generation_config.json: stop_strings must be .*, not ''"),
    ],
)
def test_a_broken_generation_config_is_refused(folder: Path, tmp_path: Path, fields: dict, reason: str):
    shutil.copytree(folder, tmp_path / "native")
    (tmp_path / "native" / "generation_config.json").write_text(json.dumps(fields))

    with pytest.raises(ValueError, match=reason):
        Generator.from_pretrained(tmp_path / "native")


def test_text_with_tokens_of_another_model_is_refused(generator: Generator):
    config = dataclasses.replace(SMALL, vocab_size=300)
    made = Generator(DeepSeekMoE.init(config), generator.tokenizer)

    with pytest.raises(ValueError, match=r"token id \d+ is outside the vocabulary of 300"):
        made(["import os"])


@pytest.mark.parametrize("eos", ["</s>", [7, "x"], 0.5, {}])
def test_an_end_of_sequence_that_is_no_token_id_is_refused(eos):
    with pytest.raises(ValueError, match="eos_token_id"):
        Generator(small_model(), eos_token_id=eos)


def test_a_chat_keeps_its_history_and_forgets_on_reset(generator: Generator):
    chat = Chat(generator, max_new_tokens=4)

    first = "".join(chat.send("hello"))
    after_one = list(chat.messages)
    started: Any = chat.send("and now?")
    next(started, "")
    started.close()
    after_two = list(chat.messages)
    chat.reset()

    assert after_one == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    assert [message["role"] for message in after_two] == ["user", "assistant"] * 2
    assert chat.messages == []


def test_an_answer_of_nothing_but_blanks_enters_the_history_as_an_empty_one(generator: Generator):
    assert generator.tokenizer is not None
    (blank,) = generator.tokenizer.encode(" ", add_special_tokens=False)
    chat = Chat(generator, max_new_tokens=4, logit_bias={blank: 100.0})

    pieces = list(chat.send("hello"))
    again = list(chat.send("and now?"))

    assert pieces == again == []
    assert [message["content"] for message in chat.messages] == ["hello", "", "and now?", ""]


def test_in_a_chat_of_ten_turns_only_what_is_new_is_read(generator: Generator):
    assert generator.tokenizer is not None
    chat, read = Chat(generator, max_new_tokens=20), []
    new = len(generator.tokenizer.encode("<eos>User: question 1, and some more words\n\nAssistant:")) + 2

    for turn in range(10):
        answer = "".join(chat.send(f"question {turn}, and some more words"))
        encoded = len(generator.tokenizer.encode(answer))  # afresh, perhaps to other tokens
        read.append((generator.stats.prompt_tokens, generator.stats.reused_tokens, encoded))

    assert read[0][1] == 0
    for (prompt, reused, _), (_, before, answer) in zip(read[1:], read, strict=False):
        assert prompt <= new + answer
        assert reused > before


# What stands in front of an answer and what stands behind it are written in as many ways as there are templates.
TRIMS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | trim) + "
    "('\n\n' if m['role'] == 'user' else eos_token) }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'user' or not loop.last %}{{ m['role'] + ': ' + "
    "(m['content'] if m['role'] == 'user' else m['content'][1:]) + '\n' }}{% endif %}{% endfor %}"
)
LAST_TURN = "{{ messages | length }} messages, the last: {{ messages[-1]['content'] }}\n"


SAMPLED = {"max_new_tokens": 6, "temperature": 2.0, "seed": 1}
STOPPED = {"max_new_tokens": 8, "stop": ["e", "a", " "]}
ENDINGS = {
    "cut": {"max_new_tokens": 1},
    "sampled": SAMPLED,
    "ignore_eos": SAMPLED | {"ignore_eos": True},
    "stop": STOPPED,
    "stop_token_ids": {"max_new_tokens": 8, "stop_token_ids": list(range(2, 1000))},
    "half characters": {"max_new_tokens": 3, "logit_bias": {token: 100.0 for token in range(100, 200)}},
    "empty": {"max_new_tokens": 8, "logit_bias": {1: 100.0}},
}
TURNS = {
    **{ending: (None, params) for ending, params in ENDINGS.items()},
    "a template that trims": (TRIMS, SAMPLED),
    "a template that forgets": (FORGETS, STOPPED),
    "a template of the last turn": (LAST_TURN, SAMPLED),
}


@pytest.mark.parametrize(("template", "params"), TURNS.values(), ids=TURNS)
def test_a_turn_reads_the_rendered_history_encoded_afresh(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, params: dict
):
    tokenizer = Tokenizer.from_pretrained(folder)
    if template is not None:
        for file in tokenizer.files:
            shutil.copy(file, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizer.from_pretrained(tmp_path)
    made, read = Generator(small_model(), tokenizer, eos_token_id=[1, 7]), []
    start = made.start
    monkeypatch.setattr(made, "start", lambda ids, **options: read.append(ids) or start(ids, **options))
    chat = Chat(made, system="Be brief.", **params)

    for turn in range(3):
        pieces: Any = chat.send(f"d of end {turn}?")
        if turn == 1:
            next(pieces, "")
            pieces.close()
        "".join(pieces)
        history = chat.messages[:-1]

        assert read[turn] == tokenizer.encode(
            tokenizer.render_chat(history, add_generation_prompt=True), add_special_tokens=False
        )
    assert made([read[-1]], **params)[0].tokens == chat.tokens


def test_an_answer_cut_by_a_stop_string_enters_the_history_as_it_was_shown(generator: Generator):
    whole = Chat(generator, max_new_tokens=12, ignore_eos=True)
    text = "".join(whole.send("hello"))
    stop = text[3:6]

    chat = Chat(generator, max_new_tokens=12, ignore_eos=True, stop=stop)
    shown = "".join(chat.send("hello"))

    assert shown == text[: text.index(stop)]
    assert chat.messages[-1]["content"] == shown


def test_a_chat_takes_no_keys_from_a_stretched_turn():
    """Dynamic NTK turns the keys of a long turn by another base than those of a short one."""
    config = dataclasses.replace(SMALL, max_position_embeddings=24, rope_scaling=RopeScaling("dynamic", 2.0))
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    made, kept = Generator(DeepSeekMoE.init(config, seed=2)), []

    for ids in (range(10, 40), range(10, 20)):
        engine = made.engine()
        (answer,) = engine.submit(list(ids), params, keep=True)
        while engine.busy:
            engine.step()
        kept.append(answer.prefix is not None)

    assert kept == [False, True]


# --- how an answer ends ---


def test_an_answer_stops_before_a_stop_string_in_a_call_and_in_a_stream(generator: Generator):
    options = {"max_new_tokens": 24, "ignore_eos": True}
    (whole,) = generator(["import os"], **options)
    stop = whole.text[9:12]

    (answer,) = generator(["import os"], stop=[stop, "never to be seen"], **options)
    pieces = list(generator.stream("import os", stop=stop, **options))

    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) < len(whole.tokens)
    assert "".join(pieces) == answer.text


def test_a_stop_string_of_the_model_ends_an_answer_as_eos_does(generator: Generator):
    (whole,) = generator(["import os"], max_new_tokens=24, ignore_eos=True)
    stop, other = whole.text[9:12], whole.text[5:7]
    made = Generator(small_model(), generator.tokenizer, eos_token_id=[], stop_strings=[stop])

    (answer,) = made(["import os"], max_new_tokens=24)
    (sooner,) = made(["import os"], max_new_tokens=24, stop=other)
    (ignored,) = made(["import os"], max_new_tokens=24, ignore_eos=True)

    assert answer.text == "".join(made.stream("import os", max_new_tokens=24)) == whole.text[: whole.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert sooner.text == whole.text[: min(whole.text.index(other), whole.text.index(stop))]
    assert ignored == whole


def test_an_answer_without_its_stop_string_is_whole(generator: Generator):
    options = {"max_new_tokens": 8, "ignore_eos": True}

    plain, stopping = (generator(["import os"], stop=stop, **options)[0] for stop in ([], ["never to be seen"]))

    assert stopping == plain


def test_a_stream_that_is_closed_leaves_the_generator_usable(generator: Generator):
    options = {"max_new_tokens": 30, "ignore_eos": True}
    want = generator(["import os"], **options)[0].text
    pieces = generator.stream("import os", **options)

    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]

    assert want.startswith(first)
    assert generator(["import os"], **options)[0].text == want


def test_log_probabilities_are_those_of_the_model(generator: Generator):
    prompt = [5, 6, 7]

    (answer,) = generator([prompt], max_new_tokens=5, ignore_eos=True, logprobs=3, temperature=0.7, top_k=5)

    ids = np.array([[*prompt, *answer.tokens]])
    want = np.asarray(jax.nn.log_softmax(small_model()(ids).logits[0]))[len(prompt) - 1 : -1]
    for token, found, row in zip(answer.tokens, answer.logprobs or [], want, strict=True):
        assert found.logprob == pytest.approx(row[token], abs=1e-4)
        assert list(found.top) == np.argsort(-row, kind="stable")[:3].tolist()
        assert list(found.top.values()) == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


# --- scoring ---


def test_a_continuation_of_text_is_tokenized_with_its_prompt(generator: Generator):
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode("import os, sys")
    begun = len(generator.tokenizer.encode("import"))

    blank_before, blank_after, by_ids = generator.score(
        ["import", "import ", ids[:begun]], [" os, sys", "os, sys", ids[begun:]]
    )

    assert blank_before == blank_after == by_ids


@pytest.mark.parametrize("prompt", ["", " ", "\n ", []], ids=repr)
def test_an_empty_context_is_the_bos_token(generator: Generator, prompt: Any):
    assert generator.tokenizer is not None
    blank = prompt if isinstance(prompt, str) else ""
    ids = generator.tokenizer.encode(blank + "import os", add_special_tokens=False)

    assert generator.score([prompt], ["import os"]) == generator.score([[0]], [ids])


def test_an_empty_context_goes_before_token_ids(generator: Generator):
    assert generator.score([""], [[5, 6]]) == generator.score([[]], [[5, 6]]) == generator.score([[0]], [[5, 6]])


def test_an_empty_context_is_eos_where_there_is_no_bos():
    parts = split(small_model())[1]
    with_eos, with_neither = (
        Generator(assemble(dataclasses.replace(SMALL, bos_token_id=None, eos_token_id=eos), parts)) for eos in (1, None)
    )

    assert with_eos.score([[]], [[5, 6]]) == with_eos.score([[1]], [[5, 6]])
    with pytest.raises(ValueError, match="an empty prompt needs a BOS or EOS token"):
        with_neither.score([[]], [[5, 6]])


@pytest.mark.parametrize("text", ["", []], ids=repr)
def test_the_perplexity_of_nothing_is_refused(generator: Generator, text: Any):
    with pytest.raises(ValueError, match="nothing to predict: tokens has length 0"):
        generator.perplexity(text)


def test_perplexity_predicts_every_token_of_a_text_from_the_first_on(generator: Generator):
    assert generator.tokenizer is not None
    text = "import os\n" * 20
    ids = generator.tokenizer.encode(text)

    by_text, by_ids = generator.perplexity(text, window=16), generator.perplexity(ids, window=16)

    assert by_text.tokens == by_ids.tokens == len(ids) - 1  # the begin-of-sequence token is given
    assert by_text.nll == pytest.approx(by_ids.nll)
    assert by_text.bits_per_byte == pytest.approx(by_text.nll / np.log(2) / len(text))


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
        ([[1]], {"top_k": -2}, "top_k"),
        ([[1]], {"top_p": -0.1}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"seed": -2}, "seed"),
        ([[{"role": "pirate", "content": "arr"}]], {}, "pirate"),
    ],
)
def test_a_bad_call_is_refused_in_one_line(generator: Generator, prompts, options: dict, reason: str):
    with pytest.raises(ValueError, match=reason) as refused:
        generator(prompts, **options)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["assistant"], "message 0"),
        (["user", "user"], "message 1 of the chat is the user's"),
        (["system", "assistant"], "message 1 of the chat is the assistant's"),
        (["user", "assistant"], "the last message of a chat must be the user's"),
        (["system"], "the last message of a chat must be the user's"),
        (["user", "system", "user"], "message 1 of the chat is the system's"),
    ],
)
def test_a_chat_whose_roles_do_not_alternate_is_refused(generator: Generator, roles: list[str], reason: str):
    with pytest.raises(ValueError, match=reason):
        generator([[{"role": role, "content": "x"} for role in roles]])


def test_one_bad_prompt_of_many_gets_its_error_and_the_others_their_answers(generator: Generator):
    options = {"max_new_tokens": 4, "ignore_eos": True}

    good, bad, also_good = generator([[5, 6], [1, 2048], [7]], errors="return", **options)

    assert (good, also_good) == tuple(generator([[5, 6], [7]], **options))
    assert bad.finish_reason == "error"
    assert bad.error == "token id 2048 is outside the vocabulary of 2048"
    with pytest.raises(ValueError, match="2048 is outside"):
        generator([[5, 6], [1, 2048], [7]], **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"context_length": 1}, "context_length must be at least 2, not 1"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, not 0"),
        ({"prefill_chunk": 8}, "prefill_chunk must be at least 16, not 8"),
        ({"cache_dtype": "int4"}, "cache_dtype must be one of float32, bfloat16, float16, int8, not 'int4'"),
        ({"cache_dtype": np.int32}, "cache_dtype must be one of"),
        ({"cache_bytes": 0}, "cache_bytes must be at least 1, not 0"),
        ({"max_batch_size": 2.0}, "max_batch_size"),
    ],
)
def test_a_bad_option_of_the_generator_is_refused(options: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        Generator(small_model(), **options)


def test_weights_that_exceed_the_memory_are_refused_before_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dsmoe_jax.generate.generator.device_bytes", lambda: 100_000)

    with pytest.raises(ValueError, match=r"native: the weights take 0\.000\d* GB|and 0\.0001 GB are free"):
        Generator.from_pretrained(folder)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_weights_are_quantised_as_they_are_loaded(folder: Path, quantize: str):
    generator = Generator.from_pretrained(folder, quantize=quantize)

    (answer,) = generator(["import os"], max_new_tokens=4, ignore_eos=True)

    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(split(small_model())[1]))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(generator._params)) < 0.6 * dense
    assert len(answer.tokens) == 4


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
