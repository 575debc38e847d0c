"""One writer at a time: `lock_folder` for a folder that is worked in, `lock_name` for a file or folder to be made.

The kernel holds the lock, and releases it when its process ends, however it ends. Readers need none.
"""

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


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if need be and hold its lock; `ValueError` if another process does. A new one left empty goes."""
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
    """Hold the lock of a name, whether anything is there or not; `ValueError` as `lock_folder`.

    The folder it lies in is made if need be. `suffix` tells locks apart that may be held at once.
    """
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
        file.unlink(missing_ok=True)  # first: who opens it from here on gets a new file, and a lock of its own
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
                with contextlib.suppress(OSError):  # a full disk: the lock holds without a name on it
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, b"%d" % os.getpid(), 0)
                return handle
        except BlockingIOError:
            pid = os.pread(handle, 20, 0).decode("ascii", "replace")
            os.close(handle)
            who = f" (pid {pid})" if pid.isdigit() else ""
            raise DSMoEError(f"{path} is in use by another process{who}; wait for it, or choose another path") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                raise
            _log.warning("%s cannot be locked (%s): let no other process write there", path, error.strerror)
            return handle
        os.close(handle)  # the holder of before has just removed its file


def _close_in_child() -> None:
    """A forked child that outlives its parent must not keep the locks."""
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_close_in_child)
