"""Exclusive locks for writers: `lock_folder` and `lock_name`. The kernel releases them when the process ends."""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dsmoe_jax.errors import DSMoEError

_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # some network file systems
_log = logging.getLogger(__name__)
_handles: set[int] = set()


class InUseError(DSMoEError):
    """Another process has the lock."""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock `folder`, creating it if needed; raise `InUseError` if another process has the lock."""
    folder = folder.absolute()
    new = not folder.exists()
    _make(folder, folder)
    try:
        with _locked(folder, folder / ".lock"):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def lock_name(path: Path, suffix: str = "lock") -> Iterator[None]:
    """Lock an output path and create its parent; locks with different `suffix` are independent."""
    path = path.absolute()
    _make(path.parent, path)
    with _locked(path, path.parent / f".{path.name}.{suffix}"):
        yield


def _make(folder: Path, path: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _locked(path: Path, file: Path) -> Iterator[None]:
    handle = _acquire(path, file)
    _handles.add(handle)
    try:
        yield
    finally:
        _handles.discard(handle)
        file.unlink(missing_ok=True)  # before closing, so that the next process locks a new file
        os.close(handle)


def _acquire(path: Path, file: Path) -> int:
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(file), os.fstat(handle)):
                with contextlib.suppress(OSError):  # a full disk: the lock works without the pid
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, b"%d" % os.getpid(), 0)
                return handle
        except BlockingIOError:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace")
            os.close(handle)
            pid = f" (pid {pid})" if pid.isdigit() else ""
            raise InUseError(f"{path} is in use by another process{pid}; wait for it, or choose another path") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                raise
            _log.warning("Cannot lock %s (%s); make sure that no other process writes to it", path, error.strerror)
            return handle
        os.close(handle)  # the previous process has just removed its lock file


def _close_in_child() -> None:
    """Close the locks in a forked child, which may outlive its parent."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_close_in_child)
