"""Packing of documents into sequences, index arithmetic keyed by (seed, dataset, epoch). Start at `DocumentPacking`."""

import abc
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError, check_choice

from ..loss import IGNORED
from .shards import TokenShards
from .shuffle import shuffled

DOCUMENTS, SEQUENCES = 0, 1  # shuffle keys
Builder = Callable[[int], np.ndarray]


class Packing(abc.ABC):
    """The endless sequences of one dataset, int32 [4, sequence_length]: the fields of a `Batch`."""

    CHOICES: ClassVar[Sequence[str]]  # values of `packing`
    UNIT: ClassVar[str] = "documents"

    def __init__(
        self, data: TokenShards, *, sequence_length: int, seed: int, packing: str | None = None, dataset: int = 0
    ):
        """Pack a dataset, whose index in the mixture keys the shuffles with the seed."""
        packing = packing or self.CHOICES[0]
        self.check(data, sequence_length=sequence_length, packing=packing)
        if not len(data):
            raise DSMoEError(f"{data.folder}: no {self.UNIT} to train on")
        self._data, self._length, self._packing = data, sequence_length, packing
        self._key = (seed, dataset)
        # The lock prevents that several threads build an epoch. A batch spans at most two, except of tiny data.
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=2)(self._build)

    @classmethod
    def check(cls, data: TokenShards, *, sequence_length: int, packing: str) -> None:
        """Raise `DSMoEError` for an invalid shape or choice."""
        if sequence_length < 1:
            raise DSMoEError(f"sequence_length must be at least 1, got {sequence_length}")
        check_choice("packing", packing, cls.CHOICES)

    @classmethod
    @abc.abstractmethod
    def in_order(cls, data: TokenShards, *, sequence_length: int, packing: str) -> tuple[int, Builder]:
        """Pack without shuffling; return the number of sequences, and a builder."""

    @abc.abstractmethod
    def sequences_of(self, epoch: int) -> range:
        """Return the numbers of the sequences that begin in an epoch."""

    def epochs(self, sequences: int) -> float:
        """Return how many epochs the first sequences are."""
        epoch = 0
        while (end := self.sequences_of(epoch)[-1] + 1) < sequences:
            epoch += 1
        start = self.sequences_of(epoch)[0]
        return epoch + (sequences - start) / (end - start)

    @abc.abstractmethod
    def sequence(self, n: int) -> np.ndarray:
        """Return sequence `n`, int32 [4, sequence_length]."""

    @abc.abstractmethod
    def _build(self, epoch: int) -> Any: ...

    def _shuffled(self, count: int, epoch: int, what: int) -> np.ndarray:
        return shuffled(count, *self._key, epoch, what)


class _Concatenation(NamedTuple):
    """Concatenated documents."""

    order: np.ndarray  # int64 [documents]
    ends: np.ndarray  # int64 [documents]: cumulative tokens, in that order

    @classmethod
    def of(cls, lengths: np.ndarray, order: np.ndarray) -> "_Concatenation":
        return cls(order, np.cumsum(lengths[order]))

    def pieces(self, shards: TokenShards, start: int, stop: int) -> list[np.ndarray]:
        """Return tokens `start` to `stop` (or the end), one array per document."""
        stop = min(stop, int(self.ends[-1]))
        if start >= stop:
            return []
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        window = slice(first, last + 1)
        pieces = []
        for document, end in zip(self.order[window].tolist(), self.ends[window].tolist(), strict=True):
            begin = end - int(shards.lengths[document])
            pieces.append(shards.read(document, max(start - begin, 0), min(stop, end) - begin))
        return pieces


class DocumentPacking(Packing):
    """Concatenates the shuffled documents of all epochs, splits them into sequences, and shuffles those of each epoch.

    Each token of an epoch is in exactly one sequence; the last may extend into the next epoch. "block_causal" packing
    gives each document a segment ID, positions from 0 in each sequence and no label at its last token; with "causal" a
    sequence is one segment.
    """

    CHOICES: ClassVar = ("block_causal", "causal")

    @classmethod
    def in_order(cls, data: TokenShards, *, sequence_length: int, packing: str) -> tuple[int, Builder]:
        """See `Packing.in_order`."""
        cls.check(data, sequence_length=sequence_length, packing=packing)
        documents = _Concatenation.of(data.lengths, np.arange(len(data)))

        def build(n: int) -> np.ndarray:
            start = n * sequence_length
            return pack(documents.pieces(data, start, start + sequence_length + 1), sequence_length, packing)

        return -(-data.tokens // sequence_length), build

    def sequences_of(self, epoch: int) -> range:
        """See `Packing.sequences_of`."""
        return range(*(-(-e * self._data.tokens // self._length) for e in (epoch, epoch + 1)))

    def epochs(self, sequences: int) -> float:
        """See `Packing.epochs`."""
        return sequences * self._length / self._data.tokens

    def sequence(self, n: int) -> np.ndarray:
        """See `Packing.sequence`."""
        epoch = n * self._length // self._data.tokens
        numbers = self.sequences_of(epoch)
        # The last sequence is not shuffled: it may need the index of the next epoch.
        if n != numbers[-1]:
            n = numbers[0] + int(self._epoch(epoch)[1][n - numbers[0]])
        return pack(self._pieces(n * self._length, self._length + 1), self._length, self._packing)

    def _pieces(self, start: int, count: int) -> list[np.ndarray]:
        pieces = []
        while count:
            epoch, at = divmod(start, self._data.tokens)
            taken = min(count, self._data.tokens - at)
            pieces += self._epoch(epoch)[0].pieces(self._data, at, at + taken)
            start, count = start + taken, count - taken
        return pieces

    def _epoch(self, epoch: int) -> tuple[_Concatenation, np.ndarray]:
        with self._lock:
            return self._cached(epoch)

    def _build(self, epoch: int) -> tuple[_Concatenation, np.ndarray]:
        """Concatenate an epoch, and shuffle its sequences (but the last)."""
        order = self._shuffled(len(self._data), epoch, DOCUMENTS)
        sequences = self._shuffled(max(len(self.sequences_of(epoch)) - 1, 0), epoch, SEQUENCES)
        return _Concatenation.of(self._data.lengths, order), sequences


def pack(pieces: Sequence[np.ndarray], length: int, packing: str = "block_causal") -> np.ndarray:
    """Pack pieces of documents into one sequence, int32 [4, length], with padding; token `length` is the last label."""
    sequence = np.zeros((4, length), np.int32)
    token_ids, labels, segment_ids, positions = sequence
    labels[:] = IGNORED
    if not pieces:
        return sequence
    tokens = np.concatenate(pieces).astype(np.int32)
    sizes = np.array([len(tokens)] if packing == "causal" else [len(piece) for piece in pieces])
    segment = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    begin = np.repeat(np.cumsum(sizes) - sizes, sizes)
    used, labeled = min(len(tokens), length), min(len(tokens) - 1, length)
    token_ids[:used] = tokens[:used]
    segment_ids[:used] = segment[:used]
    positions[:used] = np.arange(used) - begin[:used]
    same_segment = segment[1:] == segment[:-1]
    labels[:labeled] = np.where(same_segment, tokens[1:], IGNORED)[:labeled]
    return sequence
