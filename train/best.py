"""What evaluated best so far, kept below the run's folder until something better comes. See `Best`."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import jax

from dsmoe_jax.axes import Array
from dsmoe_jax.checkpoint import together
from dsmoe_jax.json_file import read_json
from dsmoe_jax.new_folder import write_json

from .job import Job

BEST: Final = "best"
_RECORD: Final = "evaluation.json"
_log = logging.getLogger(__name__)


class Best:
    """The best result of a run; one that goes on knows the best of before."""

    def __init__(self, out: Path, job: Job, first: int):
        """Know the best of before step `first`; a later one is of a try that was discarded."""
        self._folder, self._save = out / BEST, job.save
        known = read_json(self._folder / _RECORD) if (self._folder / _RECORD).is_file() else {"step": first + 1}
        self._loss = known["loss"] if known["step"] <= first else float("inf")

    def offer(self, step: int, loss: float, params: Mapping[str, Array]) -> None:
        """Keep the parameters if they are the best; by all processes together."""
        if not loss < self._loss:
            return
        self._loss = loss
        new = self._folder.with_name(f"{BEST}.new")
        with together():
            if jax.process_index() == 0:
                shutil.rmtree(new, ignore_errors=True)
        self._save(new, params)
        with together():
            if jax.process_index() == 0:
                write_json(new / _RECORD, {"step": step, "loss": loss})
                old = self._folder.with_name(f"{BEST}.old")
                if self._folder.exists():
                    os.replace(self._folder, old)
                os.replace(new, self._folder)
                shutil.rmtree(old, ignore_errors=True)
        _log.info("best held-out loss so far, %.4f after step %d: %s", loss, step, self._folder)
