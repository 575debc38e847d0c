"""Restarting a run with the same or other settings, data and base; most tests do not train."""

import dataclasses
import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import dsmoe_jax
from dsmoe_jax.cli import main
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import DeepSeekMoE, split
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train import loop
from dsmoe_jax.train.best import Best
from dsmoe_jax.train.checkpoints import Checkpoints
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.corpus import prepare
from dsmoe_jax.train.data import TokenShards
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig, finetuning, open_examples
from dsmoe_jax.train.inputs import Source
from dsmoe_jax.train.job import Job, pretraining
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.optimizer import OptimizerConfig
from dsmoe_jax.train.resume import check_resumable
from dsmoe_jax.train.step import StepConfig
from tests.helpers.corpus import write_texts
from tests.helpers.hf_folder import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]

VOCABULARY = 300
STEPS = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config with DeepSeek's token ids, and texts."""
    home = tmp_path_factory.mktemp("resume")
    model = tiny(vocab_size=VOCABULARY).to_dict() | {"bos_token_id": 270, "eos_token_id": 271, "num_hidden_layers": 2}
    (home / "model.json").write_text(json.dumps(model))
    write_texts(home / "a.jsonl", [f"alpha {n} beta {n * n}" for n in range(40)])
    write_texts(home / "b.jsonl", [f"gamma {n} delta {n + n}" for n in range(40)])
    return home


