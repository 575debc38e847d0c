"""The table at the start of a run, and the speed of its first step."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dsmoe_jax.layers.token_dispatcher import DispatchConfig
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.train import summary as module
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.defaults import with_defaults
from dsmoe_jax.train.finetune import FinetuneConfig
from dsmoe_jax.train.job import Job
from dsmoe_jax.train.optimizer import OptimizerConfig, make_optimizer
from dsmoe_jax.train.step import StepConfig, Trainable, TrainState, init_state, state_shardings
from dsmoe_jax.train.summary import log_summary, summary
from tests.helpers.command import run
from tests.helpers.small import SMALL

MESH = MeshConfig(fsdp=4, expert=2)


def job() -> Job:
    stream = SimpleNamespace(batch_size=16, sequence_length=32, documents=1234, tokens=56789, names=["text"])
    corpus: Any = SimpleNamespace(stream=stream, validation_tokens=77)
    return Job(SMALL, corpus, 1000, *[None] * 5, {})  # type: ignore[arg-type]


def state(config: RunConfig, mesh: Any = None, step: int = 0) -> TrainState:
    """A state of zeros."""
    optimizer, _ = make_optimizer(config.optimizer, 1000)
    specs = Trainable.all_params(SMALL).specs
    params = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in specs.items()}
    leaves = jax.eval_shape(lambda params: init_state(SMALL, params, optimizer, config.step), params)
    places = state_shardings(SMALL, optimizer, config.step, mesh)
    placed = jax.tree.map(lambda leaf, p: jax.device_put(np.zeros(leaf.shape, leaf.dtype), p), leaves, places)
    return placed._replace(step=placed.step + step)


def test_a_run_on_one_device():
    config = RunConfig(output_dir="runs/a", steps=1000, trackers=("jsonl",))

    rows = summary(config, job(), None, state(config), {})

    total = 151_840
    assert rows == {
        "Model": f"tiny, {total:,} parameters, 148,768 activated",
        "Devices": "1 × cpu",
        "Precision": "compute float32, trained weights float32, moments float32",
        "Batch": "16 sequences × 32 tokens = 512 tokens per step",
        "Steps": "1,000, 512,000 tokens",
        "Data": "1,234 documents, 56,789 tokens; validation: 77 tokens",
        "Optimizer": "learning rate 0.00108, paper schedule, 1,000 warmup steps",
        "Kernels": "experts block_loop, attention plain",
        "Output": "runs/a (jsonl)",
    }


def test_a_resumed_run_on_a_mesh():
    step = StepConfig(gradient_accumulation_steps=2, compute_dtype="bfloat16", remat="full")
    dispatch = DispatchConfig(strategy="all_to_all", backend="batched,batched,ragged")
    optimizer = OptimizerConfig(moments="factored")
    config = RunConfig(output_dir="runs/a", mesh=MESH, step=step, dispatch=dispatch, optimizer=optimizer)
    mesh = make_mesh(MESH)

    rows = summary(config, job(), mesh, state(config, mesh, step=500), {})

    assert rows["Devices"] == "8 × cpu, mesh data=1, fsdp=4, expert=2, tensor=1"
    assert rows["Precision"] == "compute bfloat16, trained weights float32, moments factored, remat full"
    assert rows["Batch"].endswith("512 tokens per step, in 2 micro-batches")
    assert rows["Steps"].endswith("; resuming from step 500")
    assert rows["Kernels"] == "experts batched,batched,ragged, dispatch all_to_all, attention plain"


def test_adapters_show_their_share():
    config = with_defaults(FinetuneConfig(init_from="base", output_dir="runs/a", lora=LoraConfig()))
    frozen = {"a": jax.device_put(np.zeros((1000, 1000), np.int8))}

    rows = summary(config, job(), None, state(config), frozen)

    assert rows["Model"].startswith("base, ")
    assert rows["Data"].startswith("1,234 examples, ")
    assert rows["Optimizer"] == "learning rate 0.0002, cosine schedule, 10 warmup steps"
    assert rows["Trainable"] == "151,840 parameters (100.00%)"


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_the_table_is_on_stderr(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    config = RunConfig(output_dir="runs/[bold]a")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "150")

    log_summary(config, job(), None, state(config), {})

    out, err = capsys.readouterr()
    assert out == ""
    assert ("runs/[bold]a" in err, "Steps: 1,000, 512,000 tokens" in caplog.messages) == (terminal, not terminal)


def test_nothing_is_printed_without_logging(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    config = RunConfig(output_dir="runs/a")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(module._log, "isEnabledFor", lambda level: False)

    log_summary(config, job(), None, state(config), {})

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("DSMOE_EXPERT_BACKEND", "cutlass", "DSMOE_EXPERT_BACKEND must be one of block_loop, "),
        ("DSMOE_EXPERT_BACKEND", "ragged,dense", "DSMOE_EXPERT_BACKEND must be one name or fwd,dgrad,wgrad, got"),
        (
            "DSMOE_ATTENTION_BACKEND",
            "flash",
            "DSMOE_ATTENTION_BACKEND must be one of plain, pallas, cudnn, got 'flash'",
        ),
        ("DSMOE_TUNING", "/absent/tuned.json", "DSMOE_TUNING: /absent/tuned.json: "),
    ],
    ids=["name", "three", "attention", "file"],
)
def test_a_bad_variable_is_named_before_anything_is_written(
    tmp_path: Path, variable: str, value: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv(variable, value)

    codes = [run("pretrain", "tiny", "--output-dir", tmp_path / "run"), run("generate", tmp_path, "--prompt", "a")]

    out, err = capsys.readouterr()
    assert codes == [2, 2]
    assert out == ""
    assert [message.partition(": ")[2].startswith(line) for message in err.splitlines()] == [True, True], err
    assert not (tmp_path / "run").exists()
