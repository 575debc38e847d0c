"""Training on CPU restarts once with huge pages."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.cli import huge_pages
from dsmoe_jax.cli.huge_pages import use_huge_pages

RUN = ["pretrain", "tiny"]


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of restarts, on a system with huge pages."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(huge_pages, "_supported", lambda: True)
    monkeypatch.setattr(os, "execve", lambda program, argv, environment: found.append(dict(environment)))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("GLIBC_TUNABLES", huge_pages.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return found


def test_training_on_cpu_restarts(restarts: list[dict[str, str]]):
    use_huge_pages(RUN)

    assert [one["GLIBC_TUNABLES"] for one in restarts] == ["glibc.malloc.hugetlb=1"]


def test_other_tunables_are_kept(restarts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")

    use_huge_pages(RUN)

    assert [one["GLIBC_TUNABLES"] for one in restarts] == ["glibc.malloc.check=1:glibc.malloc.hugetlb=1"]


@pytest.mark.parametrize(("argv", "variables"), [
    (RUN, {"DSMOE_HUGE_PAGES": "0"}),
    (RUN, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
    (RUN, {"JAX_PLATFORMS": "cuda,cpu"}),
    ([*RUN, "--help"], {}),
    (["generate", "model"], {}),
    ([], {}),
], ids=str)  # fmt: skip
def test_no_restart(
    argv: list[str], variables: dict[str, str], restarts: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    use_huge_pages(argv)

    assert not restarts


@pytest.mark.skipif(not huge_pages._supported(), reason="the system has no huge pages for malloc")
def test_the_command_starts_again_with_its_arguments(tmp_path: Path):
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys\nfrom dsmoe_jax.cli.huge_pages import use_huge_pages\n"
        "use_huge_pages(sys.argv[1:])\nprint(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}

    found = subprocess.run([sys.executable, script, *RUN], env=environment | {"JAX_PLATFORMS": "cpu"}, **options)

    assert found.stdout == f"glibc.malloc.hugetlb=1 {RUN}\n"
