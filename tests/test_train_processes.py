"""Two processes of four devices train and resume like one process of eight.

Each test starts two processes on loopback.
"""

import json
from pathlib import Path

import pytest

from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.loop import run
from tests.helpers.processes import run_two
from tests.helpers.runs import losses
from tests.test_loop import config, home  # noqa: F401  fixtures

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("no_compilation_cache")]

TIMEOUT = 200
STEPS = 6
# Run by each process, with its index, the coordinator and JSON args as arguments.
PROGRAM = """
import json, sys
from pathlib import Path
index, coordinator, args = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import DistributedConfig
from tests.test_loop import config, run
distributed = DistributedConfig(coordinator_address=coordinator, num_processes=2, process_id=index)
mesh = MeshConfig(**args["mesh"])
run(config(Path(args["home"]), Path(args["out"]), mesh=mesh, steps=args["steps"], distributed=distributed))
"""


def train_in_two(home: Path, out: Path, mesh: MeshConfig, steps: int = STEPS) -> None:  # noqa: F811
    args = {"home": str(home), "out": str(out), "mesh": vars(mesh), "steps": steps}
    run_two(PROGRAM, json.dumps(args), timeout=TIMEOUT)


@pytest.mark.slow
def test_two_processes_train_as_one_with_expert_parallelism(tmp_path: Path, home: Path):  # noqa: F811
    mesh = MeshConfig(fsdp=1, expert=8)

    train_in_two(home, tmp_path / "two", mesh)

    run(config(home, tmp_path / "one", mesh=mesh, steps=STEPS))

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
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

    train_in_two(home, tmp_path / "two", MeshConfig(fsdp=1, expert=8))  # experts sharded over both processes

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
