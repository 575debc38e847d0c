"""Two processes of four devices train and resume like one process of eight.

Each test starts two processes on loopback.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.loop import run
from tests.helpers.runs import losses
from tests.test_loop import config, home  # noqa: F401  fixtures

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("no_compilation_cache")]

TIMEOUT = 200
STEPS = 6
# Run by each process, with JSON args as argument.
PROGRAM = """
import json, sys
from pathlib import Path
args = json.loads(sys.argv[1])
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import DistributedConfig
from tests.test_loop import config, run
distributed = DistributedConfig(coordinator_address=args["coordinator"], num_processes=2, process_id=args["index"])
mesh = MeshConfig(**args["mesh"])
run(config(Path(args["home"]), Path(args["out"]), mesh=mesh, steps=args["steps"], distributed=distributed))
"""


def run_two(home: Path, out: Path, mesh: MeshConfig, steps: int = STEPS) -> None:  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            args = {
                "coordinator": coordinator,
                "index": index,
                "home": str(home),
                "out": str(out),
                "mesh": vars(mesh),
                "steps": steps,
            }
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(args)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in started:
            _, error = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, error[-2000:]


@pytest.mark.slow
def test_two_processes_train_as_one_with_expert_parallelism(tmp_path: Path, home: Path):  # noqa: F811
    mesh = MeshConfig(fsdp=1, expert=8)

    run_two(home, tmp_path / "two", mesh)

    run(config(home, tmp_path / "one", mesh=mesh, steps=STEPS))

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_two_processes_resume_from_one(
    tmp_path: Path,
    home: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    mesh = MeshConfig(fsdp=8)
    run(config(home, tmp_path / "one", mesh=mesh, steps=STEPS))
    with monkeypatch.context() as patch:
        patch.setattr("dsmoe_jax.train.loop._should_stop", lambda stop, n, every: n == 3)
        run(config(home, tmp_path / "two", mesh=mesh, steps=STEPS))

    run_two(home, tmp_path / "two", MeshConfig(fsdp=1, expert=8))  # experts sharded over both processes

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
