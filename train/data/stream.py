"""The training stream as a pure function of (seed, step, index): `Stream`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..batch import Batch
from .mixture import Mixture
from .packing import DocumentPacking, Packing
from .shards import TokenShards


class Stream:
    """An endless stream of batches from one or more datasets, read in any order by any process or thread.

    Attributes:
        batch_size: Sequences per batch.
        sequence_length: Tokens per sequence.
        documents: Documents of all datasets.
        tokens: Tokens of all datasets.
        names: Name of each dataset, each different.
        shares: Share of the sequences that each dataset has.
        identity: JSON of everything that determines the stream; a resumed run must match that of the checkpoint.
    """

    def __init__(
        self,
        datasets: Sequence[TokenShards],
        weights: Sequence[float] = (),
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        packing: str = "block_causal",
        packer: type[Packing] = DocumentPacking,
        names: Sequence[str] | None = None,
    ):
        """Mix datasets by weight.

        Args:
            datasets: Token shards of one tokenizer.
            weights: One per dataset; equal by default.
            sequence_length: Tokens per sequence.
            batch_size: Sequences per batch, over all processes.
            seed: Seed of all shuffles.
            packing: One of `packer.CHOICES`.
            packer: `DocumentPacking`, or `ExamplePacking` for fine-tuning examples.
            names: Names of the datasets in metrics. Default: those of their folders.

        Raises:
            DSMoEError: An argument is out of range, or the datasets have different tokenizers.
        """
        weights = weights or [1.0] * len(datasets)
        if not datasets:
            raise DSMoEError("no datasets to train on")
        if len(weights) != len(datasets):
            raise DSMoEError(f"got {len(weights)} weights for {len(datasets)} datasets")
        if seed < 0:
            raise DSMoEError(f"seed must be at least 0, got {seed}")
        for other in datasets[1:]:
            other.check(tokenizer_hash=datasets[0].tokenizer_hash)
        local_indices(batch_size, 0, 1)  # refuses an empty batch
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.documents, self.tokens = sum(map(len, datasets)), sum(data.tokens for data in datasets)
        self.names = unique_names([data.folder.name for data in datasets] if names is None else names)
        self._mixture = Mixture(weights, seed=seed)
        self.shares = [weight / sum(weights) for weight in weights]
        self._packed = [
            packer(data, sequence_length=sequence_length, seed=seed, dataset=number, packing=packing)
            for number, data in enumerate(datasets)
        ]
        self.identity: dict[str, Any] = {
            "datasets": [data.digest for data in datasets],
            "weights": [float(weight) for weight in weights],
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "seed": seed,
            "packing": packing,
        }

    def epochs(self, steps: int) -> dict[str, float]:
        """Return how often each dataset has been read after some steps, by name."""
        counts = zip(self._packed, self._mixture.counts(steps * self.batch_size), strict=True)
        return dict(zip(self.names, (packed.epochs(count) for packed, count in counts), strict=True))

    def sequence(self, n: int) -> np.ndarray:
        """Return sequence `n` of the stream, int32 [4, sequence_length]."""
        dataset, number = self._mixture.place(n)
        return self._packed[dataset].sequence(number)

    def batch(self, step: int, indices: slice | None = None) -> Batch:
        """Return batch `step`, or the given slice of its sequences."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return stack([self.sequence(n) for n in (numbers if indices is None else numbers[indices])])


def unique_names(names: Sequence[str]) -> list[str]:
    """Number names that are not unique."""
    return [name if names.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(names)]


def stack(sequences: Sequence[np.ndarray]) -> Batch:
    """Stack sequences, int32 [4, T], into a batch."""
    return Batch(*np.stack(sequences, axis=1))


def local_indices(batch_size: int, process_index: int, process_count: int) -> range:
    """Return the indices of this process's sequences in every batch."""
    if batch_size < 1:
        raise DSMoEError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise DSMoEError(f"process_index must be in [0, {process_count}), got {process_index}")
    if batch_size % process_count:
        raise DSMoEError(f"batch_size must be divisible by {process_count} processes, got {batch_size}")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)
