"""Runs that fail, by divergence or for lack of memory, and settings that a start adjusts or refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsmoe_jax.train import loop
from dsmoe_jax.train.config import CheckpointConfig, DataConfig, RunConfig
from dsmoe_jax.train.failures import intact, memory_errors
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.optimizer import OptimizerConfig
from tests.helpers.corpus import write_texts
from tests.helpers.hf_folder import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]

OUT_OF_MEMORY = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.": "out of memory allocating 123 bytes: decrease",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.5GiB.": "out of memory allocating 1.5GiB: decrease",
    "RESOURCE_EXHAUSTED: full": "out of memory: decrease --data.batch-size",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config and texts."""
    home = tmp_path_factory.mktemp("failures")
    (home / "model.json").write_text(json.dumps(tiny(vocab_size=300).to_dict() | {"num_hidden_layers": 2}))
    write_texts(home / "a.jsonl", [f"alpha {n} beta {n * n}" for n in range(40)])
    return home


def config(home: Path, out: Path, tokenizer: Path, **changes: Any) -> RunConfig:
    data = DataConfig(sources=(str(home / "a.jsonl"),), tokenizer=str(tokenizer), sequence_length=16, batch_size=2)
    fields: dict[str, Any] = {"output_dir": str(out), "model": str(home / "model.json"), "steps": 2, "data": data}
    fields |= {"optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0), "trackers": ("jsonl",)}
    return RunConfig(**(fields | changes))


def poison(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make a parameter NaN in the update of one step, whose loss is finite."""

    def make_step(*arguments: Any, **options: Any) -> Callable[..., Any]:
        step = original(*arguments, **options)

        def poisoned(*inputs: Any) -> Any:
            state, metrics = step(*inputs)
            if int(state.step) == at:
                params = state.params | {"norm.weight": state.params["norm.weight"] * np.float32(np.nan)}
                state = state._replace(params=params)
            return state, metrics

        return poisoned

    original = loop.make_step
    monkeypatch.setattr(loop, "make_step", make_step)


def test_parameters_that_are_not_finite_are_an_error(
    home: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, at=2)
    one = config(home, tmp_path / "out", tokenizer_folder, checkpoint=CheckpointConfig(interval=1))

    with pytest.raises(ValueError, match=r"^training diverged at step 2: parameters .*; the checkpoints in .* intact"):
        run(one)

    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_with_the_ways_out(text: str):
    with pytest.raises(ValueError, match=f"^{OUT_OF_MEMORY[text]}"), memory_errors():
        raise jax.errors.JaxRuntimeError(text)


def test_other_runtime_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError), memory_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: memory")


def test_checkpoints_are_intact_only_if_there_are_any(tmp_path: Path):
    before = intact(tmp_path)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)

    assert (before, intact(tmp_path)) == ("", f"; the checkpoints in {tmp_path / 'checkpoints'} are intact")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("b1", 1.0, "in [0, 1), got 1.0"),
        ("b2", 1.0, "in [0, 1), got 1.0"),
        ("b2", float("nan"), "in [0, 1), got nan"),
        ("b1", -0.1, "in [0, 1), got -0.1"),
        ("learning_rate", float("inf"), "finite, got inf"),
        ("min_lr_ratio", 2.0, "in [0, 1], got 2.0"),
    ],
)
def test_optimizer_settings_are_checked(name: str, value: float, allowed: str):
    with pytest.raises(ValueError, match=re.escape(f"optimizer.{name} must be {allowed}")):
        OptimizerConfig(**{name: value})  # type: ignore[arg-type]


def test_a_shortened_warmup_is_logged(
    home: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "make_optimizer", stop)  # before anything is compiled
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=50)

    with pytest.raises(KeyboardInterrupt):
        run(config(home, tmp_path / "out", tokenizer_folder, optimizer=optimizer, steps=1))

    lines = [line for line in caplog.messages if "armup" in line]
    assert lines == ["Warmup shortened to 1 step: optimizer.warmup_steps is 50"]
