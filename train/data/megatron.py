"""Token files of Megatron-LM, `NAME.bin` and `NAME.idx`, read in place. Start at `MegatronTokens`."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.manifest import hash_file, hash_json
from dsmoe_jax.storage.paths import user_path

from .shards import TokenShards, is_token_shards

_MMAP: Final = b"MMIDIDX\x00\x00"  # IndexedDataset of Megatron Core
_LEGACY: Final = b"TNTIDX\x00\x00"  # of Megatron-LM before 2020
# By code; the others are floating point.
_DTYPES: Final[Mapping[int, str]] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def is_megatron(source: str | Path) -> bool:
    """Whether the source is NAME.bin, NAME.idx or NAME of a pair of Megatron's files."""
    return all(path.is_file() for path in _pair(source))


def is_tokenized(source: str | Path) -> bool:
    """Whether the source holds token ids: token shards, or Megatron's files."""
    return is_token_shards(source) or is_megatron(source)


def open_tokenized(source: str | Path, val_fraction: float, vocab_size: int) -> tuple[TokenShards, TokenShards]:
    """Open training and validation split of token shards, or of Megatron's files, which are split by `val_fraction`."""
    if is_megatron(source):
        return MegatronTokens.split(source, val_fraction, vocab_size)
    return TokenShards.open_splits(source)


