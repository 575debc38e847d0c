"""Progress of long operations: `bar`, `count` and `logged`, or `silent`. Log levels, and numbers as text."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

_LOG_SECONDS: Final = 60.0
_PREFIXES: Final = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_KILO: Final = 999.5  # 1000 with three digits
_WITH_ES: Final = ("s", "x", "ch", "sh")
_log = logging.getLogger("dsmoe_jax")

Advance = Callable[[int], object]  # receives the units done since the last call


class Meter(Protocol):
    """Context manager factory for an operation of `total` units: bytes, completions, …; yields an `Advance`."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Advance]: ...  # noqa: D102


@contextlib.contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda step: None


def bar(what: str, total: int) -> AbstractContextManager[Advance]:
    """Show bytes, bytes/s and time left on stderr if it is a terminal."""
    return _bar(what, total, "DownloadColumn", "TransferSpeedColumn")


def count(what: str, total: int) -> AbstractContextManager[Advance]:
    """Show n of `total` and time left on stderr if it is a terminal."""
    return _bar(what, total, "MofNCompleteColumn")


@contextlib.contextmanager
def logged(what: str, total: int) -> Iterator[Advance]:
    """Log n of `total` and the time left every minute."""
    start = last = time.monotonic()
    done = 0

    def advance(step: int) -> None:
        nonlocal done, last
        done += step
        if (now := time.monotonic()) - last >= _LOG_SECONDS:
            last = now
            left = (now - start) / done * (total - done) if done else math.inf
            _log.info("%s: %d of %d, %s left", what, done, total, duration(left))

    yield advance


@contextlib.contextmanager
def _bar(what: str, total: int, *columns: str) -> Iterator[Advance]:
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich import progress
    from rich.console import Console

    numbers = [getattr(progress, name)() for name in (*columns, "TimeRemainingColumn")]
    shown = progress.Progress(what, progress.BarColumn(), *numbers, console=Console(stderr=True), transient=True)
    with shown:
        task = shown.add_task(what, total=total)
        yield lambda step: shown.advance(task, step)


def plural(count: int, noun: str) -> str:
    """Return the count and the noun: "1 document", "2,000 batches"."""
    ending = "" if count == 1 else "es" if noun.endswith(_WITH_ES) else "s"
    return f"{count:,} {noun}{ending}"


def byte_size(count: float) -> str:
    """Return a number of bytes with three digits: "1.27 GB", "54.1 MB"."""
    return with_prefix(count, "B") if count >= _KILO else f"{count:.3g} bytes"


def with_prefix(count: float, unit: str) -> str:
    """Return a number with three digits and the prefix of its size: "16.1 GFLOP"."""
    power = 0
    while count >= _KILO and power < len(_PREFIXES) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_PREFIXES[power]}{unit}"


def duration(seconds: float) -> str:
    """Return a time with its two largest units: "1 h 5 min", "40 s"."""
    if not seconds < 3600 * 10000:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


@contextlib.contextmanager
def log_level(logger: str, level: int) -> Iterator[None]:
    """Set the level of a logger within the context."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
