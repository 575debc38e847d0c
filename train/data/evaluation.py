"""The held-out documents as batches, once and in order: `evaluation_batches`."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ..batch import Batch
from .packing import Layout, check_shape, lay_out
from .shards import TokenShards
from .stream import local_rows, stack


def evaluation_batches(
    datasets: Sequence[TokenShards],
    *,
    sequence_length: int,
    batch_size: int,
    mode: str = "documents",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All documents of the datasets, each token once, none if there are no documents.

    Rows are cut as in training but not shuffled; each dataset begins a row, and the datasets take turns row by row, so
    that the first batches hold something of each. What is missing in a dataset's last row, and rows that are missing in
    the last batch, is padding: segment 0 and no label. So all batches have one shape, and all processes equally many.
    Raises `ValueError` at once if the batch does not divide over the processes.
    """
    check_shape(sequence_length=sequence_length, mode=mode)
    mine = local_rows(batch_size, process_index, process_count)
    layouts = [Layout.of(shards.lengths, np.arange(len(shards))) for shards in datasets]
    counts = [-(-shards.tokens // sequence_length) for shards in datasets]
    turns = range(max(counts, default=0))
    places = ((dataset, n) for n in turns for dataset, count in enumerate(counts) if n < count)

    def row(dataset: int, n: int) -> np.ndarray:
        start = n * sequence_length
        pieces = layouts[dataset].pieces(datasets[dataset], start, start + sequence_length + 1)
        return lay_out(pieces, sequence_length, mode)

    def batches() -> Iterator[Batch]:
        padding = lay_out([], sequence_length, mode)
        while some := list(itertools.islice(places, batch_size)):
            yield stack([row(*some[number]) if number < len(some) else padding for number in mine])

    return batches()