def config(home: Path, out: Path, **changes: Any) -> RunConfig:
    data = DataConfig(sources=(str(home / "a.jsonl"),), sequence_length=16, batch_size=2, val_fraction=0.2)
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "model": str(home / "model.json"),
        "steps": STEPS,
        "data": dataclasses.replace(data, **changes.pop("data", {})),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        "trackers": ("jsonl",),
    }
    return RunConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """Output directory of a run of two steps; copy before changing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        run(config(home, home / "finished"))
    return home / "finished"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def embed(model: Path) -> np.ndarray:
    return np.asarray(split(dsmoe_jax.load(model))[1]["embed"])


# Result


@pytest.mark.slow
def test_a_longer_run_replaces_the_model(home: Path, copy: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    before = embed(copy / "model")

    result = run(config(home, copy, steps=STEPS + 1))

    with warnings.catch_warnings(action="ignore"):  # Orbax warns that no sharding is set
        state = ocp.load(str(copy / "checkpoints" / f"step-{STEPS + 1:08}"))
    assert (result.steps, result.resumed_from) == (STEPS + 1, STEPS)
    assert (embed(copy / "model") == np.asarray(state["params/embed"])).all()
    assert (embed(copy / "model") != before).any()
    assert not list(copy.glob("*.new")) + list(copy.glob("*.old"))
    assert f"Changed: steps {STEPS} → {STEPS + 1} (from step {STEPS})" in caplog.messages
    assert any(re.fullmatch(r"Steps: 3, .* tokens; resuming from step 2", line) for line in caplog.messages)
    assert any(re.fullmatch(r"Compiled the training step in .* s", line) for line in caplog.messages)
    assert json.loads((copy / "run.json").read_text())["total_steps"] == STEPS + 1


@pytest.mark.parametrize("steps", [STEPS, STEPS - 1], ids=["same", "fewer"])
def test_a_complete_run_prints_its_result(
    home: Path,
    copy: Path,
    steps: int,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    known = json.loads((copy / "run.json").read_text())["result"]
    monkeypatch.setattr(loop, "_initial_state", lambda *_: pytest.fail("nothing is left to train"))
    flags = ["--data.sources", home / "a.jsonl", "--data.sequence-length", 16, "--data.batch-size", 2, "--steps", steps]
    flags += ["--data.val-fraction", 0.2, "--model", home / "model.json", "--output-dir", copy, "--trackers", "jsonl"]

    assert main(["pretrain", "tiny", *map(str, flags)]) == 0

    loss = f"loss {known['loss']:.4f}, eval/loss {known['eval_loss']:.4f}"
    printed = capsys.readouterr().out
    assert printed == f"Run already complete: {STEPS} steps, {loss}, 0 updates skipped: {copy / 'model'}\n"
    fewer = f"Already complete at step {STEPS}: --steps {steps} is less; pass more to continue"
    assert (fewer in caplog.messages) == (steps < STEPS)


def test_a_missing_result_is_restored(home: Path, copy: Path):
    known = json.loads((copy / "run.json").read_text())["result"]
    before = embed(copy / "model")
    shutil.rmtree(copy / "model")
    (copy / "metrics.jsonl").unlink()

    result = run(config(home, copy))

    assert (embed(copy / "model") == before).all()
    assert (result.loss, result.eval_loss) == (known["loss"], pytest.approx(known["eval_loss"]))


def test_a_damaged_result_is_restored(home: Path, copy: Path):
    before = embed(copy / "model")
    file = max((path for path in (copy / "model").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])

    run(config(home, copy))

    assert (embed(copy / "model") == before).all()


# Settings


def test_settings_are_compared_before_training(home: Path, copy: Path):
    fields = json.loads((home / "model.json").read_text()) | {"num_experts_per_tok": 1}
    (copy / "other.json").write_text(json.dumps(fields))
    before = (copy / "run.json").read_bytes()

    with pytest.raises(ValueError, match="num_experts_per_tok is 2 in the checkpoint, 1 in this run"):
        run(config(home, copy, model=str(copy / "other.json"), steps=STEPS + 1))

    assert (copy / "run.json").read_bytes() == before


# Data


def prepared(home: Path, out: Path, *, resuming: bool = False, **data: Any) -> str:
    """First training document of a run."""
    one = config(home, out, data=data)
    corpus = prepare(one, one.model_config(), out, resuming=resuming)
    assert corpus.tokenizer is not None
    return Tokenizer.from_pretrained(corpus.tokenizer).decode(TokenShards.open(out / "data" / "00").read(0))


def test_other_texts_are_tokenized_again(home: Path, tmp_path: Path):
    assert prepared(home, tmp_path).startswith("alpha")
    assert prepared(home, tmp_path, sources=(str(home / "b.jsonl"),)).startswith("gamma")


def test_an_edited_text_is_tokenized_again(home: Path, tmp_path: Path):
    text = Path(shutil.copy(home / "a.jsonl", tmp_path / "text.jsonl"))
    before = text.stat()
    assert prepared(home, tmp_path / "run", sources=(str(text),)).startswith("alpha")

    text.write_text(text.read_text().replace("alpha", "ALPHA"))  # of the same size
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert prepared(home, tmp_path / "run", sources=(str(text),)).startswith("ALPHA")


@pytest.mark.parametrize("change", [{"val_fraction": 0.4}, {"tokenizer": "own"}], ids=str)
def test_other_options_make_other_shards(home: Path, tmp_path: Path, change: dict[str, Any]):
    train_tokenizer(["alpha beta"] * 9, tmp_path / "own", VOCABULARY)
    change = change | ({"tokenizer": str(tmp_path / "own")} if "tokenizer" in change else {})
    prepared(home, tmp_path / "run")
    before = TokenShards.open(tmp_path / "run" / "data" / "00").digest

    prepared(home, tmp_path / "run", **change)

    assert TokenShards.open(tmp_path / "run" / "data" / "00").digest != before


def test_a_damaged_tokenizer_of_the_run_is_refused(home: Path, tmp_path: Path):
    assert prepared(home, tmp_path).startswith("alpha")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"alpha"', '"alphb"'))

    with pytest.raises(ValueError, match=r"tokenizer: damaged: SHA-256 mismatch; remove it to rebuild it"):
        prepared(home, tmp_path)

    shutil.rmtree(file.parent)
    assert prepared(home, tmp_path).startswith("alpha")


def test_a_copied_or_touched_text_is_the_same(home: Path, tmp_path: Path):
    text = Path(shutil.copy(home / "a.jsonl", tmp_path / "copy.jsonl"))
    os.utime(text, (1, 1))
    prepared(home, tmp_path / "run")
    made = (tmp_path / "run" / "data" / "00").stat().st_ino

    prepared(home, tmp_path / "run", resuming=True, sources=(str(text),))

    assert (tmp_path / "run" / "data" / "00").stat().st_ino == made
    assert Source.read(str(text), tmp_path).sha256 == Source.read(str(home / "a.jsonl"), tmp_path).sha256


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sources": ("b.jsonl",)}, r"--data\.sources: .*a\.jsonl -> .*b\.jsonl"),
        ({"sources": ("a.jsonl", "b.jsonl")}, r"--data\.sources: .*a\.jsonl -> .*a\.jsonl, .*b\.jsonl"),
        ({"val_fraction": 0.4}, r"data\.val_fraction: 0\.2 -> 0\.4"),
    ],
    ids=["other", "more", "val_fraction"],
)
def test_resuming_on_other_data_is_refused(home: Path, copy: Path, change: dict[str, Any], line: str):
    if "sources" in change:
        change = {"sources": tuple(str(home / name) for name in change["sources"])}
    before = TokenShards.open(copy / "data" / "00").digest

    way_out = "; pass the earlier value, or another --output-dir"
    with pytest.raises(ValueError, match=f"cannot resume on changed data: {line}{way_out}"):
        run(config(home, copy, data=change, steps=STEPS + 1))

    assert TokenShards.open(copy / "data" / "00").digest == before


def test_shards_keep_the_share_they_were_made_with(home: Path, copy: Path):
    shards = {"sources": (str(copy / "data" / "00"),), "tokenizer": str(copy / "tokenizer")}

    with pytest.raises(ValueError, match=r"data.val_fraction 0.3 has no effect on .*00, tokenized with 0.2;"):
        prepared(home, copy, **shards, val_fraction=0.3)


def test_the_best_of_discarded_steps_is_ignored(tmp_path: Path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "evaluation.json").write_text(json.dumps({"step": 6, "loss": 0.5}))
    job: Any = Job(*[None] * 7, lambda path, params: path.mkdir(), {}, True)  # type: ignore[arg-type]

    Best(tmp_path, job, 6).offer(8, 0.6, {})
    kept = json.loads((tmp_path / "best" / "evaluation.json").read_text())["step"]
    Best(tmp_path, job, 4).offer(5, 0.6, {})

    assert (kept, json.loads((tmp_path / "best" / "evaluation.json").read_text())["step"]) == (6, 5)


# Fine-tuning examples


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """A checkpoint whose config has special token ids of another tokenizer."""
    train_tokenizer(["User: a\n\nAssistant: b"] * 9, home / "tokenizer", VOCABULARY)
    model = DeepSeekMoE.init(ModelConfig.from_file(home / "model.json"))
    dsmoe_jax.save(model, home / "base", extra_files=sorted((home / "tokenizer").iterdir()))
    (home / "examples.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}", "completion": "b"}) + "\n" for n in range(40))
    )
    (home / "template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return home / "base"


def finetune(home: Path, base: Path, out: Path, **data: Any) -> FinetuneConfig:
    data = {
        "files": (str(home / "examples.jsonl"),),
        "sequence_length": 32,
        "batch_size": 2,
        "val_fraction": 0.2,
    } | data
    return FinetuneConfig(output_dir=str(out), init_from=str(base), data=ExamplesConfig(**data))


def test_model_without_effect_is_logged(home: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    wide = json.loads((home / "model.json").read_text()) | {"intermediate_size": 80, "bos_token_id": 3}
    (tmp_path / "wide.json").write_text(json.dumps(wide))

    loop._check(config(home, tmp_path / "out", init_from=str(base)))  # the same
    assert not caplog.records
    loop._check(config(home, tmp_path / "out", model=str(tmp_path / "wide.json"), init_from=str(base)))

    assert f"wide.json has no effect: init_from {base} has its own config (different intermediate_size)" in caplog.text


def test_different_checkpoints_per_process_are_refused(copy: Path, monkeypatch: pytest.MonkeyPatch):
    seen = [np.array([2, 2]), np.array([2, -1])]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "process_allgather", lambda newest: seen.pop(0))
    checkpoints = Checkpoints(copy / "checkpoints")

    loop._check_same_checkpoints(checkpoints)
    with pytest.raises(ValueError, match="checkpoints differs between processes"):
        loop._check_same_checkpoints(checkpoints)


def test_a_template_is_known_by_its_content(home: Path, base: Path, tmp_path: Path):
    template = Path(shutil.copy(home / "template.jinja", tmp_path / "template.jinja"))
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    one = finetune(home, base, tmp_path, files=(str(chats),), template=str(template), val_fraction=0.0)
    model = one.model_config()

    first = open_examples(one, model, tmp_path)[1]
    template.write_text(template.read_text().replace("content", "content | upper"))
    edited = open_examples(one, model, tmp_path)[1]
    os.utime(chats, (1, 1))
    touched = open_examples(one, model, tmp_path)[1]

    assert first.digest != edited.digest
    assert edited.folder == touched.folder


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"val_fraction": 0.5}, "data.val_fraction is 0.2 in the checkpoint, 0.5 in this run"),
        ({"files": ("other.jsonl",)}, "other.jsonl is new"),
        ({"sequence_length": 64}, "data.sequence_length is 32 in the checkpoint, 64 in this run"),
    ],
    ids=["val_fraction", "file", "length"],
)
def test_examples_that_changed_are_named(home: Path, base: Path, tmp_path: Path, change: dict[str, Any], line: str):
    if "files" in change:
        (tmp_path / "other.jsonl").write_text((home / "examples.jsonl").read_text().replace('"b"', '"c"'))
        change = {"files": (str(tmp_path / "other.jsonl"),)}
    known, now = (finetuning(finetune(home, base, tmp_path, **data), tmp_path).resume_metadata for data in ({}, change))

    with pytest.raises(ValueError, match=line):
        check_resumable(tmp_path, 1, json.loads(json.dumps(known)), now)


# Special token ids


def test_a_run_has_the_ids_of_its_tokenizer(finished: Path):
    model, tokenizer = ModelConfig.from_file(finished / "model"), Tokenizer.from_pretrained(finished / "model")

    assert (model.bos_token_id, model.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_fine_tuned_model_has_the_ids_of_its_tokenizer(home: Path, base: Path, tmp_path: Path):
    job = finetuning(finetune(home, base, tmp_path), tmp_path)

    assert (job.model.bos_token_id, job.model.eos_token_id) == (0, 1)


def test_shards_alone_give_the_end_token(home: Path, copy: Path, tmp_path: Path):
    one = config(
        home, tmp_path, data={"sources": (str(copy / "data" / "00"),), "val_fraction": DataConfig.val_fraction}
    )

    assert pretraining(one, tmp_path).model.eos_token_id == 1


# Invalid requests


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mesh": MeshConfig(fsdp=8)}, r"mesh \(data=1, fsdp=8, expert=1, tensor=1\) needs 8 devices, there are 1"),
        ({"mesh": MeshConfig(expert=4)}, "does not divide 1 devices"),
        (
            {"step": StepConfig(device_balance_groups=3, device_balance_alpha=0.1)},
            "step.device_balance_groups must divide 8 experts, got 3",
        ),
    ],
    ids=["fsdp", "expert", "groups"],
)
def test_an_invalid_run_is_refused_before_it_starts(home: Path, tmp_path: Path, changes: dict[str, Any], line: str):
    with pytest.raises(ValueError, match=line):
        run(config(home, tmp_path / "run", **changes))

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": {"sequence_length": 1024}}, "data.sequence_length 1024 exceeds the model's max_position_embeddings"),
        (
            {"step": StepConfig(device_balance_groups=2)},
            "step.device_balance_groups 2 and step.device_balance_alpha 0.0 have no effect",
        ),
    ],
    ids=["length", "groups"],
)
def test_settings_without_effect_are_logged(
    home: Path, tmp_path: Path, changes: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
):
    loop._check(config(home, tmp_path, **changes))

    assert line in caplog.text


def test_an_empty_validation_split_is_logged(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_texts(tmp_path / "one.jsonl", ["alone " * 99])

    prepared(home, tmp_path / "out", sources=(str(tmp_path / "one.jsonl"),), val_fraction=0.01)

    assert [line.getMessage() for line in caplog.records if "validation" in line.message] == [
        "No validation data: evaluation is skipped; pass --data.validation FILES"
    ]


def test_steps_override_epochs(home: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    one = dataclasses.replace(finetune(home, base, tmp_path), steps=3, epochs=5.0)

    assert finetuning(one, tmp_path).steps == 3
    assert "epochs 5.0 has no effect with steps 3" in caplog.text
