"""Prefetching of this process's part of every batch: `loader`, built on grain."""

from collections.abc import Iterator
from typing import Final

import grain
import numpy as np

from dsmoe_jax.errors import DSMoEError

from ..batch import Batch
from .stream import Stream, local_indices, stack

_ENDLESS: Final = 1 << 60  # sequences; grain adds to it, and a larger number would overflow
_THREADS: Final = 2  # a batch takes a millisecond, most of it in Python


def loader(
    stream: Stream, *, start_step: int = 0, process_index: int = 0, process_count: int = 1, prefetch: int = 2
) -> Iterator[Batch]:
    """Iterate endlessly over this process's part of the batches, starting at `start_step`, the only state.

    Args:
        stream: The training stream.
        start_step: First batch.
        process_index: This process.
        process_count: Number of processes.
        prefetch: Batches prepared ahead in threads; 0 prepares each on demand.

    Returns:
        An iterator; its `close` ends the threads.

    Raises:
        DSMoEError: The batch does not divide over the processes, or an argument is negative.
    """
    local = local_indices(stream.batch_size, process_index, process_count)
    if start_step < 0:
        raise DSMoEError(f"start_step must be at least 0, got {start_step}")
    if prefetch < 0:
        raise DSMoEError(f"prefetch must be at least 0, got {prefetch}")
    # Grain gets packed sequences: its packing and shuffling would depend on the number of processes.
    sequences = grain.MapDataset.source(_LocalSequences(stream, start_step, local))
    options = grain.ReadOptions(num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch)
    return iter(sequences.batch(len(local), batch_fn=stack).to_iter_dataset(options))


class _LocalSequences:
    """The sequences of one process, starting at a step."""

    def __init__(self, stream: Stream, start_step: int, local: range):
        self._stream, self._start, self._local = stream, start_step, local

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        step, i = divmod(int(index), len(self._local))
        return self._stream.sequence((self._start + step) * self._stream.batch_size + self._local[i])
