"""Training checkpoints: asynchronous, verified by SHA-256. Start at `Checkpoints`.

A folder `step-N` holds the state as Orbax writes it and, written last, a manifest with the SHA-256 of every file. A
damaged checkpoint is kept as `step-N.damaged` until an intact one has replaced it.
"""

import contextlib
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
from dsmoe_jax.storage.atomic_dir import check_space, sync, write_json
from dsmoe_jax.storage.manifest import check_files, hash_file, read_manifest, write_manifest
from dsmoe_jax.storage.strict_json import read_json

from .distributed import on_process_0
from .old_names import stored_leaves, with_new_names
from .step import TrainState

_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
_NAME: Final = re.compile(r"step-(\d{8})")
_MIN_FILES: Final = 40  # files and folders of a checkpoint, at least
_TIMEOUT: Final = 1800  # seconds for the slowest process to hash its files
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of a run: the last `max_to_keep` intact ones, and those at multiples of `keep_period`."""

    def __init__(self, folder: Path, *, max_to_keep: int = 3, keep_period: int | None = None):
        self.folder = folder
        self._max_to_keep, self._keep_period = max_to_keep, keep_period
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._problems: dict[int, str | None] = {}  # by step, if written or verified

    def save(self, step: int, state: TrainState, resume_metadata: Mapping[str, Any]) -> None:
        """Start saving in the background once the previous save has finished; the state may be donated at once."""
        from orbax.checkpoint import v1 as ocp

        early, start = self._pending is not None and not self._pending.done(), time.monotonic()
        self.wait()
        if early:
            text = "Waited %.1f s for the checkpoint before step %d: saving takes longer than the interval"
            _log.warning(text, time.monotonic() - start, step)
        path = self._path(step)
        if self._problem(step) is None:
            return
        on_process_0(_clear, path)
        # On CPU, Orbax would read the memory that the next step overwrites.
        on_host = jax.default_backend() == "cpu"
        leaves = {name: jnp.copy(leaf) if on_host else leaf for name, leaf in _flat(state).items()}
        with collective_errors(), orbax_write_errors(path):
            if jax.process_index() == 0:
                _check_space(path, leaves)
            context = ocp.Context()
            context.array.saving.use_compression = False
            with context:
                writing = ocp.save_async(str(path.absolute()), leaves)
        self._pending = self._worker.submit(self._finalize, path, step, writing, resume_metadata)

    def wait(self) -> None:
        """Wait for the pending save and raise its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for the pending save and stop the background thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Return the step and the resume metadata of the newest intact checkpoint."""
        for step in sorted(self.steps(), reverse=True):
            path = self._path(step)
            if (problem := self._problem(step)) is None:
                return step, with_new_names(read_json(path / _MANIFEST), _MANIFEST)["resume_metadata"]
            _log.warning("Skipping checkpoint %s", problem)
        return None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Load an intact checkpoint with the shapes, dtypes and shardings of `like`."""
        from orbax.checkpoint import v1 as ocp

        path = self._path(step)
        wanted = _flat(like)
        with quiet_orbax():
            stored = dict(ocp.metadata(str(path.absolute())).metadata)
            names = stored_leaves(wanted, stored)
            check_names_and_shapes(path, _shapes({names[n]: leaf for n, leaf in wanted.items()}), _shapes(stored))
            leaves = ocp.load(str(path.absolute()), {names[name]: leaf for name, leaf in wanted.items()})
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[names[name]] for name in wanted])

    def steps(self) -> list[int]:
        """Return the steps of all checkpoint folders, complete or not."""
        if not self.folder.is_dir():
            return []
        return [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _problem(self, step: int, *, collective: bool = True) -> str | None:
        """Return why a checkpoint cannot be restored; if `collective`, each process verifies a share of the files."""
        if step in self._problems and (self._problems[step] is None or not collective):
            return self._problems[step]
        share = (jax.process_index(), jax.process_count()) if collective else (0, 1)
        problem = None
        try:
            with collective_errors() if collective else contextlib.nullcontext():
                _check_files(self._path(step), share)
        except ValueError as error:
            problem = str(error)
        self._problems[step] = problem
        return problem

    def _finalize(self, path: Path, step: int, writing: Any, resume_metadata: Mapping[str, Any]) -> None:
        """Hash the files, each process its share, then write the manifest."""
        with orbax_write_errors(path):
            writing.result()
        index, count = jax.process_index(), jax.process_count()
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("sums-"))
        sums = {}
        for file in files[index::count]:
            sync(file)
            sums[file.relative_to(path).as_posix()] = hash_file(file)
        if count > 1:
            write_json(path / f"sums-{index}.json", sums)
        if index:
            self._problems[step] = None
            return
        for i in range(1, count):
            part = path / f"sums-{i}.json"
            _wait_for(part)
            sums |= read_json(part)
        fields = {"format": _FORMAT, "step": step, "files": sums, "resume_metadata": dict(resume_metadata)}
        write_manifest(path / _MANIFEST, fields)
        for part in path.glob("sums-*.json"):
            part.unlink()
        self._problems[step] = None
        shutil.rmtree(_damaged(path), ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove checkpoints beyond `max_to_keep` and `keep_period`; process 0 only."""
        intact = 0
        for step in sorted(self.steps(), reverse=True):
            path = self._path(step)
            if intact < self._max_to_keep:
                if (problem := self._problem(step, collective=False)) is None:
                    intact += 1
                else:
                    _log.warning("Not counting checkpoint %s", problem)
            elif self._keep_period is None or step % self._keep_period:
                (path / _MANIFEST).unlink(missing_ok=True)  # first: a kill must not leave an apparently complete one
                shutil.rmtree(path, ignore_errors=True)


def _flat(state: Any) -> dict[str, Any]:
    """Return the state's leaves by their path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _check_space(path: Path, leaves: Mapping[str, Any]) -> None:
    """Raise `DSMoEError` or `OSError` if the disk has too few bytes or inodes for a checkpoint."""
    check_space(path, sum(leaf.nbytes for leaf in leaves.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(path.parent)
    if disk.f_files and disk.f_favail < _MIN_FILES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _damaged(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


def _clear(path: Path) -> None:
    """Remove what a killed run left of a checkpoint, and rename a damaged one."""
    for left in path.parent.glob(f"{path.name}?*"):
        shutil.rmtree(left)
    if path.exists():
        path.rename(_damaged(path))


def _check_files(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raise `DSMoEError` unless this process's share of the files is intact."""
    if not (path / _MANIFEST).is_file():
        raise DSMoEError(f"{path}: incomplete: {_MANIFEST!r} is missing")
    check_files(path, read_manifest(path / _MANIFEST, _FORMAT)["files"], share=share)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + _TIMEOUT
    while not path.is_file():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} did not appear in {_TIMEOUT} s; is the file system shared by all processes?")
        time.sleep(0.05)
