"""A case is a row of the report. Start at `serve`, which runs the cases of a part. No jax or torch.

An error in a case is reported in its row, in one line, and does not stop the others.
"""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

_LONGEST: Final = 240  # characters of an error
_MEMORY: Final = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)


class Case(NamedTuple):
    """A measurement: `key` identifies its row, `run` returns its figures."""

    key: str
    name: str
    run: Callable[[], dict[str, Any]]


class UnableError(Exception):
    """The case cannot run here: too little memory, or a missing library."""


def serve(cases: Callable[[], Iterable[Case]], until: float, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run the cases that start before `until` (of `time.monotonic`), and report every one, run or not."""
    try:
        for case in cases():
            row: dict[str, Any] = {"key": case.key, "name": case.name}
            if time.monotonic() >= until:
                tell(row | {"error": "not run: no time left"})
                continue
            try:
                row |= case.run()
            except Exception as error:
                row["error"] = one_line(error)
            tell(row)
    except Exception as error:
        tell({"key": "", "name": "all further cases", "error": one_line(error)})


def one_line(error: BaseException) -> str:
    """Format an error in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UnableError):
        reason = text
    elif isinstance(error, ModuleNotFoundError):
        reason = f"{error.name} is not installed"
    elif _MEMORY.search(f"{type(error).__name__} {text}"):
        reason = f"out of memory: {text}"
    else:
        reason = f"{type(error).__name__}: {text}"
    return reason if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 1]}…"


def turns(run: Callable[[], Any], seconds: float, *, least: int = 3, most: int = 30) -> list[float]:
    """Time repetitions of the synchronous `run`, after a warm-up."""
    run()
    taken: list[float] = []
    while len(taken) < least or (len(taken) < most and sum(taken) < seconds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken
