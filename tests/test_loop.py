"""Runs of a very small model: results, resuming, stopping.

Start at `test_a_stopped_run_resumes_bit_for_bit`.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dsmoe_jax
from dsmoe_jax.cli import main
from dsmoe_jax.model import split
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.locks import lock_folder
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train import loop
from dsmoe_jax.train.checkpoints import Checkpoints
from dsmoe_jax.train.config import CheckpointConfig, DataConfig, RunConfig
from dsmoe_jax.train.data import tokenize
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.metrics import read_records
from dsmoe_jax.train.optimizer import OptimizerConfig
from dsmoe_jax.train.step import StepConfig
from tests.helpers.hf_folder import flip_bit, tiny
from tests.helpers.runs import losses, share_steps

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("no_compilation_cache")]

VOCABULARY = 300
ONE_DEVICE = MeshConfig(data=1, fsdp=1)
STEPS = 28


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model config, a tokenizer, and token shards of a few small texts."""
    home = tmp_path_factory.mktemp("train")
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "moe", "(x)", "return", "\n    "]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(200)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts * 3, home / "tokenizer", VOCABULARY)
    tokenize(home / "text.jsonl", home / "tokenizer", home / "shards", val_fraction=0.1)
    (home / "model.json").write_text(json.dumps(tiny(vocab_size=VOCABULARY).to_dict()))
    return home


def config(home: Path, out: Path, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "model": str(home / "model.json"),
        "steps": STEPS,
        "data": DataConfig(
            sources=(str(home / "shards"),), tokenizer=str(home / "tokenizer"), sequence_length=24, batch_size=8
        ),
        "optimizer": OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=2),
        "checkpoint": CheckpointConfig(interval=4),
        "eval_interval": 6,
        "eval_batches": 2,
        "trackers": ("jsonl",),
        "mesh": MeshConfig(fsdp=8),
    }
    return RunConfig(**(fields | changes))


def digest(model: Path) -> str:
    """SHA-256 of all parameters."""
    params = split(dsmoe_jax.load(model))[1]
    return hashlib.sha256(b"".join(np.asarray(params[name]).tobytes() for name in sorted(params))).hexdigest()


def note_states(out: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the next run record the SHA-256 of its training state after each step."""

    def noting(*arguments: Any, **options: Any) -> Callable[..., Any]:
        step = original(*arguments, **options)

        def noted(state: Any, *others: Any) -> Any:
            state, metrics = step(state, *others)
            bits = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))
            with (out / "states").open("a") as file:
                file.write(f"{int(state.step)} {hashlib.sha256(bits).hexdigest()}\n")
            return state, metrics

        return noted

    original = loop.make_step
    patch.setattr(loop, "make_step", noting)


def states(out: Path) -> dict[int, str]:
    return {int(step): sha for step, sha in map(str.split, (out / "states").read_text().splitlines())}


@pytest.fixture(scope="module")
def uninterrupted(home: Path) -> Path:
    """Output directory of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        note_states(home / "uninterrupted", patch)
        run(config(home, home / "uninterrupted"))
    jax.config.update("jax_compilation_cache_dir", None)
    return home / "uninterrupted"


# Output


def test_a_run_leaves_model_metrics_and_config(home: Path, uninterrupted: Path):
    records = read_records(uninterrupted)
    generator = dsmoe_jax.Generator.from_pretrained(uninterrupted / "model")

    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if "eval/loss" in record] == [1, 6, 12, 18, 24, STEPS]
    assert losses(uninterrupted)[STEPS] < losses(uninterrupted)[1] - 0.3
    assert json.loads((uninterrupted / "run.json").read_text())["steps"] == STEPS
    assert len(generator(["moe"], max_new_tokens=4, ignore_eos=True)[0].token_ids) == 4
    assert sorted(Checkpoints(uninterrupted / "checkpoints").steps()) == [20, 24, STEPS]


def test_a_complete_run_is_not_repeated(home: Path, uninterrupted: Path):
    before = digest(uninterrupted / "model")

    result = run(config(home, uninterrupted))

    assert (result.steps, result.stopped) == (STEPS, False)
    assert digest(uninterrupted / "model") == before


GOLDEN = Path(__file__).parent / "golden" / "pretrain"  # a text, a tokenizer, and the losses of 20 steps on them
CURVE = 1e-3  # relative, at every step


def test_twenty_steps_follow_the_committed_curve(tmp_path: Path, home: Path):
    data = DataConfig(
        sources=(str(GOLDEN / "text.jsonl"),),
        tokenizer=str(GOLDEN / "tokenizer"),
        sequence_length=64,
        batch_size=8,
        val_fraction=0.0,
    )
    model = tmp_path / "model.json"
    model.write_text(json.dumps(tiny(vocab_size=512).to_dict()))

    run(config(home, tmp_path / "out", model=str(model), data=data, steps=20, eval_interval=20))

    want = json.loads((GOLDEN / "curve.json").read_text())
    np.testing.assert_allclose(list(losses(tmp_path / "out").values()), want["loss"], rtol=CURVE)


