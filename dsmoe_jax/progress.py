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


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """A bar on stderr with bytes, bytes a second and time left; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda step: shown.advance(task, step)
