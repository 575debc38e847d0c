"""`dsmoe demo`: its files, its output, and the commands it suggests."""

import shlex
from pathlib import Path

import pytest

from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.cli.commands import _parse
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.train.data import sources
from dsmoe_jax.train.metrics import read_records
from tests.helpers.command import run


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    library = sources._stdlib()
    monkeypatch.setattr(sources, "_stdlib", lambda: library[::4])


def suggested(out: str) -> list[list[str]]:
    """The commands under "Try next:", without `dsmoe`."""
    _, _, commands = out.partition("Try next:\n")
    return [shlex.split(line)[1:] for line in commands.splitlines()]


def test_demo_keeps_its_files(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / "my demo"

    code = run("demo", "--out", "my demo", "--steps", 12)

    out, _ = capsys.readouterr()
    assert code == 0
    assert "Trained 12 steps" in out
    assert all(f"--- completion of {prompt!r}\n{prompt}" in out for prompt in ("def get_", "class ", "import "))
    assert {path.name for path in demo.iterdir()} - {"demo.png"} == {"model.json", "run", "hf", "native"}
    assert is_native(demo / "native")
    assert len([record for record in read_records(demo / "run") if "eval/loss" in record]) >= 5
    config = ModelConfig.from_file(demo / "hf")
    assert (config.n_shared_experts, config.is_moe_layer(0), config.is_moe_layer(1)) == (1, False, True)
    generate, plot, pretrain = suggested(out)
    assert (run(*generate), run(*plot)) == (0, 0)
    assert _parse(pretrain).recipe == "tiny"


def test_temporary_files_are_not_suggested(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsmoe_jax.cli.demo._run", lambda *_, **__: None)

    code = run("demo")

    assert code == 0
    for command in suggested(capsys.readouterr().out):
        assert _parse(command).verb in ("demo", "pretrain", "info")