def test_a_second_run_in_the_output_dir_is_refused(tmp_path: Path, home: Path):
    (tmp_path / "link").symlink_to("out")

    with lock_folder(tmp_path / "out"):
        for path in (tmp_path / "out", tmp_path / "link"):
            with pytest.raises(ValueError, match=rf"{path.name} is in use by another process \(pid {os.getpid()}\); "):
                run(config(home, path))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# Resuming


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a signal during the step."""
    monkeypatch.setattr(loop, "_should_stop", lambda stop, n, every: n == step)


@pytest.mark.parametrize("at", [8, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_bit_for_bit(
    tmp_path: Path, home: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    (tmp_path / "out").mkdir()
    note_states(tmp_path / "out", monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(at, patch)
        stopped = run(config(home, tmp_path / "out"))
    finished = run(config(home, tmp_path / "out"))

    assert STEPS - at >= 20
    assert (stopped.steps, stopped.stopped, stopped.model) == (at, True, None)
    assert (finished.steps, finished.stopped) == (STEPS, False)
    assert list(states(uninterrupted)) == list(range(1, STEPS + 1))
    assert states(tmp_path / "out") == states(uninterrupted)
    assert losses(tmp_path / "out") == losses(uninterrupted)
    assert digest(tmp_path / "out" / "model") == digest(uninterrupted / "model")


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(
    tmp_path: Path, home: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        run(config(home, tmp_path / "out", mesh=MeshConfig(fsdp=2, expert=4)))
    run(config(home, tmp_path / "out", mesh=MeshConfig(data=2, fsdp=4)))

    for step, loss in losses(uninterrupted).items():
        assert losses(tmp_path / "out")[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_accumulation_gives_the_same_run(tmp_path: Path, home: Path, uninterrupted: Path):
    model = json.loads((home / "model.json").read_text())
    assert model["seq_aux"]

    run(
        config(
            home,
            tmp_path / "out",
            mesh=MeshConfig(data=4, fsdp=1, tensor=2),
            step=StepConfig(gradient_accumulation_steps=2),
        )
    )

    for step, loss in losses(uninterrupted).items():
        assert losses(tmp_path / "out")[step] == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, home: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
):
    out = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    shutil.rmtree(out / "model")
    newest = out / "checkpoints" / "step-00000028"
    flip_bit(max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size), -100)
    caplog.set_level(logging.INFO)

    run(config(home, out))

    assert f"Skipping checkpoint {newest}: damaged" in caplog.text
    assert "resuming from step 24" in caplog.text
    assert digest(out / "model") == digest(uninterrupted / "model")


def test_a_changed_data_stream_is_refused(tmp_path: Path, home: Path, uninterrupted: Path):
    out = Path(shutil.copytree(uninterrupted, tmp_path / "out"))

    with pytest.raises(ValueError, match="cannot resume from step 28: seed is 0 in the checkpoint, 1 in this run;"):
        run(config(home, out, seed=1))


def test_resume_never_refuses_checkpoints(home: Path, uninterrupted: Path):
    with pytest.raises(ValueError, match="has checkpoints: omit --resume never, or choose another --output-dir"):
        run(config(home, uninterrupted, resume="never"))


def test_a_run_begins_from_a_native_checkpoint(
    tmp_path: Path, home: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    stop_at(1, monkeypatch)

    result = run(config(home, tmp_path / "out", init_from=str(uninterrupted / "model")))

    assert result.loss < losses(uninterrupted)[4]


# Stopping


@pytest.mark.slow
def test_a_run_resumes_after_a_full_disk(
    tmp_path: Path, home: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    out = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    for left in ("model", "checkpoints/step-00000024", "checkpoints/step-00000028"):
        shutil.rmtree(out / left)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def saving(self: Checkpoints, step: int, *others: Any) -> None:
        # A file size limit raises OSError as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        try:
            save(self, step, *others)
            assert self._pending is not None
            futures.wait([self._pending])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saving)
        with pytest.raises(OSError, match=r"File too large: '.*step-00000024'$") as refused:
            run(config(home, out))
    run(config(home, out))

    assert "\n" not in str(refused.value)
    assert caplog.text.count("resuming from step 20") == 2
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert losses(out) == losses(uninterrupted)
    assert digest(out / "model") == digest(uninterrupted / "model")


def test_too_many_skipped_updates_in_a_row_stop_the_run(
    tmp_path: Path, home: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*arguments: Any, **options: Any) -> Callable[..., Any]:
        step = original(*arguments, **options)
        nan = np.float32(np.nan)
        return lambda state, *others: step(
            state._replace(params=state.params | {"norm.weight": state.params["norm.weight"] * nan}), *others
        )

    original = loop.make_step
    monkeypatch.setattr(loop, "make_step", broken)

    with pytest.raises(ValueError, match="3 consecutive updates skipped at step 3: loss nan"):
        run(config(home, tmp_path / "out", max_consecutive_skips=2))


PROGRAM = """
import sys
from pathlib import Path
from tests.test_loop import ONE_DEVICE, config, run
home, out, steps = sys.argv[1:]
run(config(Path(home), Path(out), mesh=ONE_DEVICE, steps=int(steps)))
"""


def start(home: Path, out: Path, steps: int) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(home), str(out), str(steps)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(out: Path, steps: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_exits_with_0(tmp_path: Path, home: Path, number: signal.Signals):
    out = tmp_path / "out"

    with start(home, out, 100_000) as process:
        wait_for(out, 5)
        process.send_signal(number)
        code = process.wait(timeout=60)

    assert code == 0
    found = Checkpoints(out / "checkpoints").newest()
    assert found is not None
    assert found[0] == max(losses(out))


def saving(out: Path, since: float) -> bool:
    """Whether a checkpoint begun after that time is incomplete."""
    for path in (out / "checkpoints").glob("step-*"):
        with contextlib.suppress(FileNotFoundError):  # just renamed
            if path.stat().st_mtime > since and not (path / "manifest.json").exists():
                return True
    return False


def kill_at(moment: str, process: subprocess.Popen, out: Path, chance: random.Random) -> None:
    """Kill the run at any time, or some steps after the first one: at once or in the next save."""
    since, records = time.time(), out / "metrics.jsonl"
    if moment == "any time":
        time.sleep(chance.uniform(0, 5))
    else:
        seen = len(records.read_text().splitlines()) if records.exists() else 0
        wait_for(out, seen + chance.randint(1, 30))
        time.sleep(chance.uniform(0, 0.02))
    while moment == "a save" and not saving(out, since) and process.poll() is None:
        pass
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_lose_nothing(tmp_path: Path, home: Path):
    steps, chance = 1000, random.Random(0)
    moments = ["any time", "a step", "a save"] * 8
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    with start(home, undisturbed, steps) as process:
        assert process.wait(timeout=120) == 0

    in_saves, newest = 0, 0
    for moment in moments:
        since = time.time()
        with start(home, out, steps) as process:
            kill_at(moment, process, out, chance)
        assert process.returncode == -signal.SIGKILL  # not complete
        in_saves += saving(out, since)
        found = Checkpoints(out / "checkpoints").newest()
        assert newest == 0 or (found is not None and found[0] >= newest)  # complete checkpoints are kept
        newest = found[0] if found is not None else 0
    with start(home, out, steps) as process:
        assert process.wait(timeout=120) == 0

    assert in_saves >= 5
    assert digest(out / "model") == digest(undisturbed / "model")
    assert losses(out) == losses(undisturbed)
    assert list(losses(out)) == list(range(1, steps + 1))


# Bad input


BAD: dict[str, tuple[Callable[[Path, Path], RunConfig], str]] = {
    "a batch that does not divide": (
        lambda home, out: config(home, out, data=dataclasses.replace(config(home, out).data, batch_size=6)),
        "data.batch_size must be a multiple of 8 .*, got 6",
    ),
    "another tokenizer": (
        lambda home, out: config(
            home, out, data=dataclasses.replace(config(home, out).data, tokenizer=str(other_tokenizer(home)))
        ),
        "written with another tokenizer",
    ),
    "a model of fewer tokens": (
        lambda home, out: config(home, out, model=str(smaller_model(home))),
        r"the model's vocab_size must be at least \d+, got 200",
    ),
    "no such source": (
        lambda home, out: config(home, out, data=dataclasses.replace(config(home, out).data, sources=("nowhere",))),
        "nowhere",
    ),
    "no such model": (lambda home, out: config(home, out, model="huge"), "huge"),
    "out is a file": (lambda home, out: (out.touch(), config(home, out))[1], "out"),
}


def other_tokenizer(home: Path) -> Path:
    if not (home / "other").exists():
        train_tokenizer(["xyz " * 10, "some other text of other words"] * 20, home / "other", 270)
    return home / "other"


def smaller_model(home: Path) -> Path:
    (home / "smaller.json").write_text(json.dumps(tiny(vocab_size=200).to_dict()))
    return home / "smaller.json"


@pytest.mark.parametrize(("make", "named"), BAD.values(), ids=BAD)
def test_a_mistake_is_refused_in_one_line(
    tmp_path: Path, home: Path, make: Callable[[Path, Path], RunConfig], named: str
):
    with pytest.raises((ValueError, OSError), match=named) as refused:
        run(make(home, tmp_path / "out"))

    assert "\n" not in str(refused.value)


# Command line


def test_tokenize_and_pretrain_from_the_command_line(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture):
    shards, out = tmp_path / "shards", tmp_path / "out"
    flags = [
        "--output-dir",
        out,
        "--model",
        home / "model.json",
        "--steps",
        2,
        "--data.sources",
        shards,
        "--mesh.fsdp",
        8,
    ]
    flags += ["--data.tokenizer", home / "tokenizer", "--data.sequence-length", 24, "--trackers", "jsonl"]

    codes = [
        main(["tokenize", str(home / "text.jsonl"), "--tokenizer", str(home / "tokenizer"), "--out", str(shards)]),
        main(["pretrain", "tiny", *map(str, flags)]),
    ]

    printed = capsys.readouterr().out
    assert codes == [0, 0]
    assert "tokens of 199 documents; validation: " in printed
    assert f"2 steps, loss {losses(out)[2]:.4f}" in printed
    assert str(out / "model") in printed
