"""Writing of the shards of one split: `SplitWriter`."""

import array
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from .shards import OFFSET


class SplitWriter:
    """Writes the shards of a split, and the loss mask of examples."""

    def __init__(self, folder: Any, split: str, dtype: np.dtype, shard_tokens: int, masked: bool, stack: ExitStack):
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[dict[str, str]] = []
        self._file = self._mask = None
        self.files: dict[str, dict[str, Any]] = {}
        self.documents = self.tokens = self.loss_tokens = 0
        stack.callback(self._close_file)
        if masked:
            self._mask_name, self._mask_hash = f"{split}.loss_mask", hashlib.sha256()
            self._mask = stack.enter_context((folder / self._mask_name).open("wb"))

    @property
    def size(self) -> int:
        """Bytes on disk when all shards are closed."""
        return self.tokens * self._dtype.itemsize + self.documents * OFFSET.itemsize

    def add(self, ids: Sequence[int], loss_mask: np.ndarray) -> None:
        """Append an example with its loss mask, bool [tokens]."""
        assert self._mask is not None
        self._mask.write(loss_mask.tobytes())
        self._mask_hash.update(loss_mask.tobytes())
        self.loss_tokens += int(loss_mask.sum())
        self.extend(np.array(ids, self._dtype), np.array([len(ids)]))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their concatenated ids, and the length of each."""
        ends, done, first = np.cumsum(lengths), 0, 0
        while first < len(lengths):
            if self._file is None:
                self._open_shard()
            # The shard is closed after the document that fills it.
            room = done + self._shard_tokens - self._offsets[-1]
            last = min(int(np.searchsorted(ends, room)), len(lengths) - 1)
            self._append(ids[done : ends[last]], ends[first : last + 1] - done)
            done, first = int(ends[last]), last + 1
            if self._offsets[-1] >= self._shard_tokens:
                self.close_shard()

    def adopt(self, files: Sequence[tuple[Any, Mapping[str, Any]]], take: Callable[[Any, Any], object]) -> None:
        """Append a closed shard; `files` are its two files and their manifest entries, which `take` links or moves."""
        self.close_shard()
        for name, (path, entry) in zip(self._name_shard(), files, strict=True):
            take(path, self._folder / name)
            self.files[name] = dict(entry)
        self.tokens += files[0][1]["bytes"] // self._dtype.itemsize
        self.documents += files[1][1]["bytes"] // OFFSET.itemsize - 1

    def _name_shard(self) -> tuple[str, str]:
        names = shard_files(self._split, len(self._shards))
        self._shards.append(dict(zip(("tokens", "documents"), names, strict=True)))
        return names

    def _open_shard(self) -> None:
        self._file, self._hash = (self._folder / self._name_shard()[0]).open("wb"), hashlib.sha256()
        self._offsets = array.array("Q", [0])

    def _append(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Append documents to the open shard."""
        assert self._file is not None
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._offsets.extend((ends + self._offsets[-1]).tolist())
        self.documents += len(ends)
        self.tokens += len(ids)

    def finalize(self) -> dict[str, Any]:
        """Close the files and return the split's entry in the manifest."""
        self.close_shard()
        entry = {"documents": self.documents, "tokens": self.tokens, "shards": self._shards}
        if self._mask is None:
            return entry
        self._mask.close()
        self.files[self._mask_name] = {"bytes": self.tokens, "sha256": self._mask_hash.hexdigest()}
        return entry | {"loss_tokens": self.loss_tokens, "loss_mask": self._mask_name}

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def close_shard(self) -> None:
        """Close the open shard, if any; the next document begins another one."""
        if self._file is None:
            return
        self._file.close()
        self._file, names = None, self._shards[-1]
        offsets = np.array(self._offsets, OFFSET).tobytes()
        (self._folder / names["documents"]).write_bytes(offsets)
        tokens = {"bytes": self._offsets[-1] * self._dtype.itemsize, "sha256": self._hash.hexdigest()}
        self.files[names["tokens"]] = tokens
        self.files[names["documents"]] = {"bytes": len(offsets), "sha256": hashlib.sha256(offsets).hexdigest()}


def shard_files(split: str, index: int) -> tuple[str, str]:
    """Return the names of a shard's files: token ids, document offsets."""
    return f"{split}-{index:05d}.tokens", f"{split}-{index:05d}.documents"
