"""Packing of examples into sequences without splitting any. Start at `ExamplePacking`."""

import bisect
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..data.packing import DOCUMENTS, SEQUENCES, Builder, Packing, pack
from ..data.shards import TokenShards
from ..loss import IGNORED
from .examples import Example, Examples

_MAX_OPEN = {"best_fit": 64, "none": 0}  # sequences that further examples may join


class _Bins(NamedTuple):
    """Assignment of examples to sequences."""

    order: np.ndarray  # int64 [examples], by sequence
    ends: np.ndarray  # int64 [sequences]: cumulative examples

    @classmethod
    def of(cls, lengths: np.ndarray, order: np.ndarray, length: int, max_open: int) -> "_Bins":
        """Assign examples of these lengths, in this order; see `best_fit`."""
        bins = best_fit(lengths[order].tolist(), length, max_open)
        return cls(order[np.argsort(bins, kind="stable")], np.cumsum(np.bincount(bins)))

    def sequence(self, number: int, examples: Examples, length: int) -> np.ndarray:
        """Build a sequence, int32 [4, length]."""
        begin = int(self.ends[number - 1]) if number else 0
        return pack_examples([examples.example(int(i)) for i in self.order[begin : self.ends[number]]], length)


class ExamplePacking(Packing):
    """Shuffles and packs the examples of each epoch, by best fit or one per sequence, and shuffles its sequences.

    Examples have a segment ID each and positions from 0. The number of sequences varies by epoch, so a resumed run
    packs the earlier epochs again.
    """

    CHOICES: ClassVar = tuple(_MAX_OPEN)
    UNIT: ClassVar = "examples"
    _data: Examples

    def __init__(self, data: Examples, **options: Any):
        """See `Packing`."""
        super().__init__(data, **options)
        self._firsts = [0]  # the first sequence of each packed epoch, and of the next one

    @classmethod
    def check(cls, data: TokenShards, *, sequence_length: int, packing: str) -> None:
        """See `Packing.check`."""
        super().check(data, sequence_length=sequence_length, packing=packing)
        if (longest := int(data.lengths.max(initial=1))) > sequence_length:
            least = f"sequence_length must be at least {longest}, the longest example"
            raise DSMoEError(f"{data.folder}: {least}, got {sequence_length}")

    @classmethod
    def in_order(cls, data: TokenShards, *, sequence_length: int, packing: str) -> tuple[int, Builder]:
        """See `Packing.in_order`; examples are not reordered."""
        cls.check(data, sequence_length=sequence_length, packing=packing)
        assert isinstance(data, Examples)
        bins = _Bins.of(data.lengths, np.arange(len(data)), sequence_length, min(_MAX_OPEN[packing], 1))
        return len(bins.ends), lambda n: bins.sequence(n, data, sequence_length)

    def sequences_of(self, epoch: int) -> range:
        """See `Packing.sequences_of`."""
        with self._lock:
            while len(self._firsts) < epoch + 2:
                self._pack_next_epoch()
            return range(self._firsts[epoch], self._firsts[epoch + 1])

    def sequence(self, n: int) -> np.ndarray:
        """See `Packing.sequence`."""
        with self._lock:
            while self._firsts[-1] <= n:
                self._pack_next_epoch()
            epoch = bisect.bisect_right(self._firsts, n) - 1
            bins, shuffled = self._cached(epoch)
        return bins.sequence(int(shuffled[n - self._firsts[epoch]]), self._data, self._length)

    def _pack_next_epoch(self) -> None:
        self._firsts.append(self._firsts[-1] + len(self._cached(len(self._firsts) - 1)[1]))

    def _build(self, epoch: int) -> tuple[_Bins, np.ndarray]:
        """Pack an epoch, and shuffle its sequences."""
        order = self._shuffled(len(self._data), epoch, DOCUMENTS)
        bins = _Bins.of(self._data.lengths, order, self._length, _MAX_OPEN[self._packing])
        return bins, self._shuffled(len(bins.ends), epoch, SEQUENCES)


def best_fit(lengths: Sequence[int], capacity: int, max_open: int) -> np.ndarray:
    """Assign examples to bins by online best fit; return the bin of each, int64 [examples], in order of opening.

    An example goes to the fullest open bin with enough room, or opens one; beyond `max_open` the fullest is closed.
    With one open bin examples stay in order; with 0 each has a bin.
    """
    bins, count = [], 0
    unfilled: list[tuple[int, int]] = []  # ascending: free tokens, bin
    for size in lengths:
        if (at := bisect.bisect_left(unfilled, (size, 0))) < len(unfilled):
            room, chosen = unfilled.pop(at)
        else:
            room, chosen = capacity, count
            count += 1
            if len(unfilled) == max_open:
                del unfilled[:1]
        bins.append(chosen)
        if max_open and room > size:
            bisect.insort(unfilled, (room - size, chosen))
    return np.array(bins, np.int64)


def pack_examples(examples: Sequence[Example], length: int) -> np.ndarray:
    """Pack examples into one sequence, int32 [4, length]; see `pack`."""
    sequence = pack([example.tokens for example in examples], length)
    if examples:
        mask = np.concatenate([example.loss_mask for example in examples])[1:]
        sequence[1, : len(mask)][~mask] = IGNORED
    return sequence
