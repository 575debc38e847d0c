"""Data preparation of a run, and data of version 0.1."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.corpus import prepare
from dsmoe_jax.train.data import TokenShards, is_validation, tokenize, validation_threshold
from dsmoe_jax.train.job import pretraining
from dsmoe_jax.train.preflight import check_inputs
from dsmoe_jax.train.sft import Examples, write_examples
from tests.helpers.corpus import hand_made_shards, write_texts
from tests.helpers.hf_folder import snapshot, tiny

OLD = Path(__file__).parent / "data" / "v0_1"
VOCABULARY = 300
VAL_FRACTION = 0.3


def prepared(out: Path, model: ModelConfig, *sources: Path) -> dict[str, Any]:
    """Files of the tokenizer trained on the sources."""
    data = DataConfig(sources=tuple(map(str, sources)), val_fraction=VAL_FRACTION, sequence_length=16)

    corpus = prepare(RunConfig(output_dir=str(out), data=data), model, out)

    assert corpus.tokenizer is not None
    return snapshot(corpus.tokenizer)


def test_tokenizer_is_trained_on_the_training_split(tmp_path: Path):
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcd", k=5)) for _ in range(40)) for _ in range(40)]
    training = [text for text in texts if not is_validation(text.encode(), validation_threshold([], VAL_FRACTION))]
    assert 5 < len(training) < len(texts) - 5
    first = write_texts(tmp_path / "first.jsonl", texts[:25])
    second = write_texts(tmp_path / "second.jsonl", texts[25:])

    found = prepared(tmp_path / "out", tiny(vocab_size=VOCABULARY), first, second)

    train_tokenizer(training, tmp_path / "expected", VOCABULARY)
    train_tokenizer(texts, tmp_path / "other", VOCABULARY)
    assert found == snapshot(tmp_path / "expected") != snapshot(tmp_path / "other")
    assert found == prepared(tmp_path / "again", tiny(vocab_size=VOCABULARY), first, second)


def test_examples_are_refused_for_pretraining(tmp_path: Path):
    train_tokenizer(["ab"] * 9, tmp_path / "tokenizer", VOCABULARY)
    (tmp_path / "some.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    write_examples(tmp_path / "some.jsonl", tmp_path / "tokenizer", tmp_path / "examples", sequence_length=8)

    (tmp_path / "model.json").write_text(json.dumps(tiny(vocab_size=VOCABULARY).to_dict()))
    data = DataConfig(sources=(str(tmp_path / "examples"),))

    with pytest.raises(ValueError, match=r"examples: holds examples for `dsmoe finetune`"):
        check_inputs(RunConfig(output_dir=str(tmp_path / "out"), model=str(tmp_path / "model.json"), data=data))


def test_shards_bring_their_tokenizer(tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture):
    tokenize(
        write_texts(tmp_path / "a.jsonl", ["some text"] * 3), tokenizer_folder, tmp_path / "shards", val_fraction=0.0
    )
    (tmp_path / "model.json").write_text(json.dumps(tiny(vocab_size=VOCABULARY).to_dict()))
    data = DataConfig(sources=(str(tmp_path / "shards"),), sequence_length=16, batch_size=2, val_fraction=0.0)
    config = RunConfig(output_dir=str(tmp_path / "out"), model=str(tmp_path / "model.json"), data=data)

    job = pretraining(config, tmp_path / "out")

    assert job.corpus.tokenizer is not None
    assert job.corpus.tokenizer == tmp_path / "shards" / "tokenizer"
    assert snapshot(job.corpus.tokenizer) == snapshot(tokenizer_folder)
    assert (job.model.bos_token_id, job.model.eos_token_id) == (0, 1)
    assert not caplog.messages
    (tmp_path / "shards" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"damaged: 'tokenizer/tokenizer.json' has 2 bytes"):
        TokenShards.open(tmp_path / "shards")


def test_shards_without_a_tokenizer_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    hand_made_shards(tmp_path / "shards", [20, 20])
    (tmp_path / "model.json").write_text(json.dumps(tiny(vocab_size=VOCABULARY).to_dict()))
    data = DataConfig(sources=(str(tmp_path / "shards"),), sequence_length=16, batch_size=2, val_fraction=0.0)
    config = RunConfig(output_dir=str(tmp_path / "out"), model=str(tmp_path / "model.json"), data=data)

    assert pretraining(config, tmp_path / "out").corpus.tokenizer is None

    assert "No tokenizer: the model is saved without one; pass --data.tokenizer FOLDER" in caplog.messages


def recorded(checkpoint: Path) -> tuple[str, str]:
    """Digests of training and validation split in a checkpoint of version 0.1."""
    facts = json.loads((checkpoint / "manifest.json").read_text())["facts"]
    return facts["stream"]["datasets"][0], facts["inputs"]["heldout"][0]


def test_shards_of_version_0_1_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    data = DataConfig(sources=("texts.jsonl",), val_fraction=0.2, sequence_length=32, batch_size=2)
    before = snapshot(Path("run/data"))

    corpus = prepare(RunConfig(output_dir="run", data=data), tiny(vocab_size=VOCABULARY), Path("run"), resuming=True)

    digests = corpus.stream.identity["datasets"][0], corpus.inputs["validation"][0]
    assert digests == recorded(Path("run/checkpoints/step-00000002"))
    assert {name: data for name, data in snapshot(Path("run/data")).items() if ".verified" not in name} == before


def test_examples_of_version_0_1_are_read_and_made_again_equal(tmp_path: Path):
    shutil.copytree(OLD / "finetune" / "examples", tmp_path / "old")
    (folder,) = (tmp_path / "old").iterdir()
    options: dict[str, Any] = {"sequence_length": 64, "val_fraction": 0.1}
    write_examples(OLD / "examples.jsonl", OLD / "run" / "model", tmp_path / "new", **options)

    old, new = (
        [Examples.open(home, split) for split in ("train", "validation")] for home in (folder, tmp_path / "new")
    )

    digests = tuple(examples.digest for examples in old)
    assert digests == recorded(OLD / "finetune" / "checkpoints" / "step-00000002")
    assert digests == tuple(examples.digest for examples in new)
    assert old[0].example(3).loss_mask.tolist() == new[0].example(3).loss_mask.tolist()
    (folder / "examples.json").write_text((folder / "examples.json").read_text().replace('"all"', '"oll"'))
    with pytest.raises(ValueError, match=r"damaged: 'examples.json' does not match its SHA-256"):
        Examples.open(folder)
    (folder / "examples.json").unlink()
    (folder / "train-00000.tokens").unlink()
    with pytest.raises(ValueError, match=r"damaged: 'train-00000.tokens' is missing"):
        TokenShards.open(folder)
