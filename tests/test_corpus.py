"""What a run makes of its sources before the first step."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.corpus import prepare
from dsmoe_jax.train.data import is_validation
from dsmoe_jax.train.sft import write_examples
from tests.helpers.corpus import write_texts
from tests.helpers.hf_folder import snapshot, tiny

VOCABULARY = 300
HOLDOUT = 0.3


def prepared(out: Path, model: ModelConfig, *sources: Path) -> dict[str, Any]:
    """The files of the tokenizer that is trained where none is known."""
    data = DataConfig(sources=tuple(map(str, sources)), val_fraction=HOLDOUT, sequence_length=16)

    corpus = prepare(RunConfig(output_dir=str(out), data=data), model, out)

    assert corpus.tokenizer is not None
    return snapshot(corpus.tokenizer)


def test_a_vocabulary_is_trained_on_nothing_that_is_held_out(tmp_path: Path):
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcd", k=5)) for _ in range(40)) for _ in range(40)]
    seen = [text for text in texts if not is_validation(text.encode(), HOLDOUT)]
    assert 5 < len(seen) < len(texts) - 5
    first = write_texts(tmp_path / "first.jsonl", texts[:25])
    second = write_texts(tmp_path / "second.jsonl", texts[25:])

    found = prepared(tmp_path / "out", tiny(vocab_size=VOCABULARY), first, second)

    train_tokenizer(seen, tmp_path / "wanted", VOCABULARY)
    train_tokenizer(texts, tmp_path / "other", VOCABULARY)
    assert found == snapshot(tmp_path / "wanted") != snapshot(tmp_path / "other")
    assert found == prepared(tmp_path / "again", tiny(vocab_size=VOCABULARY), first, second)


def test_examples_to_fine_tune_on_are_no_texts(tmp_path: Path):
    train_tokenizer(["ab"] * 9, tmp_path / "tokenizer", VOCABULARY)
    (tmp_path / "some.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    write_examples(tmp_path / "some.jsonl", tmp_path / "tokenizer", tmp_path / "examples", sequence_length=8)

    with pytest.raises(ValueError, match=r"examples: holds examples for `dsmoe finetune`"):
        prepared(tmp_path / "out", tiny(vocab_size=VOCABULARY), tmp_path / "examples")
