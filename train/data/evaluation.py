"""The held-out documents as batches, once and in order: `evaluation_batches`."""

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

    Rows are cut as in training but not shuffled; each dataset begins a row. What is missing in a dataset's last row,
    and rows that are missing in the last batch, is padding: segment 0 and no label. So all batches have one shape, and
    all processes equally many. Raises `ValueError` at once if the batch does not divide over the processes.
    """
    check_shape(sequence_length=sequence_length, mode=mode)
    mine = local_rows(batch_size, process_index, process_count)
    layouts = [Layout.of(shards.lengths, np.arange(len(shards))) for shards in datasets]
    counts = [-(-shards.tokens // sequence_length) for shards in datasets]
    firsts = np.cumsum([0, *counts])

    def row(n: int) -> np.ndarray:
        if n >= firsts[-1]:
            return lay_out([], sequence_length, mode)
        dataset = int(np.searchsorted(firsts, n, side="right")) - 1
        start = (n - int(firsts[dataset])) * sequence_length
        pieces = layouts[dataset].pieces(datasets[dataset], start, start + sequence_length + 1)
        return lay_out(pieces, sequence_length, mode)

    return (stack([row(first + number) for number in mine]) for first in range(0, int(firsts[-1]), batch_size))
