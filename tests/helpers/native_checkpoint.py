"""A small native checkpoint with its source, as fixtures to assign in a test module."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.convert import VerificationReport, import_hf
from tests.helpers.hf_folder import (
    random_params,
    tiny,
    write_hf,
)

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
STATE = "parameters/state"
ORBAX = [f"{STATE}/_METADATA", "parameters/_CHECKPOINT_METADATA"]
EXTRA_FILES = {
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",
}
DATA = f"{STATE}/embed/c/0/0"


def make(work: Path, **changes: Any) -> Path:
    """Write a native checkpoint `native` with all extra files, and its source `hf`."""
    source = write_hf(work / "hf", tiny(**changes), random_params(tiny(**changes)), shards=2)
    for name, data in EXTRA_FILES.items():
        (source / name).write_bytes(data)
    return import_hf(source, work / "native").path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a read-only checkpoint with its source."""
    return make(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def native(tmp_path: Path, made: Path) -> Path:
    """Return a copy of `made` to modify."""
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "native"


def found(report: VerificationReport) -> list[tuple[str, str | None]]:
    return [(one["file"], one["tensor"]) for one in report.mismatches]
