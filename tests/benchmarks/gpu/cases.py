"""A case is one row of the report: start at `serve`, which runs a part's cases and tells each row as it is known.

Nothing here needs jax or torch. Whatever goes wrong in a case is said in its row, in one line, and the next one begins.
"""

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

_LONGEST: Final = 240  # characters of a reason
_MEMORY: Final = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)


class Case(NamedTuple):
    """What is measured; `key` finds its row again, `run` gives the rest of it."""

    key: str
    name: str
    run: Callable[[], dict[str, Any]]


class UnableError(Exception):
    """A case that cannot run here, for a reason that is no fault: too little memory, a library that is missing."""


def serve(cases: Callable[[], Iterable[Case]], until: float, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run the cases that begin before `until` (of `time.monotonic`); every one of them is told, run or not."""
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
    """Why, in one line."""
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
    """The seconds of each repetition, after one that is not counted; `run` has finished its work when it returns."""
    run()
    taken: list[float] = []
    while len(taken) < least or (len(taken) < most and sum(taken) < seconds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken
