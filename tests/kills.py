"""Kills runs, conversions and replacements of a folder repeatedly, and compares with uninterrupted ones.

    python -m tests.kills --kills 100

Start at `JOBS`. Before each restart of a run a file of its newest checkpoint may be damaged as well.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

# Metrics that depend on time, the machine or the number of restarts.
_NOT_COMPARED: Final = (
    "seconds",
    "per_second",
    "data_loading",
    "mfu",
    "memory",
    "resumed_from",
    "run",
    "/expert_load",
    "goodput",
    "time/",
)


class Job(NamedTuple):
    """A job to kill: its work, its outcome, and damage between two tries."""

    work: Callable[[Path, Path], None]  # a function of inputs and output folder
    outcome: Callable[[Path], Any]
    damage: Callable[[Path, random.Random], None] = lambda out, chance: None


# --- the jobs ---


def pretrain(home: Path, out: Path) -> None:
    """24 steps of a very small model with a checkpoint every third."""
    from dsmoe_jax.train.config import CheckpointConfig, DataConfig, RunConfig
    from dsmoe_jax.train.loop import run

    run(
        RunConfig(
            output_dir=str(out / "run"),
            model=str(home / "model.json"),
            steps=24,
            data=DataConfig(
                sources=(str(home / "shards"),), tokenizer=str(home / "tokenizer"), sequence_length=24, batch_size=4
            ),
            checkpoint=CheckpointConfig(interval=3, max_to_keep=2),
            eval_interval=4,
            eval_batches=2,
            trackers=("jsonl",),
        )
    )


def finetune(home: Path, out: Path) -> None:
    """20 steps of an adapter, evaluated every second step to replace `best` often."""
    from dsmoe_jax.lora import LoraConfig
    from dsmoe_jax.train.config import CheckpointConfig
    from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig
    from dsmoe_jax.train.loop import run

    run(
        FinetuneConfig(
            output_dir=str(out / "run"),
            init_from=str(home / "base"),
            steps=20,
            data=ExamplesConfig(
                files=(str(home / "examples.jsonl"),), sequence_length=64, batch_size=4, val_fraction=0.1
            ),
            checkpoint=CheckpointConfig(interval=3, max_to_keep=2),
            eval_interval=2,
            eval_batches=2,
            trackers=("jsonl",),
            lora=LoraConfig(r=4, lora_alpha=8),
        )
    )


def convert(home: Path, out: Path) -> None:
    """Import a Hugging Face folder and export it."""
    from dsmoe_jax.convert import export_hf, import_hf

    if not (out / "native").exists():
        import_hf(home / "hf", out / "native")
    if not (out / "hf").exists():
        export_hf(out / "native", out / "hf", max_shard_size="200KB")


def replace(_: Path, out: Path) -> None:
    """Replace a folder of two equal files 50 times."""
    from dsmoe_jax.storage.atomic_dir import recover_folder, replace_folder, write_json

    new, best = out / "best.new", out / "best"
    recover_folder(best, new)
    first = json.loads((best / "a.json").read_text())["n"] + 1 if best.exists() else 0
    for n in range(first, 50):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for name in ("a.json", "b.json"):
            write_json(new / name, {"n": n})
        replace_folder(new, best)
        if n % 10 == 9:
            time.sleep(0.01)


# --- outcomes and damage ---


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_outcome(out: Path) -> dict[str, Any]:
    """Hashes of the results, names in the output directory, and records of a run."""
    from dsmoe_jax.train.metrics import read_records

    run = out / "run"
    records = [
        {name: value for name, value in record.items() if not any(mark in name for mark in _NOT_COMPARED)}
        for record in read_records(run)
    ]
    found = {name: files_of(run / name) for name in ("model", "adapter", "best") if (run / name).exists()}
    names = sorted(path.name for path in (*run.iterdir(), *(run / "checkpoints").iterdir()))
    return {"files": found, "names": names, "records": records}


def damage_newest(out: Path, chance: random.Random) -> None:
    """With probability 1/2 flip a bit of a file of the newest checkpoint, truncate it or remove it."""
    steps = sorted((out / "run" / "checkpoints").glob("step-*"))
    files = sorted(path for path in steps[-1].rglob("*") if path.is_file() and path.stat().st_size) if steps else []
    if not files or chance.random() < 0.5:
        return
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    match chance.choice(("bit", "cut", "remove")):
        case "bit":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
        case "cut":
            file.write_bytes(data[: chance.randrange(len(data))])
        case "remove":
            file.unlink()


JOBS: Final[dict[str, Job]] = {
    "pretrain": Job(pretrain, run_outcome, damage_newest),
    "finetune": Job(finetune, run_outcome, damage_newest),
    "convert": Job(convert, files_of),
    "replace": Job(replace, files_of),
}


# --- kills ---


def make_inputs(home: Path) -> None:
    """Write a very small tokenizer, token shards, examples, base and Hugging Face folder."""
    import dsmoe_jax
    from dsmoe_jax.model import DeepSeekMoE
    from dsmoe_jax.text.tokenizer import tokenizer_files
    from dsmoe_jax.text.train_tokenizer import train_tokenizer
    from dsmoe_jax.train.data import tokenize
    from tests.helpers.hf_folder import random_params, tiny, write_hf

    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "moe", "(x)", "return"]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(200)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"instruction": text[:20], "output": text[20:60]} for text in texts[:80]]
    (home / "examples.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train_tokenizer(texts * 3, home / "tokenizer", 300)
    tokenize(home / "text.jsonl", home / "tokenizer", home / "shards", val_fraction=0.1)
    model = tiny(vocab_size=300)
    (home / "model.json").write_text(json.dumps(model.to_dict()))
    dsmoe_jax.save(DeepSeekMoE.init(model, seed=1), home / "base", extra_files=tokenizer_files(home / "tokenizer"))
    large = tiny(vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=128)
    write_hf(home / "hf", large, random_params(large))


def child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork of this process, which must not have initialized a backend; return its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def finish(work: Callable[[], Any]) -> None:
    """Run `work` in a child process."""
    _, status = os.waitpid(child(work), 0)
    if status:
        raise AssertionError(f"ended with status {status}")


def kill_after(work: Callable[[], Any], seconds: float) -> bool:
    """Run `work` in a child process and kill it after `seconds`; return whether it was still running."""
    pid = child(work)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise AssertionError(f"ended with status {status}")
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def torment(name: str, home: Path, kills: int, seed: int = 0) -> int:
    """Kill a job `kills` times, restarting it when complete; return the number of outcomes compared.

    Raises `AssertionError` for an outcome other than that of an uninterrupted job.
    """
    job, chance = JOBS[name], random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory(prefix=f"kills-{name}-") as folder:
        want, seconds = _undisturbed(job, home, Path(folder) / "undisturbed")
        done, compared, out = 0, 0, Path(folder) / "killed"

        def work() -> None:
            job.work(home, out)

        while done < kills:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            tries = 0
            while done < kills and tries < 8:
                if not kill_after(work, chance.uniform(0, 1) * seconds):
                    break
                done, tries = done + 1, tries + 1
                job.damage(out, chance)
            finish(work)
            compared += 1
            if (got := job.outcome(out)) != want:
                raise AssertionError(f"{name}: after {tries} kills: {_first_difference(got, want)}")
    return compared


def _undisturbed(job: Job, home: Path, out: Path) -> tuple[Any, float]:
    out.mkdir()
    started = time.monotonic()
    finish(lambda: job.work(home, out))
    return job.outcome(out), time.monotonic() - started


def _first_difference(got: Any, want: Any, place: str = "") -> str:
    if isinstance(got, dict) and isinstance(want, dict) and got.keys() == want.keys():
        name = next(name for name in got if got[name] != want[name])
        return _first_difference(got[name], want[name], f"{place}/{name}")
    if isinstance(got, list) and isinstance(want, list) and len(got) == len(want):
        at = next(i for i in range(len(got)) if got[i] != want[i])
        return _first_difference(got[at], want[at], f"{place}/{at}")
    return f"{place}: {str(got)[:300]}, not {str(want)[:300]}"


def main() -> None:
    """Kill each job and print the number of equal outcomes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="kills-inputs-") as folder:
        finish(lambda: make_inputs(Path(folder)))
        for i, name in enumerate(args.jobs):
            kills = args.kills // len(args.jobs) + (i < args.kills % len(args.jobs))
            started = time.monotonic()
            compared = torment(name, Path(folder), kills, args.seed)
            print(f"{name}: {kills} kills, {compared} outcomes equal, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA logs where each cached program was compiled
    with contextlib.suppress(ImportError):  # imported once for all children
        import dsmoe_jax.train.loop  # noqa: F401
    main()
