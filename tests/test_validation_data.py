"""Validation data: at least one document held out, and sources of one's own."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.corpus import STDLIB_VAL_FRACTION, VAL_FRACTION, Corpus, _val_fraction, prepare
from dsmoe_jax.train.data import TokenShards, tokenize, validation_threshold
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig, open_examples
from dsmoe_jax.train.resume import check_resumable
from dsmoe_jax.train.sft import write_examples
from tests.helpers.corpus import hand_made_shards, ids_of, write_texts
from tests.helpers.hf_folder import tiny

TEXTS = [f"document {n} of twenty" for n in range(20)]
NONE = 1e-9  # a fraction that selects none of them
VOCABULARY = 300


def split_texts(folder: Path, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The texts of both splits."""
    train, validation = (
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_of(split)]
        for split in TokenShards.open_splits(folder)
    )
    return train, validation


# At least one document


def test_the_smallest_hash_is_held_out_of_a_small_corpus(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path):
    shuffled = [*TEXTS, *TEXTS]
    random.Random(0).shuffle(shuffled)
    for name, texts in (("one", TEXTS), ("twice", shuffled)):
        tokenize(write_texts(tmp_path / f"{name}.jsonl", texts), tokenizer_folder, tmp_path / name, val_fraction=NONE)

    (train, validation), (_, twice) = (split_texts(tmp_path / name, tokenizer) for name in ("one", "twice"))

    assert len(validation) == 1
    assert train == [text for text in TEXTS if text not in validation]
    assert twice == validation * 2


@pytest.mark.parametrize("texts", [["alone"], ["same"] * 9], ids=["one", "equal"])
def test_nothing_is_held_out_if_nothing_would_be_left(tmp_path: Path, tokenizer_folder: Path, texts: list[str]):
    made = tokenize(write_texts(tmp_path / "a.jsonl", texts), tokenizer_folder, tmp_path / "out", val_fraction=0.01)

    assert (made.train.documents, made.validation.documents) == (len(texts), 0)


def test_the_fraction_decides_where_it_selects_any():
    contents = [str(n).encode() for n in range(100)]

    assert validation_threshold(contents, 0.1) == validation_threshold([], 0.1)
    assert validation_threshold(contents, 0.0) == 0


