"""`dsmoe demo`: its files, its output, and the commands it suggests."""

import functools
import shlex
from pathlib import Path

import pytest

from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.cli import demo
from dsmoe_jax.cli.commands import _parse
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate import Generator
from dsmoe_jax.train.data import files
from dsmoe_jax.train.flags import parse_pretraining
from dsmoe_jax.train.metrics import read_records
from tests.helpers.command import run

pytestmark = pytest.mark.heavy

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer files and a smaller model, and each checkpoint is loaded and compiled once."""
    library, load = list(files._stdlib()), functools.cache(Generator.from_pretrained)
    monkeypatch.setattr(files, "_stdlib", lambda: library[::12])
    monkeypatch.setattr(demo, "_MODEL", demo._MODEL | SMALL)
    monkeypatch.setattr(Generator, "from_pretrained", lambda path: load(Path(path).absolute()))


def suggested(out: str) -> list[list[str]]:
    """The commands under "Try next:", without `dsmoe`."""
    _, _, commands = out.partition("Try next:\n")
    return [shlex.split(line)[1:] for line in commands.splitlines()]


def test_demo_keeps_its_files(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my demo"

    code = run("demo", "--out", "my demo", "--steps", 6)

    out, _ = capsys.readouterr()
    assert code == 0
    assert "Trained 6 steps" in out
    assert all(
        f"--- completion of {prompt!r}\n{prompt}" in out for prompt in ("def get_", "class ", "def __repr__(self):")
    )
    assert {path.name for path in folder.iterdir()} - {"demo.png"} == {"model.json", "run", "hf", "native"}
    assert is_native(folder / "native")
    assert (folder / "hf" / "modeling_deepseek.py").is_file()
    assert len([record for record in read_records(folder / "run") if "eval/loss" in record]) >= 5
    config = ModelConfig.from_file(folder / "hf")
    assert (config.n_shared_experts, config.is_moe_layer(0), config.is_moe_layer(1)) == (1, False, True)
    generate, plot, pretrain = suggested(out)
    assert (run(*generate), run(*plot)) == (0, 0)
    assert parse_pretraining(pretrain[1:]).recipe == "tiny"


def test_temporary_files_are_not_suggested(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsmoe_jax.cli.demo._run", lambda *_, **__: None)

    code = run("demo")

    assert code == 0
    for command in suggested(capsys.readouterr().out):
        assert _parse(command).verb in ("demo", "pretrain", "info")
