"""Special token ids of config, generation config and tokenizer: warnings, errors, import and export."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import export_hf, import_hf
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.special_ids import check_special_ids, drop_ids_outside_vocab, with_special_ids
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from tests.helpers.hf_folder import edit, random_params, tiny, write_hf


@dataclasses.dataclass
class Tokens:
    """A stub tokenizer."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1


def config(**fields: Any) -> ModelConfig:
    known: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    return ModelConfig(**known | fields)


@pytest.mark.parametrize(
    ("fields", "tokenizer", "generation"),
    [
        ({}, Tokens(), {"eos_token_id": 1}),
        ({}, None, None),
        ({}, Tokens(), {"eos_token_id": [1, 5], "bos_token_id": None}),
        ({"bos_token_id": None, "eos_token_id": None}, Tokens(), None),
        ({"bos_token_id": None, "eos_token_id": None}, Tokens(None, None), {}),
        ({"pad_token_id": -1}, None, {"pad_token_id": 63}),
        ({"eos_token_id": [5, 1]}, Tokens(), None),
    ],
    ids=str,
)
def test_consistent_ids_give_no_warning(fields: dict, tokenizer: Tokens | None, generation: dict | None):
    assert check_special_ids(config(**fields), tokenizer, generation, "here") == []


@pytest.mark.parametrize(
    ("fields", "tokenizer", "generation", "line"),
    [
        ({"pad_token_id": 64}, None, None, "pad_token_id 64 of config.json is outside the vocabulary of 64 tokens"),
        ({"bos_token_id": 70}, None, None, "bos_token_id 70 of config.json is outside the vocabulary of 64 tokens"),
        ({}, Tokens(), {"eos_token_id": 99}, "eos_token_id 99 of generation_config.json is outside the vocabulary"),
        ({"eos_token_id": 99}, Tokens(), None, "eos_token_id 99 of config.json is outside the vocabulary"),
        ({}, None, {"eos_token_id": [1, 99]}, "eos_token_id 99 of generation_config.json is outside the vocabulary"),
        ({"bos_token_id": 3}, Tokens(), None, "bos_token_id is 3 in config.json, 0 in the tokenizer"),
        ({"eos_token_id": 3}, Tokens(), None, r"eos_token_id 1 of the tokenizer is not among the EOS ids of .*\[3\]"),
    ],
    ids=str,
)
def test_suspicious_ids_give_one_warning(fields: dict, tokenizer: Any, generation: Any, line: str):
    (warning,) = check_special_ids(config(**fields), tokenizer, generation, "here")

    assert warning.startswith("here: ")
    assert re.search(line, warning)


@pytest.mark.parametrize(
    ("fields", "tokenizer", "generation", "line"),
    [
        ({"eos_token_id": 64}, None, None, "eos_token_id 64 is outside the vocabulary of 64 tokens, so generation"),
        ({"eos_token_id": [64, 99]}, Tokens(None, 64), None, "generation would never stop"),
        ({}, None, {"eos_token_id": 64}, "generation would never stop"),
        ({}, None, {"eos_token_id": -1}, "generation would never stop"),
        ({"bos_token_id": None}, Tokens(bos_token_id=64), None, "bos_token_id 64 of the tokenizer is outside"),
        ({}, None, {"eos_token_id": "1"}, "generation_config.json: eos_token_id must be a token id or a list"),
        ({}, None, {"eos_token_id": [True]}, "eos_token_id must be a token id"),
    ],
    ids=str,
)
def test_invalid_ids_are_an_error(fields: dict, tokenizer: Any, generation: Any, line: str):
    with pytest.raises(ValueError, match=f"^here: .*{line}"):
        check_special_ids(config(**fields), tokenizer, generation, "here")


def test_new_model_gets_the_ids_of_its_tokenizer():
    model = with_special_ids(config(eos_token_id=5), None, 1)

    assert (model.bos_token_id, model.eos_token_id) == (0, 1)


