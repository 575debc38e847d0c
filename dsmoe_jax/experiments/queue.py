"""The queue of an experiment's runs, several at once and resumable: `run_jobs`."""

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.progress import plural
from dsmoe_jax.storage.locks import InUseError, lock_folder

_POLL: Final = 0.2  # seconds
_STOP_TIMEOUT: Final = 600  # seconds for a run's last checkpoint
_LOG: Final = "log.txt"
_GPUS: Final = Path("/proc/driver/nvidia/gpus")
_HUGE_PAGES: Final = "glibc.malloc.hugetlb=1"  # a quarter of the time of a step on CPU
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a run computes: environment variables, and the cores, none for all."""

    environment: dict[str, str]
    cores: tuple[int, ...] = ()


def places(workers: int | None, all_devices: bool) -> list[Place]:
    """Return a place for each run at once: a GPU each, or without GPUs a core each.

    Args:
        workers: Number of runs at once; None: as many as GPUs or cores.
        all_devices: Every run uses all devices.

    Raises:
        DSMoEError: `workers` is below 1, or above 1 for runs that use all devices.
    """
    if workers is not None and workers < 1:
        raise DSMoEError(f"workers must be at least 1, got {workers}")
    if all_devices:
        if workers not in (None, 1):
            raise DSMoEError(f"workers must be 1, as a run uses all devices, got {workers}")
        return [Place({})]
    if gpus := _gpus():
        return [Place({"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:workers]]
    cores = sorted(os.sched_getaffinity(0))
    count = min(workers or len(cores), len(cores))
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), _HUGE_PAGES)))
    # One run per core: a step of a small model keeps two cores busy less than half of the time.
    return [Place({"GLIBC_TUNABLES": tunables}, tuple(cores[i::count])) for i in range(count)]


def _gpus() -> list[str]:
    """Return the GPUs of this process, by index or id."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not _GPUS.is_dir():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(len(list(_GPUS.iterdir())))]
    named = filter(None, map(str.strip, visible.split(",")))
    return list(itertools.takewhile("-1".__ne__, named))  # which hides all after it


def run_jobs(experiment: Experiment, found: list[Place]) -> list[str]:
    """Run all jobs without a result; killed runs resume from their checkpoints.

    Args:
        experiment: The experiment.
        found: One place for each run at once.

    Returns:
        A line for each run that failed.
    """
    waiting = [job for job in experiment.jobs if experiment.result(job) is None]
    total, done, failed = len(experiment.jobs), len(experiment.jobs) - len(waiting), []
    if done:
        _log.info("Found %s complete of %d", plural(done, "run"), total)
    running: dict[subprocess.Popen, tuple[Job, Place, float]] = {}
    free = list(found)
    with _stopping(running):
        while waiting or running:
            while free and (job := next((job for job in waiting if not _in_use(experiment.run_folder(job))), None)):
                place = free.pop()
                waiting.remove(job)
                _log.info(
                    "Starting %s (%d of %d), log in %s", job, total - len(waiting), total, _log_file(experiment, job)
                )
                running[_start(experiment, job, place)] = (job, place, time.monotonic())
            time.sleep(_POLL)
            for process in [process for process in running if process.poll() is not None]:
                job, place, started = running.pop(process)
                process.communicate()  # closes the pipe
                free.append(place)
                result = experiment.result(job)
                if process.returncode or result is None:
                    failed.append(f"{job} failed with exit code {process.returncode}: {_last_line(experiment, job)}")
                    _log.error(failed[-1])
                    continue
                minutes = (time.monotonic() - started) / 60
                _log.info("Finished %s: eval/loss %.4f, %.1f minutes", job, result["eval_loss"], minutes)
    return failed


def _in_use(folder: Path) -> bool:
    """Whether a worker of a killed queue still writes its last checkpoint there."""
    try:
        with lock_folder(folder):
            return False
    except InUseError:
        return True


def _start(experiment: Experiment, job: Job, place: Place) -> subprocess.Popen:
    file = _log_file(experiment, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(experiment.out), job.variant, str(job.seed), ",".join(map(str, place.cores))]
    with file.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dsmoe_jax.experiments.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | place.environment,
            start_new_session=True,  # Ctrl-C stops the queue, which stops the runs
        )


@contextlib.contextmanager
def _stopping(running: Mapping[subprocess.Popen, Any]) -> Iterator[None]:
    """On leaving, stop what still runs, all at once and with a checkpoint each."""
    try:
        yield
    finally:
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        for process in running:
            try:
                process.wait(timeout=_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _log_file(experiment: Experiment, job: Job) -> Path:
    return experiment.run_folder(job) / _LOG


def _last_line(experiment: Experiment, job: Job) -> str:
    lines = _log_file(experiment, job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
