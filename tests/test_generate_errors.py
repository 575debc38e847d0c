"""Invalid prompts, parameters, options and generation configs of `Generator`."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from tests.helpers.small import SMALL, small_model


@pytest.mark.parametrize("named", [5000, [5000, 100001], -1])
def test_eos_ids_outside_the_vocabulary_are_ignored(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, named: Any
):
    shutil.copytree(checkpoint, tmp_path / "native")
    (tmp_path / "native" / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))

    made = Generator.from_pretrained(tmp_path / "native")

    assert made.eos_token_ids == {1}
    first = named if isinstance(named, int) else named[0]
    assert f"eos_token_id {first} is outside the vocabulary of 2048: using 1" in caplog.text


def test_config_eos_outside_the_vocabulary_logs_a_warning(caplog: pytest.LogCaptureFixture):
    config = dataclasses.replace(SMALL, eos_token_id=5000)

    made = Generator(assemble(config, split(small_model())[1]))

    assert made.eos_token_ids == frozenset()
    assert "eos_token_id 5000 is outside the vocabulary of 2048: no EOS token is left" in caplog.text
    with pytest.raises(ValueError, match="eos_token_id 2048 is outside the vocabulary of 2048"):
        Generator(small_model(), eos_token_id=[1, 2048])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"eos_token_id": "x"},
            "generation_config.json: eos_token_id must be a token id or a list of token ids, got 'x'",
        ),
        ({"stop_strings": [1]}, r"generation_config.json: stop_strings must be .*, got \[1\]"),
        ({"stop_strings": ""}, "generation_config.json: stop_strings must be .*, got ''"),
    ],
)
def test_invalid_generation_config_is_rejected(checkpoint: Path, tmp_path: Path, fields: dict, reason: str):
    shutil.copytree(checkpoint, tmp_path / "native")
    (tmp_path / "native" / "generation_config.json").write_text(json.dumps(fields))

    with pytest.raises(ValueError, match=reason):
        Generator.from_pretrained(tmp_path / "native")


def test_tokens_of_another_model_are_rejected(generator: Generator):
    config = dataclasses.replace(SMALL, vocab_size=300)
    made = Generator(DeepSeekMoE.init(config), generator.tokenizer)

    with pytest.raises(ValueError, match=r"token id \d+ is outside the vocabulary of 300"):
        made(["import os"])


@pytest.mark.parametrize("eos", ["</s>", [7, "x"], 0.5, {}])
def test_eos_that_is_no_token_id_is_rejected(eos):
    with pytest.raises(ValueError, match="eos_token_id"):
        Generator(small_model(), eos_token_id=eos)


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([], {}, r"must be text, token ids, a chat, or a non-empty list of these, got \[\]"),
        (b"text", {}, "got b'text'"),
        ({"role": "user", "content": "hi"}, {}, "prompts must be text, token ids, a chat"),
        ("", {}, "the prompt is empty"),
        ([""], {}, "empty"),
        ([[]], {}, "empty"),
        ([[1, 2048]], {}, "2048 is outside the vocabulary of 2048"),
        ([[-1]], {}, "-1 is outside"),
        ([[0.5]], {}, "int"),
        ([[1, [2]]], {}, "flat list of integers"),
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
def test_invalid_call_is_rejected_in_one_line(generator: Generator, prompts, options: dict, reason: str):
    with pytest.raises(ValueError, match=reason) as refused:
        generator(prompts, **options)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["assistant"], "message 0"),
        (["user", "user"], "message 1 of the chat must have role 'assistant', got 'user'"),
        (["system", "assistant"], "message 1 of the chat must have role 'user', got 'assistant'"),
        (["user", "assistant"], "the last message of a chat must have role 'user'"),
        (["system"], "the last message of a chat must have role 'user'"),
        (["user", "system", "user"], "message 1 of the chat must have role 'assistant', got 'system'"),
    ],
)
def test_roles_must_alternate(generator: Generator, roles: list[str], reason: str):
    with pytest.raises(ValueError, match=reason):
        generator([[{"role": role, "content": "x"} for role in roles]])


def test_invalid_prompt_returns_its_error_and_others_complete(generator: Generator):
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
        ({"context_length": 1}, "context_length must be an int of at least 2, got 1"),
        ({"max_batch_size": 0}, "max_batch_size must be an int of at least 1, got 0"),
        ({"prefill_chunk": 8}, "prefill_chunk must be an int of at least 16, got 8"),
        ({"cache_dtype": "int4"}, "cache_dtype must be one of float32, bfloat16, float16, int8, got 'int4'"),
        ({"cache_dtype": np.int32}, "cache_dtype must be one of"),
        ({"cache_bytes": 0}, "cache_bytes must be an int of at least 1, got 0"),
        ({"max_batch_size": 2.0}, "max_batch_size"),
    ],
)
def test_invalid_option_is_rejected(options: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        Generator(small_model(), **options)


def test_weights_that_exceed_memory_are_rejected_before_loading(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("dsmoe_jax.generate.loading.available_bytes", lambda mesh: 100_000)

    with pytest.raises(DSMoEError, match=r"native needs at least .* per device, 100 kB are available: .*--force"):
        Generator.from_pretrained(checkpoint)

    assert Generator.from_pretrained(checkpoint, force=True)
    assert "Loading although" in caplog.text


def test_text_without_a_tokenizer_is_rejected():
    generator = Generator(small_model())

    with pytest.raises(ValueError, match="needs a tokenizer"):
        generator(["text"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generator.stream([1, 2])


def test_stream_rejects_an_invalid_prompt_at_once(generator: Generator):
    with pytest.raises(ValueError, match="context_length"):
        generator.stream("import os", max_new_tokens=10_000)
