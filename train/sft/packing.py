"""Packing of whole examples into sequences. Start at `ExamplePacking.sequence`.

The examples of each epoch are shuffled and packed, and then the sequences are shuffled: each example is in exactly one
sequence of an epoch, and no sequence spans two epochs. A sequence depends on (seed, dataset, epoch) alone, but its
number depends on how many sequences the epochs before it have: a resumed run packs those first.
"""

import bisect
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..data.packing import DOCUMENTS, SEQUENCES, Builder, Packing, pack
from ..data.shards import TokenShards
from ..loss import IGNORED
from .examples import Example, Examples

# Sequences that are open at a time for examples that fit.
_MAX_OPEN = {"best_fit": 64, "none": 0}


class _Bins(NamedTuple):
    """Examples assigned to sequences."""

    order: np.ndarray  # int64 [examples], sequence by sequence
    ends: np.ndarray  # int64 [sequences]: examples up to the end of each

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
    """Whole examples in sequences; epochs may have different numbers of them.

    With `packing="best_fit"` a sequence holds as many examples as fit, each with its own segment ID and positions from
    0: attention is block-diagonal and causal. With "none" it holds one example.
    """

    CHOICES: ClassVar = tuple(_MAX_OPEN)
    UNIT: ClassVar = "examples"
    _data: Examples

    def __init__(self, data: Examples, **options: Any):
        """See `Packing`."""
        super().__init__(data, **options)
        self._firsts = [0]  # the first sequence of each epoch that is packed, and of the next

    @classmethod
    def check(cls, data: TokenShards, *, sequence_length: int, packing: str) -> None:
        """See `Packing.check`."""
        super().check(data, sequence_length=sequence_length, packing=packing)
        if (longest := int(data.lengths.max(initial=1))) > sequence_length:
            raise DSMoEError(
                f"{data.folder}: sequence_length must be at least {longest}, the longest example, got {sequence_length}"
            )

    @classmethod
    def in_order(cls, data: TokenShards, *, sequence_length: int, packing: str) -> tuple[int, Builder]:
        """See `Packing.in_order`; an example that does not fit begins a sequence."""
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
    """Assign examples to bins by online best fit.

    An example goes to the fullest open bin that has room for it, or opens a bin; beyond `max_open` bins the fullest is
    closed. With one open bin the examples keep their order; with 0 each has its own. Returns the bin of each example,
    int64 [examples], numbered as they are opened.
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
        predicted = np.concatenate([example.loss_mask for example in examples])[1:]
        sequence[1, : len(predicted)][~predicted] = IGNORED
    return sequence
