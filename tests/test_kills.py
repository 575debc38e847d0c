"""Kills and damage leave no trace in what comes out: a small round of `tests/kills.py`, which does any number."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kills import JOBS


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_jobs_end_as_undisturbed_ones(job: str):
    command = [sys.executable, "-m", "tests.kills", "--kills", "4", "--jobs", job]

    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)

    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 kills" in done.stdout
