"""Fine-tuning examples: token shards with a loss mask. Start at `Examples`."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.manifest import hash_json

from ..data.shards import TokenShards


class Example(NamedTuple):
    """One training example."""

    tokens: np.ndarray  # int32 [tokens], token ids
    loss_mask: np.ndarray  # bool [tokens], whether the token is a label


class Examples(TokenShards):
    """The examples of one split: `TokenShards` whose documents have loss masks."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]):
        """Use `open`."""
        super().__init__(folder, split, manifest)
        name = self._split.get("loss_mask")
        if name is None:
            raise DSMoEError(f"{folder}: holds token shards of documents, not of examples")
        # An empty file cannot be mapped.
        self._mask = np.asarray(np.memmap(folder / name, np.uint8, mode="r")) if self.tokens else np.zeros(0, np.uint8)
        self._ends = np.cumsum(self.lengths)
        self.digest = hash_json({"tokens": self.digest, "targets": manifest["files"][name]["sha256"]})

    def example(self, number: int) -> Example:
        """Return an example."""
        end = int(self._ends[number])
        mask = self._mask[end - int(self.lengths[number]) : end]
        return Example(self.read(number).astype(np.int32), mask.astype(bool))
