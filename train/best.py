"""The result with the lowest validation loss of a run: `Best`."""

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
    """Keeps the best result of a run in `best/`, across restarts."""

    def __init__(self, output_dir: Path, job: Job, first: int):
        """Read the best result up to step `first`; later steps were discarded."""
        self._folder, self._save = output_dir / BEST, job.save
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
                _log.warning("%s is damaged and will be replaced at the next evaluation: %s", self._folder, error)

    def offer(self, step: int, loss: float, params: Mapping[str, Array]) -> None:
        """Save the parameters if their validation loss is the lowest; collective."""
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
        _log.info("Saved best result: %s (step %d, validation loss %.4f)", self._folder, step, loss)


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the record of an intact folder; older ones lack `files`."""
    record = read_evaluation_record(folder)
    if type(record.get("loss")) is not float or type(record.get("step")) is not int:
        raise DSMoEError(f"{RECORD} has no step or no loss")
    return record
