"""Write a new file atomically: `atomic_file`."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import check_new_path, check_space, name_full_disk, staging_path, sync
from dsmoe_jax.storage.locks import lock_name


@contextlib.contextmanager
def atomic_file(path: str | Path, *, needs: int = 0) -> Iterator[Path]:
    """Yield the path of an empty staging file that is fsynced and renamed to `path` when the block succeeds.

    `needs` is the final size in bytes, to check the free disk space. Raises `DSMoEError` if `path` exists, its folder
    does not, or the disk is too full.
    """
    path = check_new_path(path)
    staging = staging_path(path)
    if not path.parent.is_dir():  # `lock_name` would create it
        raise DSMoEError(f"{path} cannot be written: {os.strerror(errno.ENOENT)}")
    with lock_name(path), name_full_disk(path):
        check_new_path(path)  # another process may have created it before it released the lock
        try:
            staging.open("wb").close()  # overwrites the file of a killed process
        except OSError as error:
            raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None
        try:
            check_space(path, needs)
            yield staging
            sync(staging)
            check_new_path(path)
            staging.rename(path)
            sync(path.parent)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
