"""Atomic directories: rename, journal, locks, disk space, replacement. Start at the first test."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.storage import atomic_dir as module
from dsmoe_jax.storage.atomic_dir import (
    StagingDir,
    atomic_dir,
    check_space,
    recover_folder,
    replace_folder,
    staging_path,
    write_json,
)
from tests.helpers.hf_folder import snapshot

REPOSITORY = Path(__file__).resolve().parent.parent
JOB = {"convert": "x", "sizes": [1, 2]}
FAILURES = {
    "Ctrl-C": KeyboardInterrupt(),
    "full disk": OSError(28, "No space left on device"),
    "no memory": MemoryError(),
}
every_failure = pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)


def write_units(path: Path, units: str, job: Any = JOB, stop: BaseException | None = None, needs: int = 0) -> list[str]:
    """Write a file per unit unless it is finished, then raise `stop`; return the units found finished."""
    with atomic_dir(path, job=job, needs=needs) as draft:
        found = sorted(draft.finished)
        for unit in units:
            if unit not in draft.finished:
                (draft.folder / unit).write_text(f"data of {unit}")
                draft.finish(unit, {"of": unit})
        if stop is not None:
            (draft.folder / "half").write_text("torn")
            raise stop
        (draft.folder / "half").unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def interrupted(path: Path, units: str, **options: Any) -> Iterator[None]:
    """Interrupt a run once `units` are finished, then enter the block."""
    with pytest.raises(KeyboardInterrupt):
        write_units(path, units, stop=KeyboardInterrupt(), **options)
    yield


def files_of(units: str) -> dict[str, bytes]:
    return {unit: f"data of {unit}".encode() for unit in units}


@pytest.mark.parametrize("job", [None, JOB], ids=["no job", "job"])
def test_the_folder_appears_when_the_block_ends(tmp_path: Path, job: Any):
    out = tmp_path / "new" / "out"

    with atomic_dir(out, job=job) as draft:
        (draft.folder / "deep").mkdir()
        (draft.folder / "deep" / "file").write_text("x")
        draft.finish("deep", None)
        inside = (draft.folder, out.exists())

    assert inside == (tmp_path / "new" / ".out.incomplete", False)
    assert staging_path(out) == inside[0]
    assert snapshot(tmp_path) == {"new": None, "new/out": None, "new/out/deep": None, "new/out/deep/file": b"x"}


def test_a_relative_path_survives_a_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    with atomic_dir("out"):
        monkeypatch.chdir(tmp_path / "elsewhere")

    assert sorted(snapshot(tmp_path)) == ["elsewhere", "out"]


def test_everything_is_fsynced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[str, bool]] = []
    out = tmp_path / "out"
    monkeypatch.setattr(module, "sync", lambda path: synced.append((path.name, out.exists())))

    write_units(out, "ab")

    assert sorted(synced) == sorted(
        [(".out.incomplete", False), ("a", False), ("b", False), ("journal.jsonl", False), (tmp_path.name, True)]
    )
    assert synced[-1] == (tmp_path.name, True)


MAKE: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "file": Path.touch,
    "link": lambda path: path.symlink_to("absent"),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_an_existing_path_is_rejected_and_unchanged(tmp_path: Path, make: Callable[[Path], Any]):
    make(tmp_path / "out")
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match="out exists; nothing is overwritten"):
        write_units(tmp_path / "out", "a")

    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path: Path, make: Callable[[Path], Any]):
    def write() -> None:
        with atomic_dir(tmp_path / "out"):
            make(tmp_path / "out")

    with pytest.raises(ValueError, match="out exists; nothing is overwritten"):
        write()

    assert os.path.lexists(tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.parent)], ids=["file", "link"])
def test_a_file_in_place_of_the_staging_dir_is_rejected(tmp_path: Path, make: Callable[[Path], Any]):
    make(tmp_path / ".out.incomplete")
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match="out cannot be written") as refused:
        write_units(tmp_path / "out", "a")

    assert "\n" not in str(refused.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [*FAILURES.values(), ValueError("bad input")], ids=[*FAILURES, "bad input"])
def test_a_failure_without_a_job_leaves_nothing(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)):
        write_units(tmp_path / "out", "ab", job=None, stop=error)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("units", "error"), [("ab", ValueError("bad input")), ("", KeyboardInterrupt())], ids=["bad input", "at once"]
)
def test_early_failures_leave_nothing(tmp_path: Path, units: str, error: BaseException):
    with pytest.raises(type(error)):
        write_units(tmp_path / "out", units, stop=error)

    assert list(tmp_path.iterdir()) == []


@every_failure
def test_an_equal_job_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException):
    caplog.set_level(logging.INFO)
    with pytest.raises(type(error)):
        write_units(tmp_path / "out", "ab", stop=error)
    left = sorted(path.name for path in staging_path(tmp_path / "out").iterdir())

    found = write_units(tmp_path / "out", "abc", job=json.loads(json.dumps(JOB)))

    assert left == ["a", "b", "half", "journal.jsonl"]
    assert "run the same command to resume" in caplog.text
    assert found == ["a", "b"]
    assert snapshot(tmp_path) == {"out": None} | {f"out/{name}": data for name, data in files_of("abc").items()}


def test_a_job_may_be_interrupted_repeatedly(tmp_path: Path):
    found = []
    for units in ("a", "ab", "abc"):
        with interrupted(tmp_path / "out", units):
            found.append(len((staging_path(tmp_path / "out") / "journal.jsonl").read_text().splitlines()) - 1)

    last = write_units(tmp_path / "out", "abcd")

    assert found == [1, 2, 3]
    assert last == ["a", "b", "c"]


@pytest.mark.parametrize("job", [None, {"convert": "y"}, {**JOB, "more": None}], ids=["none", "another", "more"])
def test_output_of_another_job_is_discarded_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, job: Any):
    caplog.set_level(logging.INFO)
    with interrupted(tmp_path / "out", "ab"):
        (staging_path(tmp_path / "out") / "deep").mkdir()
        (staging_path(tmp_path / "out") / "link").symlink_to(tmp_path)

    found = write_units(tmp_path / "out", "c", job=job)

    assert found == []
    assert "Discarding the incomplete output of another job" in caplog.text
    assert snapshot(tmp_path) == {"out": None, "out/c": b"data of c"}


TORN = {
    "half a line": lambda journal: journal.write_text(journal.read_text() + '{"record": {"of": "c"}, "un'),
    "a line but for its end": lambda journal: journal.write_text(journal.read_text()[:-1]),
    "half a character": lambda journal: journal.write_bytes(journal.read_bytes() + b"\xe2\x82"),
    "zeros": lambda journal: journal.write_bytes(journal.read_bytes() + bytes(100)),
    "empty": lambda journal: journal.write_text(""),
    "half of the first line": lambda journal: journal.write_text(journal.read_text()[:10]),
    "gone": lambda journal: journal.unlink(),
    "an interrupted rewrite": lambda journal: (journal.parent / "journal.jsonl.new").write_text("{"),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_truncated_journal_loses_only_its_units(tmp_path: Path, tear: Callable[[Path], Any]):
    with interrupted(tmp_path / "out", "ab"):
        tear(staging_path(tmp_path / "out") / "journal.jsonl")

    with interrupted(tmp_path / "out", "abc"):
        left = (staging_path(tmp_path / "out") / "journal.jsonl").read_text().splitlines()
    found = write_units(tmp_path / "out", "abcd")

    assert [json.loads(line)["unit"] for line in left[1:]] == ["a", "b", "c"]
    assert found == ["a", "b", "c"]
    assert snapshot(tmp_path) == {"out": None} | {f"out/{name}": data for name, data in files_of("abcd").items()}


def test_the_journal_is_read_up_to_a_damaged_line(tmp_path: Path):
    with interrupted(tmp_path / "out", "abc"):
        journal = staging_path(tmp_path / "out") / "journal.jsonl"
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join([*lines[:2], "\0" * 20, lines[3]]) + "\n")

    found = write_units(tmp_path / "out", "abc")

    assert found == ["a"]


HOLD = """
import sys, time
from dsmoe_jax.storage.atomic_dir import atomic_dir
with atomic_dir(sys.argv[1], job={"convert": "x"}) as draft:
    (draft.folder / "a").write_text("theirs")
    draft.finish("a", None)
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def locked_by_another_process(path: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("job", [None, {"convert": "x"}], ids=["no job", "the same job"])
def test_a_second_writer_is_rejected(tmp_path: Path, job: Any):
    with locked_by_another_process(tmp_path / "out") as first:
        before = snapshot(tmp_path)

        with pytest.raises(ValueError, match="out is in use by another process"):
            write_units(tmp_path / "out", "b", job=job)

        assert snapshot(tmp_path) == before
        first.communicate("go on", timeout=30)
    assert first.returncode == 0
    assert snapshot(tmp_path) == {"out": None, "out/a": b"theirs"}


def test_a_second_writer_in_this_process_is_rejected(tmp_path: Path):
    with atomic_dir(tmp_path / "out") as draft:
        with pytest.raises(ValueError, match="out is in use by another process"):
            write_units(tmp_path / "out", "b")
        (draft.folder / "a").touch()

    assert sorted(snapshot(tmp_path)) == ["out", "out/a"]


def test_a_killed_writer_releases_its_lock_and_units_resume(tmp_path: Path):
    with locked_by_another_process(tmp_path / "out") as first:
        first.send_signal(signal.SIGKILL)
        first.wait(30)

        found = write_units(tmp_path / "out", "ab", job={"convert": "x"})

    assert found == ["a"]
    assert (tmp_path / "out" / "a").read_text() == "theirs"


Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free disk space in bytes."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - free, free))


def test_a_full_disk_is_rejected_before_writing(tmp_path: Path, free_bytes: Callable[[int], None]):
    free_bytes(1_230_000_000)

    with pytest.raises(ValueError, match=r"out needs 5\.60 GB more; .* has 1\.23 GB free"):
        write_units(tmp_path / "out", "a", needs=5_600_000_000)

    assert list(tmp_path.iterdir()) == []


def test_exactly_enough_space_is_accepted(tmp_path: Path, free_bytes: Callable[[int], None]):
    free_bytes(1_000)

    write_units(tmp_path / "just", "a", job=None, needs=1_000)
    with pytest.raises(ValueError, match="more; "):
        write_units(tmp_path / "over", "a", job=None, needs=1_001)

    assert sorted(snapshot(tmp_path)) == ["just", "just/a"]


def test_resumed_output_counts_towards_the_space(tmp_path: Path, free_bytes: Callable[[int], None]):
    with interrupted(tmp_path / "out", "ab"):
        written = sum(path.stat().st_size for path in staging_path(tmp_path / "out").iterdir())
    free_bytes(50)

    with pytest.raises(ValueError, match="more; "):
        write_units(tmp_path / "out", "ab", needs=written + 51)
    found = write_units(tmp_path / "out", "ab", needs=written + 50)

    assert found == ["a", "b"]


def test_a_disk_too_full_to_resume_keeps_finished_units(tmp_path: Path, free_bytes: Callable[[int], None]):
    with interrupted(tmp_path / "out", "ab"):
        free_bytes(10)

    with pytest.raises(ValueError, match="GB free"):
        write_units(tmp_path / "out", "abc", needs=10**6)
    free_bytes(10**6)
    found = write_units(tmp_path / "out", "abc", needs=10**6)

    assert found == ["a", "b"]


def test_a_full_disk_is_reported_with_its_path(tmp_path: Path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/name'"):
        write_units(tmp_path / "name", "a", stop=OSError(28, "No space left on device"))


def test_a_disk_too_full_for_the_journal_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: Any, **__: Any) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)

    with pytest.raises(ValueError, match=r"name cannot be written: No space left on device"):
        write_units(tmp_path / "name", "a")
    assert not list(tmp_path.iterdir())