def test_ids_outside_the_vocabulary_are_dropped():
    fields = {"eos_token_id": [1, 64, 2], "bos_token_id": [64], "pad_token_id": 63, "top_k": 5}

    assert drop_ids_outside_vocab(fields, 64) == fields | {"eos_token_id": [1, 2], "bos_token_id": None}


def test_other_ids_outside_the_vocabulary_are_dropped():
    fields = {"decoder_start_token_id": 99, "unk_token_id": 3, "eos_token_id": -1, "pad_token_id": -1}

    assert drop_ids_outside_vocab(fields, 64) == fields | {"decoder_start_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    train_tokenizer(["one two three"], folder, 262)
    return folder


def test_trained_tokenizer_equals_the_tokenizers_library(vocabulary: Path):
    text = "two ü three"
    theirs = tokenizers.Tokenizer.from_file(str(vocabulary / "tokenizer.json"))

    assert theirs.encode(text).ids == Tokenizer.from_pretrained(vocabulary).encode(text)
    assert theirs.encode(text).ids[0] == 0
    assert read_json(vocabulary / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def folder_with(path: Path, vocabulary: Path, generation: dict | None, **fields: Any) -> Path:
    model = tiny(vocab_size=1024, **fields)
    write_hf(path, model, random_params(model))
    for file in vocabulary.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    if generation is not None:
        write_json(path / "generation_config.json", generation)
    return path


def test_export_takes_missing_ids_from_the_tokenizer(tmp_path: Path, vocabulary: Path):
    # As in checkpoints of earlier versions, the original's ids.
    source = folder_with(tmp_path / "hf", vocabulary, None)
    edit("config.json", lambda fields: fields.update(bos_token_id=100000, eos_token_id=100001))(source)

    import_hf(source, tmp_path / "native")
    back = export_hf(tmp_path / "native", tmp_path / "back").path

    tokenizer = Tokenizer.from_pretrained(back)
    for file in ("config.json", "generation_config.json"):
        fields = read_json(back / file)
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_export_drops_ids_outside_the_vocabulary(tmp_path: Path, vocabulary: Path, caplog: pytest.LogCaptureFixture):
    generation = {"eos_token_id": [1, 5000], "pad_token_id": 1024, "temperature": 0.5}
    source = folder_with(tmp_path / "hf", vocabulary, generation, pad_token_id=1024, eos_token_id=(1, 2000))

    with caplog.at_level(logging.WARNING):
        import_hf(source, tmp_path / "native")
    back = export_hf(tmp_path / "native", tmp_path / "back").path

    assert "pad_token_id 1024 of config.json is outside the vocabulary of 1024 tokens" in caplog.text
    assert read_json(back / "generation_config.json") == {"eos_token_id": 1, "pad_token_id": None, "temperature": 0.5}
    assert read_json(back / "config.json").items() >= {"eos_token_id": 1, "pad_token_id": None}.items()


def test_export_replaces_an_invalid_eos_by_the_tokenizers(tmp_path: Path, vocabulary: Path):
    source = folder_with(tmp_path / "hf", vocabulary, {"eos_token_id": 5000}, eos_token_id=5000)

    import_hf(source, tmp_path / "native")
    back = export_hf(tmp_path / "native", tmp_path / "back").path

    assert read_json(back / "config.json")["eos_token_id"] == 1
    assert read_json(back / "generation_config.json") == {"eos_token_id": 1}


def test_import_rejects_a_model_without_a_valid_eos(tmp_path: Path, vocabulary: Path):
    source = folder_with(tmp_path / "hf", vocabulary, {"eos_token_id": 5000})
    (source / "tokenizer.json").unlink()

    with pytest.raises(ValueError, match="eos_token_id 5000 is outside the vocabulary of 1024 tokens"):
        import_hf(source, tmp_path / "native")

    assert not (tmp_path / "native").exists()
