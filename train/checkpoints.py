"""A run's checkpoints: written beside the training, sealed when complete; a start looks for the newest intact one.

Start at `Checkpoints`. A folder `step-N` holds the whole state, as Orbax writes it, and a manifest with the SHA-256 of
every file, written last: without one it is incomplete, with another hash it is damaged, and neither is restored.
A damaged one is kept as `step-N.damaged` until a good one has taken its place.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp

from dsmoe_jax.checkpoint.native import check_names_and_shapes, collective_errors
from dsmoe_jax.checkpoint.zarr_io import orbax_write_errors, quiet_orbax
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import sync, write_json
from dsmoe_jax.storage.manifest import add_hash, hash_file, hash_json
from dsmoe_jax.storage.strict_json import read_json

from .step import TrainState

_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
_NAME: Final = re.compile(r"step-(\d{8})")
_FILES: Final = 40  # that a checkpoint has at least, folders included
_WAIT: Final = 1800  # seconds for the slowest process to hash its files
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in `folder`: the last `keep_last` intact ones stay, and all at multiples of `keep_every`."""

    def __init__(self, folder: Path, *, keep_last: int = 3, keep_every: int | None = None):
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise DSMoEError(f"keep_last and keep_every must be at least 1, not {keep_last} and {keep_every}")
        self.folder = folder
        self._keep_last, self._keep_every = keep_last, keep_every
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._intact: dict[int, bool] = {}  # what was found, or written, by this process

    def save(self, step: int, state: TrainState, facts: Mapping[str, Any]) -> None:
        """Begin to write the state; the training may go on at once. `facts` (JSON) come back with it.

        Waits for the one before, and raises what went wrong there: `OSError` for a full disk, say.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        home = self._home(step)
        if self._why_not(step) is None:
            return
        with collective_errors():
            if jax.process_index() == 0:
                for left in self.folder.glob(f"{home.name}?*"):  # by a run that was killed here
                    shutil.rmtree(left)
                if home.exists():
                    home.rename(_damaged(home))
        # On CPU Orbax would read the very memory that the next step overwrites.
        on_host = jax.default_backend() == "cpu"
        leaves = {name: jnp.copy(leaf) if on_host else leaf for name, leaf in _flat(state).items()}
        with collective_errors(), orbax_write_errors(home):
            if jax.process_index() == 0:
                _check_space(self.folder, leaves)
            context = ocp.Context()
            context.array.saving.use_compression = False
            with context:
                writing = ocp.save_async(str(home.absolute()), leaves)
        self._pending = self._worker.submit(self._seal, home, step, writing, facts)

    def wait(self) -> None:
        """Until the last save is complete; raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the worker."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The step of the newest complete and intact checkpoint with its facts; says which it skipped, and why."""
        for step in sorted(self.steps(), reverse=True):
            home = self._home(step)
            if (why := self._why_not(step)) is None:
                return step, read_json(home / _MANIFEST)["facts"]
            _log.warning("%s is skipped: %s", home, why)
        return None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a checkpoint; `like` has the shapes, dtypes and shardings it shall have."""
        from orbax.checkpoint import v1 as ocp

        home = self._home(step)
        wanted = _flat(like)
        with quiet_orbax():
            stored = dict(ocp.metadata(str(home.absolute())).metadata)
            check_names_and_shapes(home, _shapes(wanted), _shapes(stored))
            leaves = ocp.load(str(home.absolute()), wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])

    def steps(self) -> list[int]:
        """Those of all folders, complete or not."""
        if not self.folder.is_dir():
            return []
        return [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]

    def _home(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _why_not(self, step: int) -> str | None:
        """Why a checkpoint cannot be restored, None for an intact one; by all processes together."""
        if self._intact.get(step):
            return None
        try:
            with collective_errors():
                _check_files(self._home(step), jax.process_index(), jax.process_count())
        except ValueError as error:
            self._intact[step] = False
            return str(error)
        self._intact[step] = True
        return None

    def _seal(self, home: Path, step: int, writing: Any, facts: Mapping[str, Any]) -> None:
        """In the background: each process hashes its share of the files, then the first writes the manifest."""
        with orbax_write_errors(home):
            writing.result()
        index, count = jax.process_index(), jax.process_count()
        files = sorted(path for path in home.rglob("*") if path.is_file() and not path.name.startswith("sums-"))
        sums = {}
        for path in files[index::count]:
            sync(path)
            sums[path.relative_to(home).as_posix()] = hash_file(path)
        if count > 1:
            write_json(home / f"sums-{index}.json", sums)
        if index:
            self._intact[step] = True
            return
        for i in range(1, count):
            part = home / f"sums-{i}.json"
            _wait_for(part)
            sums |= read_json(part)
        fields = {"format": _FORMAT, "step": step, "files": sums, "facts": dict(facts)}
        write_json(home / _MANIFEST, add_hash(fields))
        for part in home.glob("sums-*.json"):
            part.unlink()
        self._intact[step] = True
        shutil.rmtree(_damaged(home), ignore_errors=True)
        self._forget_old()

    def _forget_old(self) -> None:
        """Remove what is older than the last `keep_last` intact ones; by the first process alone, in the background."""
        intact = 0
        for step in sorted(self.steps(), reverse=True):
            home = self._home(step)
            if intact < self._keep_last:
                intact += self._is_intact(step)
            elif self._keep_every is None or step % self._keep_every:
                (home / _MANIFEST).unlink(missing_ok=True)  # first, so that a kill leaves nothing that looks whole
                shutil.rmtree(home, ignore_errors=True)

    def _is_intact(self, step: int) -> bool:
        if step not in self._intact:
            try:
                _check_files(self._home(step))
            except ValueError as error:
                _log.warning("%s does not count: %s", self._home(step), error)
                self._intact[step] = False
            else:
                self._intact[step] = True
        return self._intact[step]


def _flat(state: Any) -> dict[str, Any]:
    """The state's leaves by the path to them: independent of the classes around them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {"/".join(map(_key, path)): leaf for path, leaf in leaves}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _key(entry: Any) -> str:
    return str(next(getattr(entry, name) for name in ("name", "key", "idx") if hasattr(entry, name)))


def _check_space(folder: Path, leaves: Mapping[str, Any]) -> None:
    """`OSError` for a disk too full, before Orbax begins; it may fill up later all the same."""
    folder.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(folder)
    size = sum(leaf.nbytes for leaf in leaves.values())
    if size > disk.f_bavail * disk.f_frsize or (disk.f_files and disk.f_favail < _FILES):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _damaged(home: Path) -> Path:
    return home.with_name(f"{home.name}.damaged")


def _check_files(home: Path, index: int = 0, count: int = 1) -> None:
    """`ValueError` that says why a checkpoint cannot be restored; process `index` of `count` looks at its share."""
    if not (home / _MANIFEST).is_file():
        raise DSMoEError("incomplete (no manifest)")
    manifest = read_json(home / _MANIFEST)
    if manifest.pop("sha256", None) != hash_json(manifest):
        raise DSMoEError("damaged: its manifest has been changed")
    if (version := manifest["format"]) != _FORMAT:
        raise DSMoEError(f"of format {version}, this version reads {_FORMAT}")
    for name, sums in sorted(manifest["files"].items())[index::count]:
        if not (home / name).is_file():
            raise DSMoEError(f"damaged: {name!r} is missing")
        if hash_file(home / name) != sums:
            raise DSMoEError(f"damaged: {name!r} has other bytes than were written")


def _wait_for(path: Path) -> None:
    until = time.monotonic() + _WAIT
    while not path.is_file():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} did not come; does every process see this file system?")
        time.sleep(0.05)
