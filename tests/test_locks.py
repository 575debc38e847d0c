"""Locks: one writer per folder, released on exit, kill and fork. Start at the first test."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe_jax.storage.locks import lock_folder, lock_name

REPOSITORY = Path(__file__).resolve().parent.parent
HOLD = """
import os, sys, time
from pathlib import Path
from dsmoe_jax.storage.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    if sys.argv[2:]:
        ready, started = os.pipe()
        if os.fork() == 0:
            os.write(started, b"x")
            time.sleep(60)
        os.read(ready, 1)
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked(folder: Path, *options: str) -> Iterator[subprocess.Popen]:
    """Hold the lock of a folder in another process."""
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def take(folder: Path) -> None:
    with lock_folder(folder):
        pass


def test_a_second_process_is_rejected_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "run") as first:
        for path in ("run", "run/", "./run", "other/../run", "link", str(tmp_path / "run")):
            with pytest.raises(ValueError, match=rf"is in use by another process \(pid {first.pid}\); ") as refused:
                take(Path(path))
            assert "\n" not in str(refused.value)


def test_a_killed_holder_releases_the_lock(tmp_path: Path):
    with locked(tmp_path / "run") as first:
        first.send_signal(signal.SIGKILL)
        first.wait(30)

        take(tmp_path / "run")

    assert list((tmp_path / "run").iterdir()) == []


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path):
    with locked(tmp_path / "run", "fork") as first:
        first.send_signal(signal.SIGKILL)
        first.wait(30)

        take(tmp_path / "run")


def test_lock_files_and_empty_new_folders_are_removed(tmp_path: Path):
    (tmp_path / "old").mkdir()

    take(tmp_path / "old")
    take(tmp_path / "new")
    with lock_name(tmp_path / "file"):
        assert [path.name for path in tmp_path.glob(".*")] == [".file.lock"]

    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert list((tmp_path / "old").iterdir()) == []


def test_names_are_locked_independently(tmp_path: Path):
    a, b = tmp_path / "a", tmp_path / "b"
    refused = pytest.raises(ValueError, match="a is in use by another process")

    with lock_name(a), lock_name(b), lock_name(a, "merging.lock"), refused, lock_name(a):
        pass


def test_an_unwritable_place_is_reported_in_one_line(tmp_path: Path):
    (tmp_path / "file").touch()

    for lock in (
        lock_folder(tmp_path / "file" / "run"),
        lock_name(tmp_path / "file" / "out"),
        lock_folder(tmp_path / "file"),
    ):
        with pytest.raises(ValueError, match=r"cannot be written: (Not a directory|File exists)"), lock:
            pass


def test_a_full_disk_locks_without_a_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)

    with lock_folder(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by another process; "):
        take(tmp_path / "run")