def test_space_is_checked_on_the_disk_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: checked.append(path) or Usage(9, 9, 9))

    check_space(tmp_path / "not" / "there" / "yet", 9)

    assert checked == [tmp_path]


def test_without_a_job_there_is_no_journal(tmp_path: Path):
    draft = StagingDir(tmp_path, None)

    draft.finish("a", 1)
    draft.close()

    assert draft.finished == {"a": 1}
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    """Simulates SIGKILL: no cleanup runs."""


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return a new folder and the one it replaces."""
    for name in ("best.new", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path / "best.new", tmp_path / "best"


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool):
    new, path = two_folders(tmp_path)
    if not exchanges:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)

    replace_folder(new, path)

    assert snapshot(tmp_path) == {"best": None, "best/file": b"best.new"}


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("at", range(6))
def test_a_killed_replacement_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, exchanges: bool
):
    new, path = two_folders(tmp_path)
    steps = iter(range(100))

    def killing(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if next(steps) == at:
                raise Killed
            return original(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        if not exchanges:
            patch.setattr(module, "_exchange", lambda *_: False)
        patch.setattr(Path, "rename", killing(Path.rename))
        patch.setattr(module, "sync_tree", killing(module.sync_tree))
        patch.setattr(shutil, "rmtree", killing(shutil.rmtree))
        with contextlib.suppress(Killed):
            replace_folder(new, path)
        assert not exchanges or path.exists()

    recover_folder(path, new)

    found = snapshot(tmp_path)
    assert found.keys() == {"best", "best/file"}
    assert found["best/file"] in (b"best", b"best.new")


def test_small_files_are_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "report.json"
    write_json(file, {"n": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)

    with pytest.raises(OSError, match=r"No space left on device: '.*report\.json'"):
        write_json(file, {"n": 2})

    assert snapshot(tmp_path) == {"report.json": b'{\n  "n": 1\n}\n'}
