"""Where the time of a run goes, restarts included: `Goodput`."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from dsmoe_jax.progress import plural

Seconds: TypeAlias = collections.defaultdict[str, float]
# Kinds of time; `lost`: steps repeated after a restart and the time between processes; `other`: what is not measured.
KINDS: Final = ("step", "data", "compile", "evaluation", "checkpoint", "setup", "lost", "other")
_WAITS: Final = ("compile", "evaluation", "checkpoint", "setup")  # in the record of the next step, as `KIND_seconds`


class Goodput:
    """Seconds of a run by kind, since its first start.

    Attributes:
        started: When this process began, in seconds since the epoch.
        restarts: Number of earlier processes.
    """

    def __init__(self, started: float, records: Sequence[Mapping[str, Any]] = ()):
        """Begin with the time of earlier processes of the run.

        Args:
            started: When this process began, in seconds since the epoch.
            records: All records of earlier processes, superseded ones as well.
        """
        self.started = started
        self._new: Seconds = collections.defaultdict(float)
        self._seconds, self.restarts = _earlier(records, started)
        self._before = sum(self._seconds.values())

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, time.perf_counter() - start)

    def add(self, kind: str, seconds: float) -> None:
        """Add time."""
        self._seconds[kind] += seconds
        self._new[kind] += seconds

    def add_step(self, seconds: float, data: float, compilation: float) -> None:
        """Add the time of a step, which includes waiting for data and compiling."""
        self.add("data", data)
        self.add("step", _step_seconds(seconds, data, compilation))

    def take(self) -> dict[str, float]:
        """Return the time added since the last call, of kinds other than steps and data."""
        new, self._new = self._new, collections.defaultdict(float)
        return {f"{kind}_seconds": new[kind] for kind in _WAITS if new[kind]}

    def fractions(self) -> dict[str, float]:
        """Return the fraction of each kind as `time/KIND`, which sum to 1, and `goodput`, that of steps."""
        seconds = {kind: self._seconds[kind] for kind in KINDS}
        seconds["other"] += max(0.0, self._wall() - sum(seconds.values()))
        total = sum(seconds.values()) or 1.0
        return {"goodput": seconds["step"] / total} | {f"time/{kind}": seconds[kind] / total for kind in KINDS}

    def __str__(self) -> str:
        """Return one line."""
        fractions = self.fractions()
        parts = [f"{kind} {fractions[f'time/{kind}']:.1%}" for kind in KINDS if fractions[f"time/{kind}"] >= 0.0005]
        restarts = f", {plural(self.restarts, 'restart')}" if self.restarts else ""
        return f"{self._wall():.1f} s{restarts}: {', '.join(parts)}"

    def _wall(self) -> float:
        """Return the seconds since the first start."""
        return self._before + time.time() - self.started


def _earlier(records: Sequence[Mapping[str, Any]], started: float) -> tuple[Seconds, int]:
    """Return the seconds of earlier processes by kind, and their number; of records that state when they began."""
    seconds: Seconds = collections.defaultdict(float)
    begins = [i for i, record in enumerate(records) if record.get("run", {}).get("started")]
    ends = [*begins[1:], len(records)][: len(begins)]
    times = [records[i]["run"]["started"] for i in begins] + [started]
    for process, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        later = [records[i].get("resumed_from", 0) for i in begins[process + 1 :]]
        kept = [one for one in records[begin:end] if "loss" in one and one["step"] <= min(later, default=math.inf)]
        used: Seconds = collections.defaultdict(float)
        for one in kept:
            waits = {kind: one.get(f"{kind}_seconds") or 0.0 for kind in _WAITS}
            for kind, value in waits.items():
                used[kind] += value
            used["data"] += one.get("data_loading_seconds") or 0.0
            used["step"] += _step_seconds(one["step_time_seconds"], one["data_loading_seconds"], waits["compile"])
        used["lost"] = max(0.0, times[process + 1] - times[process] - sum(used.values()))
        for kind, value in used.items():
            seconds[kind] += value
    return seconds, len(begins)


def _step_seconds(seconds: float | None, data: float | None, compilation: float) -> float:
    """Return the time of a step without waiting for data and compiling."""
    return max(0.0, (seconds or 0.0) - (data or 0.0) - compilation)
