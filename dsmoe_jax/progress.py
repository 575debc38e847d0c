"""Progress bars of long operations (`bar`; the default is `silent`), temporary log levels and counts in messages."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

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
    """Return the count and the noun: "1 document", "2,000 documents"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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
