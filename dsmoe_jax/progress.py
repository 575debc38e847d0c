"""How far a long job is: in bytes, bytes a second and time left, where a person watches.

A function that takes long takes a `Meter`; `silent` shows nothing, `bar` is what the command line passes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], object]  # that many bytes more are done


class Meter(Protocol):
    """Opens a job of `total` bytes; what it yields is told of each step."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Advance]: ...  # noqa: D102


@contextlib.contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    """Shows nothing."""
    yield lambda step: None


def bar(what: str, total: int) -> AbstractContextManager[Advance]:
    """A bar on stderr with bytes, bytes a second and time left; nothing where that is no terminal."""
    return _bar(what, total, "DownloadColumn", "TransferSpeedColumn")


def count(what: str, total: int) -> AbstractContextManager[Advance]:
    """The same for things that are counted: how many of how many, and time left."""
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
