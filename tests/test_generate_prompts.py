"""What a call of the generator takes and returns, and the sampling defaults of a checkpoint."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Chat, Completion, Generator, SamplingParams

FEW: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True}
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "prompt", ["import os", [5, 6], (5, 6), np.array([5, 6]), CHAT], ids=lambda one: type(one).__name__
)
def test_one_prompt_gives_one_completion(generator: Generator, prompt: Any):
    one = generator(prompt, **FEW)

    assert isinstance(one, Completion)
    assert generator([prompt], **FEW) == [one]


def test_rows_of_an_array_are_prompts(generator: Generator):
    prompts: Any = np.array([[5, 6], [7, 8]])

    assert generator(prompts, **FEW) == generator([[5, 6], [7, 8]], **FEW)


def test_several_outputs_are_nested_per_prompt(generator: Generator):
    params = SamplingParams(n=2, temperature=1.0, seed=3, **FEW)

    first, second = generator("import os", params)
    nested = generator(["import os", [5, 6]], params)
    mixed = generator(["import os", [5, 6]], [params, SamplingParams(**FEW)])

    assert [len(entry) for entry in nested] == [2, 2]
    assert nested[0] == [first, second]
    assert mixed == [nested[0], generator([5, 6], **FEW)]


def test_an_error_is_nested_as_outputs_are(generator: Generator):
    ((bad,), good) = generator([[2048], [5]], n=2, errors="return", **FEW)

    assert (bad.finish_reason, len(good)) == ("error", 2)


def test_progress_is_that_of_conversions(generator: Generator):
    seen: list[Any] = []

    @contextlib.contextmanager
    def meter(what: str, total: int) -> Iterator[Any]:
        seen.append((what, total))
        yield seen.append

    generator([[5], [6]], n=2, progress=meter, **FEW)

    assert seen[0] == ("completions", 4)
    assert sum(seen[1:]) == 4


def test_scores_refuse_a_string_for_a_list(generator: Generator):
    with pytest.raises(DSMoEError, match=r"^prompts must be a list, got the string 'abc'$"):
        generator.score("abc", "abc")


def write_defaults(folder: Path, **fields: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **fields}))
    return folder


# fields of generation_config.json | overrides | parameters
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "of the 16B chat": (
        {"do_sample": True, "temperature": 0.7, "top_p": 0.95},
        {},
        {"temperature": 0.7, "top_p": 0.95},
    ),
    "greedy": ({"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}, {}, {"repetition_penalty": 1.1}),
    "do_sample is false": ({"do_sample": False, "top_k": 7, "max_new_tokens": 9}, {}, {"max_new_tokens": 9}),
    "no temperature": ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {}, {"temperature": 1.0, "min_p": 0.1}),
    "null": ({"do_sample": True, "temperature": None}, {}, {"temperature": 1.0}),
    "overrides": (
        {"do_sample": True, "temperature": 0.7, "max_new_tokens": 9},
        {"temperature": 0.0, "max_tokens": 5},
        {"max_new_tokens": 5},
    ),
}


@pytest.mark.parametrize(("fields", "overrides", "want"), DEFAULTS.values(), ids=DEFAULTS)
def test_sampling_defaults_are_read(tmp_path: Path, fields: dict, overrides: dict, want: dict):
    write_defaults(tmp_path, **fields)

    assert SamplingParams.from_pretrained(tmp_path, **overrides) == SamplingParams(**want)


def test_a_folder_without_generation_config_is_greedy(tmp_path: Path):
    assert SamplingParams.from_pretrained(tmp_path, n=2) == SamplingParams(n=2)


def test_a_bad_sampling_default_names_its_file(tmp_path: Path):
    write_defaults(tmp_path, do_sample=True, top_p=7)

    with pytest.raises(DSMoEError, match=r"generation_config\.json: top_p must be in \[0, 1\], got 7$"):
        SamplingParams.from_pretrained(tmp_path)


def test_an_unknown_sampling_parameter_suggests_a_name():
    with pytest.raises(DSMoEError, match=r"^unknown sampling parameter 'top_kk'; did you mean 'top_k'\?$"):
        SamplingParams(top_kk=5)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def sampled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with sampling defaults."""
    copy = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("sampled") / "copy"))
    return write_defaults(copy, do_sample=True, temperature=0.7, top_p=0.95)


def test_a_chat_uses_the_sampling_defaults(sampled: Path, caplog: pytest.LogCaptureFixture):
    generator = Generator.from_pretrained(sampled, verify=False)
    caplog.set_level(logging.INFO, "dsmoe_jax")

    chats = Chat(generator), Chat(generator, temperature=0.2, max_tokens=3)

    assert [chat.params for chat in chats] == [
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 0.2, "top_p": 0.95, "max_tokens": 3},
    ]
    lines = [record.getMessage() for record in caplog.records if "Sampling" in record.getMessage()]
    start = "Sampling defaults from generation_config.json: "
    assert lines == [f"{start}temperature 0.7, top_p 0.95", f"{start}top_p 0.95"]
    assert generator([5, 6], **FEW) == generator([5, 6], temperature=0.0, **FEW)


def test_a_chat_checks_its_parameters_at_the_start(generator: Generator):
    with pytest.raises(DSMoEError, match=r"^temperature must be in"):
        Chat(generator, temperature=-1)
    with pytest.raises(DSMoEError, match=r"did you mean 'temperature'"):
        Chat(generator, temprature=0.7)


def test_a_chat_needs_a_tokenizer_with_a_template(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    assert generator.tokenizer is not None
    monkeypatch.setattr(generator.tokenizer, "chat_templates", {})
    with pytest.raises(
        DSMoEError, match=r"^a chat needs a chat template, and this generator has none; `dsmoe generate`"
    ):
        Chat(generator)

    monkeypatch.setattr(generator, "tokenizer", None)
    with pytest.raises(DSMoEError, match=r"^a chat needs a tokenizer, and this generator has none"):
        Chat(generator)
