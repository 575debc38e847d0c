"""Token shards: tokenized data in memory-mapped files. Start at `TokenShards`.

A folder has `manifest.json` and, per split (`train`, `validation`) and shard, `SPLIT-00000.tokens` with the token ids
(little-endian uint16, or uint32 beyond 65,536 tokens) and `SPLIT-00000.documents` with the offset of each document and
the total (little-endian uint64). Fine-tuning examples have `SPLIT.loss_mask`, one byte per token. `tokenizer/` has the
tokenizer's files; version 0.1 did not write it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.storage.manifest import HashCache, check_files, hash_json, read_manifest
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer import tokenizer_files

MANIFEST: Final = "manifest.json"
FORMAT: Final = "dsmoe token shards 2"
SPLITS: Final = ("train", "validation")
DTYPES: Final = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET: Final = np.dtype("<u8")
Shards = TypeVar("Shards", bound="TokenShards")
TOKENIZER: Final = "tokenizer"
_VERIFIED: Final = ".verified"
# Version 0.1 had a second manifest for the masks of examples, and called the validation split `heldout`.
_FORMAT_1: Final = "dsmoe token shards 1"
_EXAMPLES_1: Final = "examples.json"
_SPLITS_1: Final = dict(zip(SPLITS, ("train", "heldout"), strict=True))


def is_token_shards(path: str | Path) -> bool:
    """Whether the path is a folder of token shards, of documents or of examples."""
    return _fields(path).get("format") in (FORMAT, _FORMAT_1)


def is_examples(path: str | Path) -> bool:
    """Whether the path is a folder of token shards of fine-tuning examples."""
    old = user_path(path, "source") / _EXAMPLES_1
    return is_token_shards(path) and ("examples" in _fields(path) or old.is_file())


def _fields(path: str | Path) -> dict[str, Any]:
    try:
        return read_json(user_path(path, "source") / MANIFEST)
    except ValueError:
        return {}


def tokenizer_hash(folder: str | Path) -> str:
    """Return the SHA-256 of a tokenizer's files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(tokenizer_files(folder), key=lambda path: path.name):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def shards_tokenizer(folder: str | Path) -> Path | None:
    """Return the folder of the tokenizer that token shards were written with; None if they hold none."""
    tokenizer = user_path(folder, "source") / TOKENIZER
    return tokenizer if is_token_shards(folder) and tokenizer_files(tokenizer) else None