def test_an_example_is_held_out_of_a_few(tmp_path: Path, tokenizer_folder: Path):
    rows = [{"prompt": f"{n}", "completion": "b"} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    made = write_examples(
        tmp_path / "a.jsonl", tokenizer_folder, tmp_path / "out", sequence_length=32, val_fraction=NONE
    )

    assert (made.train.documents, made.validation.documents) == (49, 1)


def test_malformed_lines_are_logged_once(tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture):
    path = write_texts(tmp_path / "a.jsonl", [f"{n}" for n in range(200)])
    path.write_bytes(path.read_bytes() + b"{\n")

    prepare(run_config(tmp_path / "out", path), tiny(vocab_size=VOCABULARY), tmp_path / "out")

    assert caplog.text.count("Skipping malformed line") == caplog.text.count("skipped 1 malformed line of 201") == 1


# Sources of one's own


def test_tokenize_takes_validation_sources(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path):
    train, validation = (
        write_texts(tmp_path / name, texts) for name, texts in (("a.jsonl", TEXTS[:9]), ("b.jsonl", TEXTS[9:]))
    )
    flags = ["--validation", validation, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out"]

    assert main(["tokenize", str(train), *map(str, flags)]) == 0

    assert split_texts(tmp_path / "out", tokenizer) == (TEXTS[:9], TEXTS[9:])
    assert TokenShards.open(tmp_path / "out").val_fraction == 0


def test_a_file_in_both_sets_is_refused(tmp_path: Path, tokenizer_folder: Path):
    one = write_texts(tmp_path / "data" / "a.jsonl", TEXTS)
    write_texts(tmp_path / "data" / "b.jsonl", TEXTS)

    with pytest.raises(ValueError, match=r"a.jsonl: in both the training and the validation data; leave it out of one"):
        tokenize(tmp_path / "data", tokenizer_folder, tmp_path / "out", validation=one)


def run_config(out: Path, *sources: Path, **data: Any) -> RunConfig:
    shape: dict[str, Any] = {"sequence_length": 16, "batch_size": 2}
    return RunConfig(output_dir=str(out), data=DataConfig(sources=tuple(map(str, sources)), **shape, **data))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    home = tmp_path_factory.mktemp("validation")
    write_texts(home / "a.jsonl", TEXTS[:9])
    write_texts(home / "b.jsonl", TEXTS[9:])
    tokenize(home / "b.jsonl", tokenizer_folder, home / "shards")
    return home


def prepared(home: Path, out: Path, tokenizer: Path, *validation: str, **options: Any) -> Corpus:
    own = tuple(str(home / name) for name in validation)
    config = run_config(out, home / "a.jsonl", validation=own, tokenizer=str(tokenizer))
    return prepare(config, tiny(vocab_size=VOCABULARY), out, **options)


@pytest.mark.parametrize("source", ["b.jsonl", "shards"])
def test_a_run_validates_on_its_own_set(home: Path, tmp_path: Path, tokenizer_folder: Path, source: str):
    corpus = prepared(home, tmp_path, tokenizer_folder, source)

    labels = sum(int((batch.labels != -100).sum()) for batch in corpus.validation(process_index=0, process_count=1))
    shards = [split for split in TokenShards.open_splits(home / "shards") if len(split)]
    tokens = sum(split.tokens for split in shards)
    assert 0.8 * tokens < labels < tokens
    assert TokenShards.open(tmp_path / "data" / "00").tokens == sum(len(f"{t}") + 2 for t in TEXTS[:9])
    assert "val_fraction" not in corpus.settings


def test_another_validation_set_does_not_resume(home: Path, tmp_path: Path, tokenizer_folder: Path):
    write_texts(tmp_path / "c.jsonl", ["another"])
    known = prepared(home, tmp_path / "out", tokenizer_folder, "b.jsonl")
    now = prepared(home, tmp_path / "other", tokenizer_folder, str(tmp_path / "c.jsonl"))
    old, new = ({"stream": c.stream.identity, "inputs": dict(c.inputs), "config": {}} for c in (known, now))

    with pytest.raises(ValueError, match="cannot resume from step 1: the validation data has changed"):
        check_resumable(tmp_path, 1, old, new)
    with pytest.raises(ValueError, match=r"cannot resume on changed data: --data.validation: .*b.jsonl -> .*c.jsonl"):
        prepared(home, tmp_path / "out", tokenizer_folder, str(tmp_path / "c.jsonl"), resuming=True)


def test_validating_on_training_shards_is_refused(home: Path, tmp_path: Path):
    config = run_config(tmp_path, home / "shards", validation=(str(home / "shards"),))

    with pytest.raises(ValueError, match=r"shards: in both data.sources and data.validation"):
        prepare(config, tiny(vocab_size=VOCABULARY), tmp_path)


def test_texts_need_the_tokenizer_of_the_shards(home: Path, tmp_path: Path):
    hand_made_shards(tmp_path / "shards", [20, 20])
    config = run_config(tmp_path, tmp_path / "shards", validation=(str(home / "a.jsonl"),))

    with pytest.raises(ValueError, match=r"data.tokenizer must be set to tokenize .*a.jsonl"):
        prepare(config, tiny(vocab_size=VOCABULARY), tmp_path)


def test_validation_cannot_be_added_to_a_run(
    home: Path, tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    model, options = tiny(vocab_size=VOCABULARY), {"tokenizer": str(tokenizer_folder), "val_fraction": 0.5}
    prepare(run_config(tmp_path, home / "a.jsonl", **options), model, tmp_path)
    changed = run_config(tmp_path, home / "a.jsonl", validation=(str(home / "b.jsonl"),), **options)

    with pytest.raises(ValueError, match=r"changed data: --data.validation: none -> .*b.jsonl; pass the earlier value"):
        prepare(changed, model, tmp_path, resuming=True)

    assert "is not applied" not in caplog.text


def test_equal_texts_leave_no_validation_split(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
):
    tokenize(write_texts(tmp_path / "a.jsonl", ["same"] * 30), tokenizer_folder, tmp_path / "shards")

    assert caplog.messages == [f"{tmp_path / 'shards'}: no validation split: all 30 documents have the same text"]


def test_finetuning_validates_on_its_own_examples(tmp_path: Path, checkpoint: Path):
    for name, count in (("a", 30), ("b", 7)):
        rows = [{"prompt": f"{name} {n}", "completion": "c"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ExamplesConfig(files=(str(tmp_path / "a.jsonl"),), validation=(str(tmp_path / "b.jsonl"),), val_fraction=0.5)
    config = FinetuneConfig(output_dir=str(tmp_path / "out"), init_from=str(checkpoint), data=data)

    _, train, validation, inputs = open_examples(config, config.model_config(), tmp_path / "out")

    assert (len(train), len(validation)) == (30, 7)
    assert set(inputs["files"]) == {str(tmp_path / f"{name}.jsonl") for name in "ab"}
    assert inputs["options"]["data.val_fraction"] == 0


# The default fraction


@pytest.mark.parametrize(
    ("data", "recorded", "want"),
    [
        ({}, None, VAL_FRACTION),
        ({}, 0.2, 0.2),
        ({"val_fraction": 0.3}, 0.2, 0.3),
        ({"val_fraction": 0.0}, None, 0.0),
        ({"sources": ("python-stdlib",)}, None, STDLIB_VAL_FRACTION),
        ({"validation": ("b.jsonl",), "val_fraction": 0.3}, None, 0.0),
    ],
    ids=["default", "resumed", "set", "none", "stdlib", "own"],
)
def test_the_fraction_of_a_run(data: dict[str, Any], recorded: float | None, want: float):
    assert _val_fraction(DataConfig(**{"sources": ("a.jsonl",), **data}), recorded) == want


def test_a_resumed_run_keeps_its_recorded_fraction(home: Path, tmp_path: Path, tokenizer_folder: Path):
    def digests(fraction: float | None, **options: Any) -> Any:
        config = run_config(tmp_path, home / "a.jsonl", tokenizer=str(tokenizer_folder), val_fraction=fraction)
        corpus = prepare(config, tiny(vocab_size=VOCABULARY), tmp_path, **options)
        return corpus.settings["val_fraction"], corpus.inputs["validation"]

    first = digests(0.5)

    assert digests(None, resuming=True) == first
    assert digests(None)[0] == VAL_FRACTION
