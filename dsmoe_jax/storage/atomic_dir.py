"""Atomic, resumable writes of folders and small files. Start at `atomic_dir`.

Output goes to the staging directory `.NAME.incomplete`, is fsynced, and is renamed into place. A journal in the staging
directory lists the completed units of work, so that an interrupted job can resume.
"""

import contextlib
import ctypes
import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.paths import user_path

JOURNAL: Final = "journal.jsonl"
_REWRITTEN: Final = f"{JOURNAL}.new"
_AT_FDCWD: Final = -100  # of linux/fcntl.h: paths are relative to the working directory
_RENAME_EXCHANGE: Final = 2
_log = logging.getLogger(__name__)


class StagingDir:
    """The staging directory of `atomic_dir`: write to `folder`, skip the units in `finished` (records by unit name)."""

    def __init__(self, folder: Path, job: Mapping[str, Any] | None):
        self.folder = folder
        self.finished: dict[str, Any] = {}
        self._lock, self._journal = threading.Lock(), None
        if job is None:
            self._clear()
            return
        head = json.dumps({"job": job}, sort_keys=True)
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            lines = (folder / JOURNAL).read_text(encoding="utf-8").split("\n")[:-1]  # a crash may truncate the last one
        if lines and lines[0] == head:
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a damaged line: its unit is redone
                for line in lines[1:]:
                    entry = json.loads(line)
                    self.finished[entry["unit"]] = entry["record"]
        else:
            self._clear()
        # Rewritten: a killed writer may have left a truncated last line.
        lines = [head, *(_entry(unit, record) for unit, record in self.finished.items())]
        rewritten = folder / _REWRITTEN
        rewritten.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rewritten.rename(folder / JOURNAL)
        self._journal = (folder / JOURNAL).open("a", encoding="utf-8")

    def finish(self, unit: str, record: Any) -> None:
        """Record that `unit` is complete and fsynced; thread-safe. `record` must be JSON."""
        with self._lock:
            self.finished[unit] = record
            if self._journal is not None:
                self._journal.write(_entry(unit, record) + "\n")
                self._journal.flush()
                os.fsync(self._journal.fileno())

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()

    def _clear(self) -> None:
        if left := list(self.folder.iterdir()):
            _log.info("Discarding the incomplete output of another job: %s", self.folder)
        for entry in left:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def staging_path(path: Path) -> Path:
    """Return the staging directory of a folder."""
    return path.parent / f".{path.name}.incomplete"


def check_new_path(path: str | Path) -> Path:
    """Return the absolute path of an output; raise `DSMoEError` if it exists."""
    path = user_path(path, "output path").absolute()
    if os.path.lexists(path):
        raise DSMoEError(f"{path} exists; nothing is overwritten")
    return path


def check_outside(path: Path, checkpoint: Path) -> None:
    """Raise `DSMoEError` if an output would be inside the checkpoint that is read."""
    if checkpoint.resolve() in path.resolve().parents:
        raise DSMoEError(f"{path} is inside the checkpoint {checkpoint}; choose a path outside")


@contextlib.contextmanager
def atomic_dir(path: str | Path, *, needs: int = 0, job: Mapping[str, Any] | None = None) -> Iterator[StagingDir]:
    """Yield a `StagingDir` that is fsynced and renamed to `path` when the block succeeds.

    `needs` is the final size in bytes, to check the free disk space. `job` is JSON that determines the content: after a
    failure other than a `ValueError` the staging directory stays, and the next call with an equal job resumes from it.
    Raises `DSMoEError` if `path` exists or is being written by another process, or if the disk is too full.
    """
    path = check_new_path(path)
    folder = staging_path(path)
    with lock_name(path), name_full_disk(path), contextlib.ExitStack() as stack:
        check_new_path(path)  # another process may have created it before it released the lock
        try:
            folder.mkdir(exist_ok=True)
            if folder.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            staging = StagingDir(folder, job)
        except OSError as error:
            with contextlib.suppress(OSError):  # `rmdir` removes a new, empty one only
                if not folder.is_symlink():
                    (folder / _REWRITTEN).unlink(missing_ok=True)
                    folder.rmdir()
            raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None
        stack.callback(staging.close)
        resumable = bool(staging.finished)
        try:
            check_space(path, needs - folder_size(folder))
            resumable = False
            yield staging
            sync_tree(folder)
        except BaseException as error:
            if resumable or (staging.finished and job is not None and not isinstance(error, ValueError)):
                _log.info("Keeping completed work in %s; run the same command to resume", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / JOURNAL).unlink(missing_ok=True)
        check_new_path(path)
        folder.rename(path)
        sync(path.parent)


@contextlib.contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Name `path` in the `OSError` of a full disk, which has no file name, the source's or that of a staging file."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Replace `path` by the complete folder `new`, atomically where the file system can exchange two names.

    Elsewhere `path` is missing for an instant; after a crash at that point `recover_folder` restores it.
    """
    sync_tree(new)
    old = path.with_name(f"{path.name}.old")
    if not os.path.lexists(path):
        new.rename(path)
    elif not _exchange(new, path):
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
    sync(path.parent)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def recover_folder(path: Path, new: Path) -> None:
    """Complete an interrupted `replace_folder` and remove leftovers, including the staging directory of `new`."""
    old = path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():  # `new` was complete, or `path` had not been moved
        (new if new.exists() else old).rename(path)
        sync(path.parent)
    for left in (new, old, staging_path(new)):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder, 0 if there is none."""
    return sum(file.lstat().st_size for file in folder.rglob("*"))


def check_space(path: Path, needed: int) -> None:
    """Raise `DSMoEError` unless the disk of `path` has `needed` bytes free."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DSMoEError(f"{path} needs {needed / 1e9:.2f} GB more; {parent} has {free / 1e9:.2f} GB free")


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically, formatted as Hugging Face does: sorted, two spaces."""
    write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write or replace a small file atomically."""
    path = Path(os.path.realpath(path))  # keep a symbolic link, replace its target
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _entry(unit: str, record: Any) -> str:
    return json.dumps({"unit": unit, "record": record}, sort_keys=True)


def sync_tree(folder: Path) -> None:
    """Fsync all files and folders of `folder`."""
    for path in (folder, *folder.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