class TokenShards:
    """The documents of one split, numbered from 0, memory-mapped.

    Attributes:
        folder: Where they are.
        vocab_size: That of the tokenizer.
        eos_token_id: The id that ends every document.
        tokenizer_hash: See `tokenizer_hash`.
        val_fraction: Fraction of the documents in the validation split.
        lengths: int64 [documents], in tokens, the final EOS included.
        tokens: Their sum.
        digest: SHA-256 of everything that a training stream depends on.
    """

    def __init__(self, folder: Path, split: str, manifest: Mapping[str, Any]):
        """Use `open`."""
        self.folder, self._split = folder, manifest["splits"][split]
        self.vocab_size, self.eos_token_id = manifest["vocab_size"], manifest["eos_token_id"]
        self.tokenizer_hash, self.val_fraction = manifest["tokenizer_sha256"], manifest.get("val_fraction")
        self.dtype = DTYPES[manifest["dtype"]]
        shards = self._split["shards"]
        # As in format 1, so that runs resume on shards of either format.
        hashes = [{kind: manifest["files"][name] for kind, name in shard.items()} for shard in shards]
        counts = {name: self._split[name] for name in ("documents", "tokens")}
        self.digest = hash_json({"dtype": manifest["dtype"], **counts, "shards": hashes})
        self._tokens = [_map(folder / shard["tokens"], self.dtype) for shard in shards]
        self._offsets = [_map(folder / shard["documents"], OFFSET) for shard in shards]
        for shard, tokens, offsets in zip(shards, self._tokens, self._offsets, strict=True):
            if offsets[0] or offsets[-1] != len(tokens) or (offsets[1:] <= offsets[:-1]).any():
                raise DSMoEError(f"{folder / shard['documents']}: document offsets must ascend from 0 to {len(tokens)}")
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(o).astype(np.int64) for o in self._offsets)])
        self.tokens = int(self.lengths.sum())
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])

    @classmethod
    def open(cls: type[Shards], folder: str | Path, split: str = "train", *, verify: bool = True) -> Shards:
        """Map the shards of a split.

        Args:
            folder: What `tokenize` or `write_examples` wrote.
            split: `train` or `validation`.
            verify: Compare the SHA-256 of every file (half a second per gigabyte and core), once; `.verified` records
                its size, times and inode.

        Raises:
            DSMoEError: The folder holds no token shards, or a file is missing or damaged.
        """
        check_choice("split", split, SPLITS)
        return cls._open(user_path(folder, "folder"), [split], verify)[0]

    @classmethod
    def open_splits(cls: type[Shards], folder: str | Path) -> tuple[Shards, Shards]:
        """Map the training and the validation split; see `open`."""
        train, validation = cls._open(user_path(folder, "folder"), SPLITS, verify=True)
        return train, validation

    @classmethod
    def _open(cls: type[Shards], folder: Path, splits: Sequence[str], verify: bool) -> list[Shards]:
        manifest = _read_manifest(folder)
        entries = [manifest["splits"][split] for split in splits]
        names = [name for entry in entries for shard in entry["shards"] for name in shard.values()]
        names += [entry["loss_mask"] for entry in entries if "loss_mask" in entry]
        names += [name for name in manifest["files"] if name.startswith(f"{TOKENIZER}/")]
        files = {name: manifest["files"][name] for name in names}
        check_files(folder, files, verify=verify, cache=HashCache(folder / _VERIFIED))
        return [cls(folder, split, manifest) for split in splits]

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return token ids `start` to `stop` of a document, a view of the file."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        begin = int(self._offsets[shard][document - self._first[shard]])
        stop = int(self.lengths[document]) if stop is None else stop
        ids = self._tokens[shard][begin + start : begin + stop]
        # The file may have changed since it was opened, and an embedding lookup out of range is not an error.
        if ids.size and (largest := ids.max()) >= self.vocab_size:
            path = self.folder / self._split["shards"][shard]["tokens"]
            bound = f"token ids must be below vocab_size {self.vocab_size}, got {largest}"
            raise DSMoEError(f"{path}: damaged: {bound} in document {document}")
        return ids

    def check(self, *, tokenizer_hash: str | None = None, vocab_size: int | None = None) -> None:
        """Raise `DSMoEError` for another tokenizer, or a `vocab_size` that is too small."""
        if tokenizer_hash is not None and tokenizer_hash != self.tokenizer_hash:
            hashes = f"SHA-256 {self.tokenizer_hash[:12]}…, not {tokenizer_hash[:12]}…"
            raise DSMoEError(f"{self.folder}: written with another tokenizer ({hashes}); tokenize the text again")
        if vocab_size is not None and self.vocab_size > vocab_size:
            least = f"the model's vocab_size must be at least {self.vocab_size}"
            raise DSMoEError(f"{self.folder}: {least}, got {vocab_size}")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest, of either format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DSMoEError(f"{folder}: no token shards (no {MANIFEST})")
    fields = read_manifest(path, None, require_hash=False)
    if (version := fields.get("format")) not in (FORMAT, _FORMAT_1):
        raise DSMoEError(f"{path}: format must be {FORMAT!r}, got {version!r:.80}")
    try:
        if version == _FORMAT_1:
            fields |= _from_format_1(folder, fields)
        _check_types(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DSMoEError(f"{path}: malformed manifest: {error}") from None
    return fields


def _check_types(fields: dict[str, Any]) -> None:
    def field(table: Any, name: str, kind: type) -> Any:
        value = table.get(name) if isinstance(table, dict) else None
        if type(value) is not kind:
            raise DSMoEError(f"`{name}` must be of type {kind.__name__}, got {value!r:.80}")
        return value

    def check_file(name: str, dtype: np.dtype, least: int) -> None:
        entry = field(fields["files"], name, dict)
        size, _ = field(entry, "bytes", int), field(entry, "sha256", str)
        if Path(name).name != name or size < least * dtype.itemsize or size % dtype.itemsize:
            raise DSMoEError(f"{name!r:.80} has impossible size {size}")

    for name, kind in {"vocab_size": int, "eos_token_id": int, "tokenizer_sha256": str, "files": dict}.items():
        field(fields, name, kind)
    if field(fields, "dtype", str) not in DTYPES:
        raise DSMoEError(f"`dtype` must be one of {', '.join(DTYPES)}, got {fields['dtype']!r:.80}")
    for split in SPLITS:
        entry = field(field(fields, "splits", dict), split, dict)
        size = {name: field(entry, name, int) for name in ("documents", "tokens")}
        for shard in field(entry, "shards", list):
            check_file(field(shard, "tokens", str), DTYPES[fields["dtype"]], 1)
            check_file(field(shard, "documents", str), OFFSET, 2)
        if "loss_mask" in entry:
            check_file(field(entry, "loss_mask", str), np.dtype(np.uint8), size["tokens"])


def _from_format_1(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a manifest of version 0.1; `examples.json` has the loss masks."""
    has_masks = (folder / _EXAMPLES_1).is_file()
    masks = read_manifest(folder / _EXAMPLES_1, None, require_hash=False)["splits"] if has_masks else {}
    files, splits = {}, {}
    for split, old in _SPLITS_1.items():
        entry = splits[split] = dict(fields["splits"][old])
        hashes, entry["shards"] = entry["shards"], []
        for index, shard in enumerate(hashes):
            names = {kind: f"{old}-{index:05d}.{kind}" for kind in ("tokens", "documents")}
            files |= {name: shard[kind] for kind, name in names.items()}
            entry["shards"].append(names)
        if has_masks:
            entry["loss_mask"] = f"{old}.targets"
            files[entry["loss_mask"]] = {"bytes": entry["tokens"], "sha256": masks[old]["sha256"]}
    return {"files": files, "splits": splits, "val_fraction": fields.get("val_fraction", fields.get("holdout"))}
