"""Where the time of a run goes, also over restarts, and traces of its steps."""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.train import loop
from dsmoe_jax.train.goodput import KINDS, Goodput
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.metrics import read_records
from dsmoe_jax.train.profiling import parse_steps
from tests.test_loop import config, home  # noqa: F401  fixtures

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]

SCOPES = ("router", "dispatch", "experts", "attention", "head")


def records(started: float, steps: range, resumed: int | None = None) -> list[dict[str, Any]]:
    """Records of a process: 3 s of setup, 2 s of compilation, steps of 1 s with 0.1 s of waiting for data."""
    found: list[dict[str, Any]] = [
        {"step": step, "loss": 1.0, "step_time_seconds": 1.0, "data_loading_seconds": 0.1} for step in steps
    ]
    found[0] |= {"run": {"started": started}, "setup_seconds": 3.0, "compile_seconds": 2.0, "step_time_seconds": 3.0}
    return [found[0] | ({} if resumed is None else {"resumed_from": resumed}), *found[1:]]


def test_repeated_steps_and_pauses_are_lost():
    now = time.time()
    # 100 s: steps 1 to 10, killed, a pause; 50 s: steps 7 to 12 after a checkpoint at 6, killed at once
    earlier = [*records(now - 150, range(1, 11)), *records(now - 50, range(7, 13), resumed=6)]

    fractions = Goodput(now, [*earlier, *records(now - 10, range(11, 12), resumed=10)]).fractions()

    assert sum(fractions[f"time/{kind}"] for kind in KINDS) == pytest.approx(1)
    seconds = {kind: fractions[f"time/{kind}"] * 150 for kind in KINDS}
    # kept: steps 1 to 6, 7 to 10 and, without a pause, 11
    assert seconds["step"] == pytest.approx(0.9 * 11, abs=0.2)
    assert seconds["data"] == pytest.approx(0.1 * 11, abs=0.1)
    assert seconds["compile"] == pytest.approx(6, abs=0.2)
    assert seconds["setup"] == pytest.approx(9, abs=0.2)
    assert seconds["lost"] == pytest.approx(150 - 11 - 3 * (3 + 2), abs=1)


@pytest.mark.slow
def test_fractions_of_a_run_with_two_kills(tmp_path: Path, home: Path, monkeypatch, caplog):  # noqa: F811
    settings = config(home, tmp_path, mesh=MeshConfig(), steps=12, log_interval=1)
    start = time.time()
    for at in (6, 10):
        monkeypatch.setattr(loop.Monitor, "add", killing(loop.Monitor.add, at))
        with pytest.raises(KeyboardInterrupt):
            run(settings)
        monkeypatch.undo()
        time.sleep(0.3)

    with caplog.at_level(logging.INFO, "dsmoe_jax"):
        run(settings)

    wall = time.time() - start
    (line,) = (one.message for one in caplog.records if one.message.startswith("Time: "))
    total = float(line.split()[1])
    assert 0.9 * wall < total < wall + 0.01
    assert ", 2 restarts: step " in line
    recorded = read_records(tmp_path)[-1]
    assert recorded["step"] == 12
    for fractions in (recorded, read_json(tmp_path / "run.json")["result"]["time"]):
        assert sum(fractions[f"time/{kind}"] for kind in KINDS) == pytest.approx(1, abs=0.01)
        assert fractions["goodput"] == fractions["time/step"] > 0
        assert fractions["time/lost"] * total > 0.6  # the pauses
        assert fractions["time/other"] < 0.05


def killing(add: Any, at: int) -> Any:
    """`Monitor.add` that fails at a step as a kill would: nothing after it is written."""

    def killed(self: Any, step: int, *arguments: Any) -> None:
        add(self, step, *arguments)
        if step == at:
            raise KeyboardInterrupt

    return killed


@pytest.mark.slow
def test_a_trace_names_the_scopes(tmp_path: Path, home: Path, caplog):  # noqa: F811
    settings = config(home, tmp_path, mesh=MeshConfig(), steps=4, profile="2:3")

    with caplog.at_level(logging.INFO, "dsmoe_jax"):
        run(settings)

    (file,) = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = [plane.name for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
    assert "/host:CPU" in planes
    data = file.read_bytes()
    assert not [scope for scope in SCOPES if f"/{scope}/".encode() not in data]
    assert f"Saved trace of steps 2 to 3: {tmp_path / 'profile'}" in [one.message for one in caplog.records]


@pytest.mark.parametrize("steps", ["3", "3:2", "0:2", "a:b", "1:", "-1:3"])
def test_bad_steps_are_one_line(steps: str, home: Path, tmp_path: Path):  # noqa: F811
    with pytest.raises(ValueError, match=f"^profile must be FIRST:LAST with 1 <= FIRST <= LAST, got '{steps}'$"):
        dataclasses.replace(config(home, tmp_path), profile=steps)
    assert parse_steps("3:3") == (3, 3)
