"""What training reads, as a pure function of (seed, step, row): `Stream`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..batch import Batch
from .mixture import Mixture
from .packing import Packing


@runtime_checkable
class Dataset(Protocol):
    """What a stream must know of a dataset: token shards, or examples to fine-tune on."""

    digest: str  # of all that its rows depend on
    tokenizer_hash: str

    def check(self, *, tokenizer_hash: str | None = None) -> None: ...  # noqa: D102


class Rows(Protocol):
    """The rows of one dataset, numbered from 0 without end."""

    def row(self, n: int) -> np.ndarray: ...  # noqa: D102


class Stream:
    """An endless stream of batches from one or more datasets, mixed by `weights` (default: equal ones).

    Batch `step` is rows step · batch_size and on of the mixture. Nothing is remembered from one call to the next but
    indices that would be computed again, so any process may ask for any rows in any order; threads may, too.
    `packing` makes the rows of a dataset in one of its modes.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float] = (),
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        mode: str = "documents",
        packing: Callable[..., Rows] = Packing,
    ):
        weights = weights or [1.0] * len(datasets)
        if not datasets:
            raise DSMoEError("no datasets to train on")
        if len(weights) != len(datasets):
            raise DSMoEError(f"{len(weights)} weights for {len(datasets)} datasets")
        if seed < 0:
            raise DSMoEError(f"seed must be at least 0, not {seed}")
        for other in datasets[1:]:
            other.check(tokenizer_hash=datasets[0].tokenizer_hash)
        local_rows(batch_size, 0, 1)  # refuses an empty batch
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self._mixture = Mixture(weights, seed=seed)
        self._packings = [
            packing(data, sequence_length=sequence_length, seed=seed, dataset=number, mode=mode)
            for number, data in enumerate(datasets)
        ]
        # All that decides the stream, as JSON: a checkpoint keeps it, and a run that goes on must have the same.
        self.identity: dict[str, Any] = {
            "datasets": [data.digest for data in datasets],
            "weights": [float(weight) for weight in weights],
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "seed": seed,
            "mode": mode,
        }

    def row(self, n: int) -> np.ndarray:
        """Row `n` of the stream, int32 [4, sequence_length], the fields of a `Batch`."""
        dataset, number = self._mixture.place(n)
        return self._packings[dataset].row(number)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Batch `step`, or some of its rows."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return stack([self.row(n) for n in (numbers if rows is None else numbers[rows])])


def stack(rows: Sequence[np.ndarray]) -> Batch:
    """Rows, int32 [4, T], as a batch."""
    return Batch(*np.stack(rows, axis=1))


def local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of every batch that a process reads: the batches of all processes in their order are the whole one.

    Raises `ValueError` if the batch does not divide.
    """
    if batch_size < 1:
        raise DSMoEError(f"batch_size must be at least 1, not {batch_size}")
    if not 0 <= process_index < process_count:
        raise DSMoEError(f"process {process_index} of {process_count}")
    if batch_size % process_count:
        raise DSMoEError(f"batch_size {batch_size} does not divide over {process_count} processes")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)
