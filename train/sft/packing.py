"""Which examples stand in which row, and what a row looks like. Start at `ExamplePacking.row`.

The examples of an epoch are shuffled and put whole into rows, and then the rows are shuffled: each example of an epoch
stands in one of its rows, and no row reaches into another epoch. A row depends on (seed, dataset, epoch) alone, but how
many rows the epochs before had must be known to find it: whoever begins late packs those epochs first.
"""

import bisect
import functools
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..data.packing import lay_out
from ..data.shuffle import shuffled
from ..loss import IGNORED
from .store import Examples
from .templates import Example

# How many rows are open at a time for examples that fit.
MODES: Final = {"packed": 64, "alone": 0}
_EXAMPLES, _ROWS = 0, 1  # what is shuffled


class Layout(NamedTuple):
    """Examples in rows."""

    order: np.ndarray  # int64 [examples], row after row
    ends: np.ndarray  # int64 [rows]: examples up to the end of each

    @classmethod
    def of(cls, lengths: np.ndarray, order: np.ndarray, length: int, most_open: int) -> "Layout":
        """Examples of these lengths, taken in this order, in rows of `length`; see `fit`."""
        row_of = fit(lengths[order].tolist(), length, most_open)
        return cls(order[np.argsort(row_of, kind="stable")], np.cumsum(np.bincount(row_of)))

    def row(self, number: int, examples: Examples, length: int) -> np.ndarray:
        """A row, int32 [4, length]."""
        begin = int(self.ends[number - 1]) if number else 0
        return lay_out_examples([examples.read(int(i)) for i in self.order[begin : self.ends[number]]], length)


class _Epoch(NamedTuple):
    layout: Layout
    rows: np.ndarray  # int64: the rows of the epoch, shuffled


class ExamplePacking:
    """The rows of one dataset, numbered from 0 without end.

    `mode` "packed": as many whole examples in a row as fit, apart from one another, each with its own segment and its
    positions from 0. "alone": one example a row. Epochs may have different numbers of rows.
    """

    def __init__(self, examples: Examples, *, sequence_length: int, seed: int, dataset: int = 0, mode: str = "packed"):
        check_shape(examples, sequence_length=sequence_length, mode=mode)
        if not len(examples):
            raise DSMoEError(f"{examples.folder}: no examples to train on")
        self._examples, self._length, self._most_open = examples, sequence_length, MODES[mode]
        self._key = (seed, dataset)
        # Threads that wait for the same epoch build it once; a batch reaches into two at most, but for tiny datasets.
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=2)(self._build)
        self._firsts = [0]  # the first row of each epoch that was packed, and of the next

    def rows_of(self, epoch: int) -> range:
        """The numbers of the rows of an epoch."""
        with self._lock:
            while len(self._firsts) < epoch + 2:
                self._next_epoch()
            return range(self._firsts[epoch], self._firsts[epoch + 1])

    def row(self, n: int) -> np.ndarray:
        """Row `n`, int32 [4, sequence_length]: token ids, labels, segments, positions, the fields of a `Batch`."""
        with self._lock:
            while self._firsts[-1] <= n:
                self._next_epoch()
            number = bisect.bisect_right(self._firsts, n) - 1
            epoch = self._cached(number)
        row = int(epoch.rows[n - self._firsts[number]])
        return epoch.layout.row(row, self._examples, self._length)

    def _next_epoch(self) -> None:
        self._firsts.append(self._firsts[-1] + len(self._cached(len(self._firsts) - 1).rows))

    def _build(self, epoch: int) -> _Epoch:
        order = shuffled(len(self._examples), *self._key, epoch, _EXAMPLES)
        layout = Layout.of(self._examples.lengths, order, self._length, self._most_open)
        return _Epoch(layout, shuffled(len(layout.ends), *self._key, epoch, _ROWS))


def fit(lengths: Sequence[int], length: int, most_open: int) -> np.ndarray:
    """The row of each example, int64 [examples], rows of `length` being numbered as they are begun.

    An example goes to the fullest of the open rows that has room for it, or begins a row; where `most_open` are open
    already, the fullest of them is closed. With one open row that keeps the order of the examples.
    """
    rows, count = [], 0
    unfilled: list[tuple[int, int]] = []  # ascending: the room that is left, the row
    for size in lengths:
        if (at := bisect.bisect_left(unfilled, (size, 0))) < len(unfilled):
            room, row = unfilled.pop(at)
        else:
            room, row = length, count
            count += 1
            if len(unfilled) == most_open:
                del unfilled[:1]
        rows.append(row)
        if most_open and room > size:
            bisect.insort(unfilled, (room - size, row))
    return np.array(rows, np.int64)


def lay_out_examples(some: Sequence[Example], length: int) -> np.ndarray:
    """Examples as a row, int32 [4, length]: token ids, labels, segments, positions; the rest is padding."""
    row = lay_out([example.tokens for example in some], length, "documents")
    if some:
        next_is_target = np.concatenate([example.is_target for example in some])[1:]
        row[1, : len(next_is_target)][~next_is_target] = IGNORED
    return row


def check_shape(examples: Examples, *, sequence_length: int, mode: str) -> None:
    """`ValueError` for rows that cannot be."""
    if mode not in MODES:
        raise DSMoEError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if (longest := int(examples.lengths.max(initial=1))) > sequence_length:
        raise DSMoEError(f"{examples.folder}: has an example of {longest} tokens; sequence_length is {sequence_length}")
