"""Joins the shards of pieces, and finds copies of documents in them. Start at `join`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import numpy as np

from .shards import DTYPES, OFFSET, SPLITS
from .split_writer import SplitWriter

# A document in the file of keys of a piece and split.
KEYED: Final = np.dtype([("high", "<u8"), ("low", "<u8"), ("text_bytes", "<u8")])
_KEYS: Final = 1 << 22  # compared at once, in 300 MB
_TOKENS: Final = 1 << 22  # per block that is copied
Record = Mapping[str, Any]  # of a piece: see `PieceWriter.finish`


class Joined(NamedTuple):
    """Splits and files of a manifest, the bytes of all texts, and the number of copies that were removed."""

    splits: dict[str, Any]
    files: dict[str, Any]
    text_bytes: int
    copies: int


def join(
    records: Sequence[Record],
    pieces: Any,
    out: Any,
    *,
    dtype: str,
    shard_tokens: int,
    deduplicate: bool,
    take: Callable[[Any, Any], object],
) -> Joined:
    """Join the shards of pieces, in their order: small ones are concatenated up to `shard_tokens`.

    Args:
        records: The record of each piece.
        pieces: Folder of the pieces' files.
        out: Folder of the token shards.
        dtype: Type of the token ids, a key of `DTYPES`.
        shard_tokens: Size up to which shards are concatenated.
        deduplicate: Keep the first of equal documents only.
        take: Links or moves a file that stays as it is.
    """
    text_bytes, copies = sum(record["text_bytes"] for record in records), 0
    dropped: Mapping[tuple[int, str], np.ndarray] = {}
    if deduplicate:
        dropped, repeated = find_copies(records, pieces)
        text_bytes, copies = text_bytes - repeated, sum(map(len, dropped.values()))
    splits, files = {}, {}
    with ExitStack() as stack:
        for split in SPLITS:
            writer = SplitWriter(out, split, DTYPES[dtype], 1 << 62, False, stack)
            for group in _groups(_shards(records, pieces, split, DTYPES[dtype], dropped), shard_tokens):
                if len(group) == 1 and not len(group[0].dropped):
                    writer.adopt(group[0].files, take)
                    continue
                for shard in group:
                    for ids, lengths in shard.blocks():
                        writer.extend(ids, lengths)
                writer.close_shard()
            splits[split] = writer.finalize()
            files |= writer.files
    return Joined(splits, files, text_bytes, copies)


class _Shard(NamedTuple):
    """A shard of a piece, without the documents in `dropped`, int64."""

    files: Sequence[tuple[Any, Mapping[str, Any]]]
    dtype: np.dtype
    dropped: np.ndarray
    tokens: int

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the ids and lengths of the documents, about `_TOKENS` at once."""
        ends = _offsets(self.files[1][0])
        lengths = np.diff(ends)
        kept = np.ones(len(lengths), bool)
        kept[self.dropped] = False
        with self.files[0][0].open("rb") as file:
            first = 0
            while first < len(lengths):
                last = max(int(np.searchsorted(ends, ends[first] + _TOKENS, side="right")) - 1, first + 1)
                data = file.read(int(ends[last] - ends[first]) * self.dtype.itemsize)
                some, mask = lengths[first:last], kept[first:last]
                yield np.frombuffer(data, self.dtype)[np.repeat(mask, some)], some[mask]
                first = last


def _shards(
    records: Sequence[Record], pieces: Any, split: str, dtype: np.dtype, dropped: Mapping[tuple[int, str], np.ndarray]
) -> Iterator[_Shard]:
    """Iterate over the shards of a split that keep a document."""
    none = np.zeros(0, np.int64)
    for number, record in enumerate(records):
        copies, first = dropped.get((number, split), none), 0
        for names in record["splits"][split]["shards"]:
            files = [(pieces / names[kind], record["files"][names[kind]]) for kind in ("tokens", "documents")]
            tokens, count = files[0][1]["bytes"] // dtype.itemsize, files[1][1]["bytes"] // OFFSET.itemsize - 1
            own = copies[(copies >= first) & (copies < first + count)] - first
            first += count
            if len(own) == count:
                continue
            if len(own):
                tokens -= int(np.diff(_offsets(files[1][0]))[own].sum())
            yield _Shard(files, dtype, own, tokens)


def _groups(shards: Iterator[_Shard], shard_tokens: int) -> Iterator[list[_Shard]]:
    """Group consecutive shards of at most `shard_tokens` together; a larger one is alone."""
    group: list[_Shard] = []
    for shard in shards:
        if group and sum(one.tokens for one in group) + shard.tokens > shard_tokens:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _offsets(path: Any) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(file.read(), OFFSET).astype(np.int64)


def find_copies(records: Sequence[Record], pieces: Any) -> tuple[dict[tuple[int, str], np.ndarray], int]:
    """Return the documents that are copies of an earlier one, by piece and split, and the bytes of their texts.

    Keys are compared by ranges of their values, so that memory is bounded by `_KEYS` and the number of copies.
    """
    parts = [(n, split) for n, record in enumerate(records) for split in SPLITS if record["splits"][split]["documents"]]
    counts = [records[n]["splits"][split]["documents"] for n, split in parts]
    starts = np.cumsum([0, *counts])
    ranges = max(-(-int(starts[-1]) // _KEYS), 1)
    found, repeated = [np.zeros(0, np.int64)], 0
    for number in range(ranges):
        keys, positions = [], []
        for (piece, split), start in zip(parts, starts, strict=False):
            with (pieces / records[piece]["keys"][split]).open("rb") as file:
                some = np.frombuffer(file.read(), KEYED)
            mine = np.flatnonzero(some["high"] % np.uint64(ranges) == number)
            keys.append(some[mine])
            positions.append(mine + start)
        key, position = np.concatenate([np.zeros(0, KEYED), *keys]), np.concatenate([found[0], *positions])
        order = np.lexsort((position, key["low"], key["high"]))
        key, position = key[order], position[order]
        same = (key["high"][1:] == key["high"][:-1]) & (key["low"][1:] == key["low"][:-1])
        found.append(position[1:][same])
        repeated += int(key["text_bytes"][1:][same].sum())
    copies = np.sort(np.concatenate(found))
    cuts = np.searchsorted(copies, starts)
    groups = {part: copies[cuts[i] : cuts[i + 1]] - starts[i] for i, part in enumerate(parts)}
    return {part: group for part, group in groups.items() if len(group)}, repeated
