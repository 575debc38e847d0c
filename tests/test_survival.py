"""What happens to long runs: killed processes, slow disks, preemption, damage. Each test is one story."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.checkpoints import Checkpoints
from dsmoe_jax.train.config import CheckpointConfig
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.metrics import read_records
from tests.helpers.hf_folder import flip_bit
from tests.helpers.runs import losses
from tests.test_loop import config, home  # noqa: F401  fixtures
from tests.test_train_processes import PROGRAM

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("no_compilation_cache")]

KILLS = 20
STEPS = 60


class TwoHosts:
    """Two processes of four simulated devices each, which train one run."""

    def __init__(self, home: Path, out: Path):  # noqa: F811
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
        arguments = json.dumps({"home": str(home), "out": str(out), "mesh": {"fsdp": 8}, "steps": STEPS})
        self.log = out.with_suffix(".log").open("ab")
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(index), coordinator, arguments],
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                stdout=self.log,
                stderr=self.log,
            )
            for index in range(2)
        ]

    def wait(self) -> list[int]:
        """Wait for both, and return their exit codes."""
        codes = [process.wait(timeout=300) for process in self.processes]
        self.log.close()
        return codes

    def kill(self, index: int) -> None:
        """Kill one of them; then, as a scheduler does, the other."""
        for process in (self.processes[index], self.processes[1 - index]):
            process.kill()
            process.wait()
        self.log.close()


def steps_done(out: Path) -> int:
    try:
        return max((record["step"] for record in read_records(out, superseded=True)), default=0)
    except (OSError, ValueError):
        return 0


def kill_after_a_step(hosts: TwoHosts, out: Path, chance: random.Random) -> None:
    """Kill a random process at a random moment, once the run has made some steps."""
    seen, wanted = len_of_records(out), chance.randint(1, 6)
    until = time.monotonic() + 240
    while len_of_records(out) < seen + wanted and all(process.poll() is None for process in hosts.processes):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(chance.random() * 0.2)
    hosts.kill(chance.randrange(2))


def len_of_records(out: Path) -> int:
    try:
        return len((out / "metrics.jsonl").read_bytes().splitlines())
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hosts_killed_twenty_times_train_as_one_that_is_not(tmp_path: Path, home: Path):  # noqa: F811
    chance, out, kills = random.Random(0), tmp_path / "killed", 0
    while kills < KILLS and steps_done(out) < STEPS:
        kill_after_a_step(TwoHosts(home, out), out, chance)
        kills += 1
    assert TwoHosts(home, out).wait() == [0, 0]

    run(config(home, tmp_path / "whole", steps=STEPS))

    # The order of sums over processes differs, so losses are equal to rounding; other tokens would change them by 1e-2.
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    print(f"{kills} kills")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damage_to_the_files_of_one_host_is_skipped_by_both(tmp_path: Path, home: Path):  # noqa: F811
    out = tmp_path / "damaged"
    hosts = TwoHosts(home, out)
    while len(list((out / "checkpoints").glob("step-*/manifest.json"))) < 2:
        assert hosts.processes[0].poll() is None
        time.sleep(0.05)
    hosts.kill(1)
    newest = max((out / "checkpoints").glob("step-*/manifest.json")).parent
    of_host_1 = sorted(file for file in newest.rglob("*") if file.is_file() and file.name != "manifest.json")[1::2]
    flip_bit(max(of_host_1, key=lambda file: file.stat().st_size), at=-1)

    assert TwoHosts(home, out).wait() == [0, 0]

    assert f"Skipping checkpoint {newest}" in out.with_suffix(".log").read_text()
    assert steps_done(out) == STEPS


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_a_slow_disk_never_has_two_checkpoints_at_once(
    tmp_path: Path,
    home: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    finalize, writing, most = Checkpoints._finalize, [], []
    lock = threading.Lock()

    def slow(self: Checkpoints, path: Path, *arguments: Any) -> None:
        with lock:
            writing.append(path)
            most.append(len(writing))
        time.sleep(0.5)  # longer than the steps of an interval
        finalize(self, path, *arguments)
        with lock:
            writing.remove(path)

    monkeypatch.setattr(Checkpoints, "_finalize", slow)
    settings = config(home, tmp_path, mesh=MeshConfig(), steps=6, checkpoint=CheckpointConfig(interval=1))

    with caplog.at_level(logging.WARNING, "dsmoe_jax"):
        run(settings)

    assert most == [1] * 6
    waited = [one.message for one in caplog.records if one.message.startswith("Waited ")]
    assert len(waited) >= 4
    assert waited[0].endswith(" s for the checkpoint before step 2: saving takes longer than the interval")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_preempted_job_is_requeued_until_it_is_done(tmp_path: Path, home: Path):  # noqa: F811
    """As by Slurm's `--requeue`: SIGTERM before the time limit, and the same command again."""
    flags = ["--data.sources", home / "shards", "--data.tokenizer", home / "tokenizer", "--model", home / "model.json"]
    flags += ["--data.sequence-length", 24, "--steps", 3000, "--log-interval", 1000, "--trackers", "jsonl"]
    command = [sys.executable, "-m", "dsmoe_jax", "pretrain", "tiny", "--output-dir", tmp_path / "run", *flags]
    codes, environment = [], os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    while "result" not in json.loads((tmp_path / "run/run.json").read_text() if codes else "{}"):
        job = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
        started, seen = time.monotonic(), steps_done(tmp_path / "run")
        while job.poll() is None and (len(codes) > 2 or steps_done(tmp_path / "run") < seen + 300):
            assert time.monotonic() - started < 200
            time.sleep(0.2)
        if job.poll() is None:
            job.send_signal(signal.SIGTERM)  # the time limit
        job.communicate(timeout=100)
        codes.append(job.returncode)

    assert codes == [0] * len(codes)
    assert len(codes) >= 2
    assert sorted(losses(tmp_path / "run")) == list(range(1, 3001))
