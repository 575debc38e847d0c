"""Batches ahead of time, on this process's share of every batch: `loader`, built on grain."""

from collections.abc import Iterator
from typing import Final

import grain
import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..batch import Batch
from .stream import Stream, local_rows, stack

_ENDLESS: Final = 1 << 60  # rows; grain adds to it, and more would not be an index
_THREADS: Final = 2  # a batch takes a millisecond, most of it in Python


def loader(
    stream: Stream, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 2
) -> Iterator[Batch]:
    """This process's rows of batches `start_step`, `start_step` + 1 and so on, without end.

    The step is all there is to remember: a loader that starts at a step goes on as any other would have. `prefetch`
    batches are made ahead in threads (0: none, each when it is asked for); the iterator has a `close` that ends them.
    Raises `ValueError` if the batch does not divide over the processes.
    """
    mine = local_rows(stream.batch_size, process_index, process_count)
    if start_step < 0:
        raise DSMoEError(f"start_step must be at least 0, not {start_step}")
    if prefetch < 0:
        raise DSMoEError(f"prefetch must be at least 0, not {prefetch}")
    # The rows are chosen before grain sees them: what it packed or shuffled would depend on the number of processes.
    rows = grain.MapDataset.source(_Rows(stream, start_step, mine))
    options = grain.ReadOptions(num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch)
    return iter(rows.batch(len(mine), batch_fn=stack).to_iter_dataset(options))


class _Rows:
    """The rows of a process, from a step on, one after another."""

    def __init__(self, stream: Stream, start_step: int, mine: range):
        self._stream, self._start, self._mine = stream, start_step, mine

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        step, row = divmod(int(index), len(self._mine))
        return self._stream.row((self._start + step) * self._stream.batch_size + self._mine[row])
