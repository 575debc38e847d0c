"""The result of a run: `replace_result`, and `Best`, the one with the lowest validation loss."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint.manifest import RECORD, read_evaluation_record
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import recover_folder, replace_folder
from dsmoe_jax.storage.manifest import hash_tree, write_manifest

from .distributed import on_process_0
from .job import Job

BEST: Final = "best"
_log = logging.getLogger(__name__)


def replace_result(
    path: Path, job: Job, params: Mapping[str, Array], finish: Callable[[Path], None] = lambda folder: None
) -> None:
    """Save a result, atomically replacing an earlier one; `finish` adds files to it. Collective."""
    new = path.with_name(f"{path.name}.new")
    on_process_0(recover_folder, path, new)
    job.save(new, params)
    on_process_0(finish, new)
    on_process_0(replace_folder, new, path)


class Best:
    """Keeps the best result of a run in `best/`, across restarts."""

    def __init__(self, output_dir: Path, job: Job, first: int):
        """Read the best result up to step `first`; later ones were discarded."""
        self._folder, self._job = output_dir / BEST, job
        self._loss = float("inf")
        on_process_0(recover_folder, self._folder, self._folder.with_name(f"{BEST}.new"))
        if self._folder.exists():
            try:
                record = read_evaluation_record(self._folder)
                loss, step = record.get("loss"), record.get("step")
                if type(loss) is not float or type(step) is not int:
                    raise DSMoEError(f"{self._folder / RECORD}: no step or no loss")
                self._loss = loss if step <= first else self._loss
            except ValueError as error:
                _log.warning("%s; it will be replaced at the next evaluation", error)

    def offer(self, step: int, loss: float, params: Mapping[str, Array]) -> None:
        """Save the parameters if their validation loss is the lowest; collective."""
        if not loss < self._loss:
            return

        def add_record(folder: Path) -> None:
            write_manifest(folder / RECORD, {"step": step, "loss": loss, "files": hash_tree(folder)})

        replace_result(self._folder, self._job, params, add_record)
        self._loss = loss
        _log.info("Saved best result: %s (step %d, eval/loss %.4f)", self._folder, step, loss)
