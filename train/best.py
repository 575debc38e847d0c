"""What evaluated best so far, kept below the run's folder until something better comes. See `Best`."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax

from dsmoe_jax.array_files import hash_file
from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint import together
from dsmoe_jax.json_file import read_json
from dsmoe_jax.manifest import own_hash, with_own_hash
from dsmoe_jax.new_folder import recover_folder, replace_folder, write_json

from .job import Job

BEST: Final = "best"
_RECORD: Final = "evaluation.json"
_log = logging.getLogger(__name__)


class Best:
    """The best result of a run; one that goes on knows the best of before."""

    def __init__(self, out: Path, job: Job, first: int):
        """Find the best up to step `first`; one that is later, damaged, or of other facts is replaced by the next."""
        self._folder, self._save = out / BEST, job.save
        self._new = self._folder.with_name(f"{BEST}.new")
        # "inputs" hold file names, which may change while the content stays.
        self._facts = own_hash({what: facts for what, facts in job.facts.items() if what != "inputs"})
        self._loss = float("inf")
        with together():
            if jax.process_index() == 0:
                recover_folder(self._folder, self._new)
        if self._folder.exists():
            try:
                self._loss = _read_record(self._folder, self._facts, first)["loss"]
            except ValueError as error:
                _log.warning("%s does not count, the next evaluation replaces it: %s", self._folder, error)

    def offer(self, step: int, loss: float, params: Mapping[str, Array]) -> None:
        """Keep the parameters if they are the best; by all processes together."""
        if not loss < self._loss:
            return
        with together():
            if jax.process_index() == 0:
                shutil.rmtree(self._new, ignore_errors=True)
        self._save(self._new, params)
        with together():
            if jax.process_index() == 0:
                names = sorted(path.relative_to(self._new) for path in self._new.rglob("*") if path.is_file())
                files = {name.as_posix(): hash_file(self._new / name) for name in names}
                record = {"step": step, "loss": loss, "facts": self._facts, "files": files}
                write_json(self._new / _RECORD, with_own_hash(record))
                replace_folder(self._new, self._folder)
        self._loss = loss
        _log.info("best held-out loss so far, %.4f after step %d: %s", loss, step, self._folder)


def _read_record(folder: Path, facts: str, first: int) -> dict[str, Any]:
    """The record of an intact folder; `ValueError` for any other. Older records have step and loss alone."""
    record = read_json(folder / _RECORD)
    if "sha256" in record and record.pop("sha256") != own_hash(record):
        raise ValueError(f"damaged: {_RECORD} has been changed")
    if type(record.get("loss")) is not float or type(record.get("step")) is not int:
        raise ValueError(f"damaged: {_RECORD} has no step or no loss")
    if record.get("facts", facts) != facts:
        raise ValueError("another run wrote it")
    if record["step"] > first:
        raise ValueError(f"it is of step {record['step']}, the run resumes from step {first}")
    for name, sums in record.get("files", {}).items():
        if not (folder / name).is_file():
            raise ValueError(f"damaged: {name!r} is missing")
        if hash_file(folder / name) != sums:
            raise ValueError(f"damaged: {name!r} has other bytes than were written")
    return record
