"""A folder that appears under its name only when it is complete; what an interrupted writer left can be gone on with.

Start at `atomic_dir`. The folder grows as a hidden sibling, `.NAME.incomplete`, with a journal of the units that are
finished and on disk; the journal goes just before the folder gets its name.
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

_JOURNAL: Final = "journal.jsonl"
_REWRITTEN: Final = f"{_JOURNAL}.new"
_AT_FDCWD: Final = -100  # of linux/fcntl.h: paths are relative to the working directory
_RENAME_EXCHANGE: Final = 2
_log = logging.getLogger(__name__)


class StagingDir:
    """A folder that is being written. `finished` holds what earlier runs of the same job recorded, by unit."""

    def __init__(self, folder: Path, job: Mapping[str, Any] | None):
        """Open the journal, or begin a new one where it belongs to another job; use `atomic_dir`."""
        self.folder = folder
        self.finished: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._journal = None
        if job is None:
            self._clear()
            return
        head = json.dumps({"job": job}, sort_keys=True)
        lines = _lines(folder / _JOURNAL)
        if lines and lines[0] == head:
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a damaged line: its unit is written again
                for line in lines[1:]:
                    entry = json.loads(line)
                    self.finished[entry["unit"]] = entry["record"]
        else:
            self._clear()
        # Rewritten whole: a killed writer may have left half a line at its end.
        lines = [head, *(_entry(unit, record) for unit, record in self.finished.items())]
        rewritten = folder / _REWRITTEN
        rewritten.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rewritten.rename(folder / _JOURNAL)
        self._journal = (folder / _JOURNAL).open("a", encoding="utf-8")

    def finish(self, unit: str, record: Any) -> None:
        """Note that `unit` is complete and on disk; `record` must be JSON. From any thread."""
        with self._lock:
            self.finished[unit] = record
            if self._journal is not None:
                self._journal.write(_entry(unit, record) + "\n")
                self._journal.flush()
                os.fsync(self._journal.fileno())

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()

    def _clear(self) -> None:
        if left := list(self.folder.iterdir()):
            _log.info("%s: what another, unfinished run left is discarded", self.folder)
        for entry in left:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def staging_path(path: Path) -> Path:
    """Where the folder `path` grows until it is complete."""
    return path.parent / f".{path.name}.incomplete"


def check_new_path(path: str | Path) -> Path:
    """The absolute path of a folder that is to be made; `ValueError` if there is something already."""
    path = user_path(path, "output path").absolute()
    if os.path.lexists(path):
        raise DSMoEError(f"{path} exists; nothing is overwritten")
    return path


@contextlib.contextmanager
def atomic_dir(path: str | Path, *, needs: int = 0, job: Mapping[str, Any] | None = None) -> Iterator[StagingDir]:
    """A `StagingDir` that becomes `path`, every byte of it on disk, when the block ends well.

    The disk must have room for `needs` bytes, those that the draft holds already counted.

    Without `job` it vanishes when the block fails. With one (JSON that says all that decides the content) a failure
    that is not the input's fault, a full disk or Ctrl-C, leaves it, and the next `atomic_dir` with an equal job goes on
    from it; a draft of another job is discarded. Raises `ValueError` if `path` exists or is being written already, and
    if the disk is too full.
    """
    path = check_new_path(path)
    folder = staging_path(path)
    with lock_name(path), name_full_disk(path), contextlib.ExitStack() as stack:
        check_new_path(path)  # the one who had the lock may have made it
        try:
            folder.mkdir(exist_ok=True)
            if folder.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            draft = StagingDir(folder, job)
        except OSError as error:
            with contextlib.suppress(OSError):
                if not folder.is_symlink():
                    (folder / _REWRITTEN).unlink(missing_ok=True)
                    folder.rmdir()  # a new one: it is empty
            raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None
        stack.callback(draft.close)
        kept = bool(draft.finished)
        try:
            check_space(path, needs - _size(folder))
            kept = False
            yield draft
            sync_tree(folder)
        except BaseException as error:
            if kept or (draft.finished and job is not None and not isinstance(error, ValueError)):
                _log.info("%s keeps what is finished; the same command goes on from there", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / _JOURNAL).unlink(missing_ok=True)
        check_new_path(path)
        folder.rename(path)
        sync(path.parent)


@contextlib.contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Name `path` in the `OSError` of a full disk that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Put the complete folder `new` in the place of `path` and remove what was there.

    At every moment one of the two is found at `path`, whole. Where the file system cannot exchange two names there is
    an instant without; `recover_folder` ends what a kill left then.
    """
    sync_tree(new)
    old = _old(path)
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
    """End a `replace_folder` that was killed, and remove what it, or the making of `new`, left."""
    old = _old(path)
    if old.exists() and not path.exists():  # `new` was complete, or `path` had not been moved
        (new if new.exists() else old).rename(path)
        sync(path.parent)
    for left in (new, old, staging_path(new)):
        shutil.rmtree(left, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def check_space(path: Path, needed: int) -> None:
    """`ValueError` unless the disk that `path` will lie on has `needed` bytes free."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DSMoEError(f"{path} needs {needed / 1e9:.2f} GB more; {parent} has {free / 1e9:.2f} GB free")


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a small JSON file the way Hugging Face does, sorted, two spaces: atomically, and on disk."""
    write_file(path, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically, in the place of one of that name, and wait for the disk; `OSError` names it."""
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is written
    draft = path.with_name(f".{path.name}.new")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _entry(unit: str, record: Any) -> str:
    return json.dumps({"unit": unit, "record": record}, sort_keys=True)


def _lines(journal: Path) -> list[str]:
    """The journal's whole lines; the last may be torn."""
    try:
        return journal.read_text(encoding="utf-8").split("\n")[:-1]
    except (FileNotFoundError, UnicodeDecodeError):
        return []


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def sync_tree(folder: Path) -> None:
    """Wait until all files and folders of `folder` are on disk."""
    for home, _, files in os.walk(folder):
        for name in files:
            sync(Path(home) / name)
        sync(Path(home))


def sync(path: Path) -> None:
    """Wait until the file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
