"""Which tokens stand in which row, and what a row looks like. Start at `Packing.row`.

The documents of an epoch are shuffled and laid one after another; the next epoch, in another order, follows without a
seam. The endless line is cut every `sequence_length` tokens, so each token of each epoch stands in exactly one row: the
tail of an epoch shares its row with the head of the next. At last the rows of an epoch are shuffled. All of it is
arithmetic on an index that (seed, dataset, epoch) decides; no row depends on which were asked for before.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..loss import IGNORED
from .shards import TokenShards
from .shuffle import shuffled

MODES: Final = ("documents", "contiguous")
_DOCUMENTS, _ROWS = 0, 1  # what is shuffled


class Layout(NamedTuple):
    """Documents one after another."""

    order: np.ndarray  # int64 [documents]
    ends: np.ndarray  # int64 [documents]: tokens up to the end of each, in that order

    @classmethod
    def of(cls, lengths: np.ndarray, order: np.ndarray) -> "Layout":
        """Documents of these lengths in this order."""
        return cls(order, np.cumsum(lengths[order]))

    def pieces(self, shards: TokenShards, start: int, stop: int) -> list[np.ndarray]:
        """The tokens from `start` to `stop` (or to the end), each document's by themselves."""
        stop = min(stop, int(self.ends[-1]))
        if start >= stop:
            return []
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        some = slice(first, last + 1)
        pieces = []
        for document, end in zip(self.order[some].tolist(), self.ends[some].tolist(), strict=True):
            begin = end - int(shards.lengths[document])
            pieces.append(shards.read(document, max(start - begin, 0), min(stop, end) - begin))
        return pieces


class _Epoch(NamedTuple):
    layout: Layout
    rows: np.ndarray  # int64: the rows of the epoch but its last, shuffled, counted from its first


class Packing:
    """The rows of one dataset, numbered from 0 without end.

    `mode` "documents": the documents in a row are apart from one another, each with its own segment, its positions from
    0 (from the row's start for one that began in another row), and no label at its end. "contiguous": a row is one
    segment, and the label is always the next token. Either way a document longer than a row goes on in another row.
    """

    def __init__(
        self, shards: TokenShards, *, sequence_length: int, seed: int, dataset: int = 0, mode: str = "documents"
    ):
        check_shape(sequence_length=sequence_length, mode=mode)
        if not len(shards):
            raise DSMoEError(f"{shards.folder}: no documents to train on")
        self._shards, self._length, self._mode = shards, sequence_length, mode
        self._key = (seed, dataset)
        # Threads that wait for the same epoch build it once; a row reaches into two at most, but for tiny datasets.
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=2)(self._build)

    def rows_of(self, epoch: int) -> range:
        """The numbers of the rows that begin in an epoch."""
        return range(*(-(-e * self._shards.tokens // self._length) for e in (epoch, epoch + 1)))

    def row(self, n: int) -> np.ndarray:
        """Row `n`, int32 [4, sequence_length]: token ids, labels, segments, positions, the fields of a `Batch`."""
        epoch = n * self._length // self._shards.tokens
        numbers = self.rows_of(epoch)
        # The last row stays last: it may reach into the next epoch, whose index is then not needed before its time.
        if n != numbers[-1]:
            n = numbers[0] + int(self._epoch(epoch).rows[n - numbers[0]])
        return lay_out(self._pieces(n * self._length, self._length + 1), self._length, self._mode)

    def _pieces(self, start: int, count: int) -> list[np.ndarray]:
        pieces = []
        while count:
            epoch, at = divmod(start, self._shards.tokens)
            taken = min(count, self._shards.tokens - at)
            pieces += self._epoch(epoch).layout.pieces(self._shards, at, at + taken)
            start, count = start + taken, count - taken
        return pieces

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            return self._cached(epoch)

    def _build(self, epoch: int) -> _Epoch:
        order = shuffled(len(self._shards), *self._key, epoch, _DOCUMENTS)
        rows = shuffled(max(len(self.rows_of(epoch)) - 1, 0), *self._key, epoch, _ROWS)
        return _Epoch(Layout.of(self._shards.lengths, order), rows)


def lay_out(pieces: Sequence[np.ndarray], length: int, mode: str) -> np.ndarray:
    """Pieces of documents as a row, int32 [4, length]: token ids, labels, segments, positions; the rest is padding.

    One token past the row, if there is one, is the label of the row's last.
    """
    row = np.zeros((4, length), np.int32)
    token_ids, labels, segments, positions = row
    labels[:] = IGNORED
    if not pieces:
        return row
    tokens = np.concatenate(pieces).astype(np.int32)
    sizes = np.array([len(tokens)] if mode == "contiguous" else [len(piece) for piece in pieces])
    piece = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    begin = np.repeat(np.cumsum(sizes) - sizes, sizes)
    used, labelled = min(len(tokens), length), min(len(tokens) - 1, length)
    token_ids[:used] = tokens[:used]
    segments[:used] = piece[:used]
    positions[:used] = np.arange(used) - begin[:used]
    goes_on = piece[1:] == piece[:-1]
    labels[:labelled] = np.where(goes_on, tokens[1:], IGNORED)[:labelled]
    return row


def check_shape(*, sequence_length: int, mode: str) -> None:
    """`ValueError` for rows that cannot be."""
    if sequence_length < 1:
        raise DSMoEError(f"sequence_length must be at least 1, not {sequence_length}")
    if mode not in MODES:
        raise DSMoEError(f"mode {mode!r} is not one of {', '.join(MODES)}")