class MegatronTokens(TokenShards):
    """Documents of a pair of Megatron's files, memory-mapped.

    The files do not say which tokenizer they are of: `tokenizer_hash` and `eos_token_id` are None.
    """

    def __init__(self, source: str | Path, index: "_Index", numbers: np.ndarray, *, vocab_size: int, identity: Any):
        """Use `split`."""
        self.folder, self._index, self.vocab_size = _pair(source)[0], index, vocab_size
        self.eos_token_id = self.tokenizer_hash = None  # type: ignore[assignment]
        self.val_fraction, self.dtype = identity["val_fraction"], index.dtype
        self._begins = index.offsets[:-1][numbers]
        self.lengths = np.diff(index.offsets)[numbers]
        self.tokens = int(self.lengths.sum())
        self.digest = hash_json(identity)
        data = np.memmap(self.folder, index.dtype, mode="r") if index.offsets[-1] else np.zeros(0, index.dtype)
        self._ids = np.asarray(data)

    @classmethod
    def split(
        cls, source: str | Path, val_fraction: float, vocab_size: int
    ) -> tuple["MegatronTokens", "MegatronTokens"]:
        """Return the training and the validation split.

        Args:
            source: NAME.bin, NAME.idx or NAME.
            val_fraction: Fraction of the documents in the validation split, chosen by their number; at least one.
            vocab_size: Number of token ids; larger ones are an error when they are read.

        Raises:
            DSMoEError: The index is malformed, or does not match the .bin file.
        """
        data, path = _pair(source)
        index = _read_index(path, data.stat().st_size)
        chosen = _validation(len(index.offsets) - 1, val_fraction)
        identity = {"bin_bytes": data.stat().st_size, "idx": hash_file(path), "val_fraction": val_fraction}
        options: dict[str, Any] = {"vocab_size": vocab_size}
        train, validation = (
            cls(source, index, np.flatnonzero(mask), identity=identity | {"split": split}, **options)
            for split, mask in {"train": ~chosen, "validation": chosen}.items()
        )
        return train, validation

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return token ids `start` to `stop` of a document, a view of the file."""
        begin = int(self._begins[document])
        stop = int(self.lengths[document]) if stop is None else stop
        ids = self._ids[begin + start : begin + stop]
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            bound = f"token ids must be in [0, {self.vocab_size}), got {ids.min()} to {ids.max()}"
            raise DSMoEError(f"{self.folder}: {bound} in document {document}")
        return ids

    def check(self, *, tokenizer_hash: str | None = None, vocab_size: int | None = None) -> None:
        """Accept any tokenizer; `read` checks the token ids."""


class _Index(NamedTuple):
    """Type of the token ids, and int64 offsets of the documents and their end, in tokens."""

    dtype: np.dtype
    offsets: np.ndarray


def _pair(source: str | Path) -> tuple[Path, Path]:
    path = user_path(source, "source")
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return Path(f"{stem}.bin"), Path(f"{stem}.idx")  # not `with_name`: "." and "/" have no name


def _validation(count: int, fraction: float) -> np.ndarray:
    """Return which documents are in the validation split, bool [count]."""
    if not fraction or count < 2:
        return np.zeros(count, bool)
    bits = np.random.Philox(np.random.SeedSequence(0)).random_raw(count)
    return bits <= max(np.uint64(math.ceil(fraction * 2**64) - 1), bits.min())


def _read_index(path: Path, data_bytes: int) -> _Index:
    """Read an index of either version and check it against the size of its .bin file."""
    with path.open("rb") as file:
        magic = file.read(9)
        if magic == _MMAP:
            read = _read_mmap
        elif magic[:8] == _LEGACY:
            file.seek(8)
            read = _read_legacy
        else:
            raise DSMoEError(f"{path}: is not an index of Megatron (begins with {magic!r})")
        try:
            if (version := _numbers(file, "<Q")[0]) != 1:
                raise DSMoEError(f"{path}: version must be 1, got {version}")
            code, lengths, begins, documents = read(file, path)
        except (struct.error, ValueError) as error:
            raise error if isinstance(error, DSMoEError) else DSMoEError(f"{path}: truncated") from None
    dtype = np.dtype(_DTYPES[code])
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or (begins != ends[:-1] * dtype.itemsize).any():
        raise DSMoEError(f"{path}: sequences must follow each other in the .bin file")
    if (expected := int(ends[-1]) * dtype.itemsize) != data_bytes:
        raise DSMoEError(f"{path}: does not match its .bin file, which has {data_bytes:,} bytes, not {expected:,}")
    if len(documents) < 2:  # not recorded: each sequence is one
        documents = np.arange(len(lengths) + 1)
    if documents[0] or documents[-1] != len(lengths) or (np.diff(documents) < 0).any():
        raise DSMoEError(f"{path}: document indices must ascend from 0 to {len(lengths):,}")
    offsets = ends[documents]
    return _Index(dtype, np.concatenate([offsets[:1], offsets[1:][np.diff(offsets) > 0]]))  # no empty documents


_Fields = tuple[int, np.ndarray, np.ndarray, np.ndarray]  # dtype code, sequence lengths, byte offsets, documents


def _read_mmap(file: BinaryIO, path: Path) -> _Fields:
    code, sequences, documents = _numbers(file, "<BQQ")
    _check_code(path, code)
    return code, _array(file, "<i4", sequences), _array(file, "<i8", sequences), _array(file, "<i8", documents)


def _read_legacy(file: BinaryIO, path: Path) -> _Fields:
    code, item_size, sequences, sizes, documents = _numbers(file, "<QQQQQ")
    _check_code(path, code)
    dims, begins = _array(file, "<i8", sequences + 1), _array(file, "<i8", sequences + 1)
    lengths = _array(file, "<i8", sizes)
    if sizes != sequences or (dims != np.arange(sequences + 1)).any():
        raise DSMoEError(f"{path}: sequences must be one-dimensional")
    return code, lengths, begins[:-1] * item_size, _array(file, "<i8", documents)


def _check_code(path: Path, code: int) -> None:
    if code not in _DTYPES:
        raise DSMoEError(f"{path}: dtype code must be one of {', '.join(map(str, _DTYPES))}, got {code}")


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _array(file: BinaryIO, dtype: str, count: int) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    if len(data := file.read(size)) != size:
        raise ValueError("truncated")
    return np.frombuffer(data, dtype).astype(np.int64)
