"""Examples on disk, written once by writer.py. Start at `Examples`.

A folder of them is a folder of token shards (see `train/data/shards.py`; each example is a document) that also holds
`examples.json` and, of each split, `SPLIT.targets`: a byte for each token of all its shards, 1 for a target.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint.manifest import hash_json
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json

from ..data import TokenShards
from ..data.shards import check_files, check_own_hash
from .templates import Example

MANIFEST: Final = "examples.json"
FORMAT: Final = "dsmoe examples 1"


def targets_file(split: str) -> str:
    """The name of a split's targets."""
    return f"{split}.targets"


def is_examples(path: str | Path) -> bool:
    """Whether the path is a folder of examples."""
    try:
        return read_json(user_path(path, "source") / MANIFEST).get("format") == FORMAT
    except ValueError:
        return False


class Examples:
    """The examples of one split, numbered from 0; nothing is read before it is asked for.

    `lengths` is int64 [examples], in tokens; `tokens` their sum. `digest` is the SHA-256 of all that a training stream
    can depend on.
    """

    def __init__(self, shards: TokenShards, targets: np.ndarray, digest: str):
        """Use `open`."""
        self._shards, self._targets = shards, targets
        self.folder, self.split, self.digest = shards.folder, shards.split, digest
        self.vocab_size, self.tokenizer_hash = shards.vocab_size, shards.tokenizer_hash
        self.lengths, self.tokens = shards.lengths, shards.tokens
        self._ends = np.cumsum(shards.lengths)

    @classmethod
    def open(cls, folder: str | Path, split: str = "train", *, verify: bool = True) -> "Examples":
        """The examples of a split, memory-mapped; `verify` is that of `TokenShards.open`.

        Raises `ValueError` in one line where the folder holds no examples, or a file is missing or damaged.
        """
        folder = user_path(folder, "folder")
        if not (folder / MANIFEST).is_file():
            raise DSMoEError(f"{folder}: no examples (no {MANIFEST})")
        shards = TokenShards.open(folder, split, verify=verify)
        want, path = _sha256_of(folder / MANIFEST, split), folder / targets_file(split)
        check_files(folder, {path.name: {"bytes": shards.tokens, "sha256": want}}, verify=verify)
        # No file can be mapped that has no bytes.
        targets = np.asarray(np.memmap(path, np.uint8, mode="r")) if shards.tokens else np.zeros(0, np.uint8)
        return cls(shards, targets, hash_json({"tokens": shards.digest, "targets": want}))

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.lengths)

    def read(self, number: int) -> Example:
        """An example's token ids, int32, and which of them are targets, bool."""
        end = int(self._ends[number])
        targets = self._targets[end - int(self.lengths[number]) : end]
        return Example(self._shards.read(number).astype(np.int32), targets.astype(bool))

    def check(self, *, tokenizer_hash: str | None = None, vocab_size: int | None = None) -> None:
        """`ValueError` if another tokenizer made them, or a model of `vocab_size` does not know all their ids."""
        self._shards.check(tokenizer_hash=tokenizer_hash, vocab_size=vocab_size)


def _sha256_of(path: Path, split: str) -> str:
    """What the manifest says of a split's targets."""
    fields: dict[str, Any] = read_json(path)
    if (version := fields.get("format")) != FORMAT:
        raise DSMoEError(f"{path}: format {version!r:.80}, this version reads {FORMAT!r}")
    check_own_hash(path, fields)
    try:
        want = fields["splits"][split]["sha256"]
    except (KeyError, TypeError):
        want = None
    if not isinstance(want, str):
        raise DSMoEError(f"{path}: no SHA-256 of the targets of {split}")
    return want
