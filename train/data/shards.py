"""Token shards: documents as token ids in memory-mapped files, written once by writer.py. Start at `TokenShards`.

A folder of them holds `manifest.json` and, of each split (`train`, `heldout`), `SPLIT-00000.tokens`: all ids one after
another, little-endian uint16 (uint32 for a vocabulary past 65,536), and `SPLIT-00000.documents`: where each document
begins among them, and at last their number, little-endian uint64. Who opens them hashes each file once; `.verified`
notes which, where the folder can be written.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint.manifest import HashCache, hash_json
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer import tokenizer_files

MANIFEST: Final = "manifest.json"
FORMAT: Final = "dsmoe token shards 1"
SPLITS: Final = ("train", "heldout")
DTYPES: Final = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
BOUNDARY: Final = np.dtype("<u8")
_VERIFIED: Final = ".verified"


def shard_files(split: str, index: int) -> tuple[str, str]:
    """The names of a shard's two files: token ids, boundaries of documents."""
    return f"{split}-{index:05d}.tokens", f"{split}-{index:05d}.documents"


def is_token_shards(path: str | Path) -> bool:
    """Whether the path is a folder of token shards."""
    try:
        return read_json(user_path(path, "source") / MANIFEST).get("format") == FORMAT
    except ValueError:
        return False


def tokenizer_hash(folder: str | Path) -> str:
    """The SHA-256 over the bytes of a tokenizer's files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(tokenizer_files(folder), key=lambda path: path.name):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class TokenShards:
    """The documents of one split, numbered from 0; nothing is read before it is asked for.

    `lengths` is int64 [documents], in tokens, the ending eos included; `tokens` their sum. `digest` is the SHA-256 of
    all that a training stream can depend on.
    """

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]):
        """Use `open`."""
        self.folder, self.split = folder, split
        self.vocab_size, self.eos_token_id = manifest["vocab_size"], manifest["eos_token_id"]
        self.tokenizer_hash = manifest["tokenizer_sha256"]
        self.dtype = DTYPES[manifest["dtype"]]
        self._manifest = manifest["splits"][split]
        self.digest = hash_json({"dtype": manifest["dtype"]} | self._manifest)
        names = [shard_files(split, index) for index in range(len(self._manifest["shards"]))]
        self._tokens = [_map(folder / ids, self.dtype) for ids, _ in names]
        self._boundaries = [_map(folder / boundaries, BOUNDARY) for _, boundaries in names]
        for (_, name), tokens, boundaries in zip(names, self._tokens, self._boundaries, strict=True):
            if boundaries[0] or boundaries[-1] != len(tokens) or (boundaries[1:] <= boundaries[:-1]).any():
                raise DSMoEError(f"{folder / name}: the boundaries of the documents do not ascend from 0 to the end")
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(b).astype(np.int64) for b in self._boundaries)])
        self.tokens = int(self.lengths.sum())
        self._first = np.cumsum([0, *(len(boundaries) - 1 for boundaries in self._boundaries)])

    @classmethod
    def open(cls, folder: str | Path, split: str = "train", *, verify: bool = True) -> "TokenShards":
        """The shards of a split, memory-mapped.

        `verify` compares the SHA-256 of every file, half a second a gigabyte and core, once: a file whose size, times
        and inode are as they were then is not read again. Raises `ValueError` in one line where the folder holds no
        token shards, or a file is missing or damaged.
        """
        folder = user_path(folder, "folder")
        if not (folder / MANIFEST).is_file():
            raise DSMoEError(f"{folder}: no token shards (no {MANIFEST})")
        manifest = _read_manifest(folder / MANIFEST)
        if split not in SPLITS:
            raise DSMoEError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        shards = enumerate(manifest["splits"][split]["shards"])
        files = {name: shard[name.rpartition(".")[2]] for index, shard in shards for name in shard_files(split, index)}
        check_files(folder, files, verify=verify)
        return cls(folder, split, manifest)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids `start` to `stop` of a document: a view of the file. `ValueError` for one that is no token."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        begin = int(self._boundaries[shard][document - self._first[shard]])
        stop = int(self.lengths[document]) if stop is None else stop
        ids = self._tokens[shard][begin + start : begin + stop]
        # An embedding would read another row for it, or NaN; the file may have changed since it was opened.
        if ids.size and (largest := ids.max()) >= self.vocab_size:
            name = shard_files(self.split, shard)[0]
            raise DSMoEError(
                f"{self.folder / name}: damaged: token id {largest} in document {document}, "
                f"the vocabulary has {self.vocab_size}"
            )
        return ids

    def check(self, *, tokenizer_hash: str | None = None, vocab_size: int | None = None) -> None:
        """`ValueError` if another tokenizer made the shards, or a model of `vocab_size` does not know all their ids."""
        if tokenizer_hash is not None and tokenizer_hash != self.tokenizer_hash:
            raise DSMoEError(
                f"{self.folder}: made with another tokenizer (SHA-256 {self.tokenizer_hash[:12]}…, "
                f"not {tokenizer_hash[:12]}…); tokenize the text again"
            )
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise DSMoEError(
                f"{self.folder}: made with a vocabulary of {self.vocab_size}; the model's vocab_size is {vocab_size}"
            )


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest; `ValueError` if anything in it is not of the kind that is read here."""
    fields = read_json(path)
    if (version := fields.get("format")) != FORMAT:
        raise DSMoEError(f"{path}: format {version!r}, this version reads {FORMAT!r}")
    check_own_hash(path, fields)

    def field(table: Any, name: str, kind: type) -> Any:
        value = table.get(name) if isinstance(table, dict) else None
        if type(value) is not kind:
            raise DSMoEError(f"{path}: `{name}` must be a {kind.__name__}, got {value!r:.80}")
        return value

    for name, kind in {"vocab_size": int, "eos_token_id": int, "tokenizer_sha256": str, "splits": dict}.items():
        field(fields, name, kind)
    if field(fields, "dtype", str) not in DTYPES:
        raise DSMoEError(f"{path}: dtype {fields['dtype']!r:.80} is not one of {', '.join(DTYPES)}")
    for split in SPLITS:
        for shard in field(field(fields["splits"], split, dict), "shards", list):
            for kind, dtype, least in (("tokens", DTYPES[fields["dtype"]], 1), ("documents", BOUNDARY, 2)):
                size = field(field(shard, kind, dict), "bytes", int)
                field(shard[kind], "sha256", str)
                if size < least * dtype.itemsize or size % dtype.itemsize:
                    raise DSMoEError(f"{path}: a shard of {size} bytes of {kind}")
    return fields


def check_own_hash(path: Path, fields: dict[str, Any]) -> None:
    """`ValueError` unless the manifest still has the SHA-256 that it gives of itself; older ones give none."""
    said = fields.pop("sha256", None)
    if said is not None and said != hash_json(fields):
        raise DSMoEError(f"{path}: damaged: its own SHA-256 is another")


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, verify: bool) -> None:
    """`ValueError` unless each file has the `bytes` of its row and, with `verify`, the `sha256`."""
    for name, want in files.items():
        if not (folder / name).is_file():
            raise DSMoEError(f"{folder / name}: is missing")
        if (size := os.path.getsize(folder / name)) != want["bytes"]:
            raise DSMoEError(f"{folder / name}: has {size} bytes, not {want['bytes']}")
    if verify:
        for path, found in HashCache(folder / _VERIFIED).hashes(folder / name for name in files).items():
            if found != files[path.name]["sha256"]:
                raise DSMoEError(f"{path}: has other bytes than were written: another SHA-256")
