"""What evaluated best so far, kept below the run's folder until something better comes. See `Best`."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax

from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint.manifest import RECORD, read_evaluation_record
from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import recover_folder, replace_folder, write_json
from dsmoe_jax.storage.manifest import add_hash, hash_file

from .job import Job

BEST: Final = "best"
_log = logging.getLogger(__name__)


class Best:
    """The best result of a run; one that goes on knows the best of before."""

    def __init__(self, out: Path, job: Job, first: int):
        """Find the best of before step `first`; a later one is of a try that was discarded, and does not count."""
        self._folder, self._save = out / BEST, job.save
        self._new = self._folder.with_name(f"{BEST}.new")
        self._loss = float("inf")
        with collective_errors():
            if jax.process_index() == 0:
                recover_folder(self._folder, self._new)
        if self._folder.exists():
            try:
                known = _read_record(self._folder)
                self._loss = known["loss"] if known["step"] <= first else self._loss
            except ValueError as error:
                _log.warning("%s is damaged, the next evaluation replaces it: %s", self._folder, error)

    def offer(self, step: int, loss: float, params: Mapping[str, Array]) -> None:
        """Keep the parameters if they are the best; by all processes together."""
        if not loss < self._loss:
            return
        with collective_errors():
            if jax.process_index() == 0:
                shutil.rmtree(self._new, ignore_errors=True)
        self._save(self._new, params)
        with collective_errors():
            if jax.process_index() == 0:
                names = sorted(path.relative_to(self._new) for path in self._new.rglob("*") if path.is_file())
                files = {name.as_posix(): hash_file(self._new / name) for name in names}
                write_json(self._new / RECORD, add_hash({"step": step, "loss": loss, "files": files}))
                replace_folder(self._new, self._folder)
        self._loss = loss
        _log.info("best held-out loss so far, %.4f after step %d: %s", loss, step, self._folder)


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of an intact folder; `ValueError` for any other. Older records have step and loss alone."""
    record = read_evaluation_record(folder)
    if type(record.get("loss")) is not float or type(record.get("step")) is not int:
        raise DSMoEError(f"{RECORD} has no step or no loss")
    return record
