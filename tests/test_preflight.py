"""Checks before a run writes or tokenizes anything: one test per kind of invalid input."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.train import loop
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.preflight import check_inputs
from tests.helpers.corpus import byte_tokenizer, write_texts
from tests.helpers.hf_folder import tiny
from tests.helpers.small import SMALL

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config, texts, examples, a tokenizer without EOS, and one with more tokens than the model."""
    home = tmp_path_factory.mktemp("preflight")
    (home / "model.json").write_text(json.dumps(tiny(vocab_size=300).to_dict()))
    write_texts(home / "a.jsonl", ["some text"])
    write_texts(home / "other.jsonl", ["some text"], field="content")
    (home / "empty").mkdir()
    (home / "e.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    byte_tokenizer(home / "no_eos", eos=False)
    byte_tokenizer(home / "large", fill=SMALL.vocab_size)
    return home


PRETRAINING: dict[str, tuple[dict[str, Any], str]] = {
    "source": ({"sources": ("a.jsonl", "nix")}, "nix: does not exist"),
    "empty source": ({"sources": ("a.jsonl", "empty")}, "empty: no files"),
    "field": ({"sources": ("a.jsonl", "other.jsonl")}, r"other.jsonl:1 has no field 'text'"),
    "validation": ({"validation": ("nix",)}, "nix: does not exist"),
    "both sets": ({"validation": ("a.jsonl",)}, "a.jsonl: in both the training and the validation data"),
    "tokenizer": ({"tokenizer": "nix"}, "data.tokenizer .*nix does not exist"),
    "no tokenizer": ({"tokenizer": "empty"}, "data.tokenizer .*empty has no tokenizer.json and no tokenizer.model"),
    "no EOS": ({"tokenizer": "no_eos"}, "no_eos: the tokenizer has no EOS token"),
    "vocabulary": ({"tokenizer": "large"}, "large: the model's vocab_size must be at least 2306, got 300"),
}
FINETUNING: dict[str, tuple[dict[str, Any], str]] = {
    "no data": ({"files": ()}, "data.files is empty: pass --data FILE"),
    "missing data": ({"files": ("nix.jsonl",)}, "nix.jsonl: does not exist"),
    "other data": ({"files": ("a.jsonl",)}, "a.jsonl:1 has none of the fields instruction and output"),
    "validation": ({"validation": ("a.jsonl",)}, "a.jsonl:1 has none of the fields"),
    "template": ({"template": "nix"}, "template must be one of chat, deepseek-instruct or a file, got '.*nix'"),
    "tokenizer": ({"tokenizer": "nix"}, "data.tokenizer .*nix does not exist"),
    "vocabulary": ({"tokenizer": "large"}, "large: the model's vocab_size must be at least 2306, got 2048"),
}


def below(home: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with their paths in the folder."""

    def path(name: str, value: Any) -> Any:
        return tuple(str(home / one) for one in value) if isinstance(value, tuple) else str(home / value)

    return {name: value if name == "format" else path(name, value) for name, value in changes.items()}


def refused(config: RunConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run(config)

    assert not Path(config.output_dir).exists()


def pretraining(home: Path, out: Path, **fields: Any) -> RunConfig:
    data = DataConfig(**below(home, {"sources": ("a.jsonl",), **fields.pop("data", {})}), sequence_length=16)
    return RunConfig(output_dir=str(out), model=str(home / "model.json"), data=data, **{"trackers": (), **fields})


def finetuning(home: Path, out: Path, checkpoint: Path, **fields: Any) -> FinetuneConfig:
    data = ExamplesConfig(**below(home, {"files": ("e.jsonl",), **fields.pop("data", {})}))
    return FinetuneConfig(output_dir=str(out), init_from=str(checkpoint), data=data, trackers=(), **fields)


@pytest.mark.parametrize("kind", PRETRAINING)
def test_pretraining_is_refused_before_anything_is_written(home: Path, tmp_path: Path, kind: str):
    data, match = PRETRAINING[kind]

    refused(pretraining(home, tmp_path / "out", data=data), match)


def test_a_base_without_a_tokenizer_is_refused(home: Path, tmp_path: Path, checkpoint: Path):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*")))

    refused(pretraining(home, tmp_path / "out", init_from=str(copy)), "base has no tokenizer: pass --data.tokenizer")


@pytest.mark.parametrize("kind", FINETUNING)
def test_finetuning_is_refused_before_anything_is_written(home: Path, tmp_path: Path, checkpoint: Path, kind: str):
    data, match = FINETUNING[kind]

    refused(finetuning(home, tmp_path / "out", checkpoint, data=data), match)


def test_modules_of_an_adapter_are_checked_first(home: Path, tmp_path: Path, checkpoint: Path):
    refused(
        finetuning(home, tmp_path / "out", checkpoint, lora=LoraConfig(target_modules=("nix",))),
        "'nix' matches no module of this model",
    )


def test_trackers_are_checked_first(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    refused(pretraining(home, tmp_path / "out", trackers=("wandb",)), "tracker 'wandb' requires wandb: pip install")


def test_unreadable_files_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything

    refused(pretraining(home, tmp_path / "out"), r"a.jsonl: cannot be read: permission denied")


def test_an_output_directory_that_is_a_file_is_refused(home: Path, tmp_path: Path):
    (tmp_path / "out").write_text("")

    with pytest.raises(ValueError, match="out cannot be written: File exists"):
        run(pretraining(home, tmp_path / "out"))


def test_valid_inputs_pass_the_checks(home: Path, tmp_path: Path, checkpoint: Path):
    check_inputs(pretraining(home, tmp_path / "out"))
    check_inputs(finetuning(home, tmp_path / "out", checkpoint, lora=LoraConfig()))


@pytest.mark.parametrize(
    ("handler", "configured"),
    [(None, False), (logging.StreamHandler, False), (logging.NullHandler, True)],
    ids=["none", "of absl", "own"],
)
def test_a_run_from_a_script_logs_to_the_console(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    handler: Any,
    configured: bool,
):
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers := [handler()] if handler else [])
    monkeypatch.setattr(loop, "_run", lambda *_: loop._log.info("Training"))

    run(pretraining(home, tmp_path / "out", trackers=("console",)))
    run(pretraining(home, tmp_path / "out"))

    assert capsys.readouterr().err == ("" if configured else "Training\n")
    assert logging.getLogger().handlers == handlers
