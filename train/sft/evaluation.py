"""The held-out examples as batches, once and in order: `example_batches`."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..batch import Batch
from ..data.stream import local_rows, stack
from .packing import MODES, Layout, check_shape, lay_out_examples
from .store import Examples


def example_batches(
    datasets: Sequence[Examples],
    *,
    sequence_length: int,
    batch_size: int,
    mode: str = "packed",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """All examples of the datasets, each once, none if there are no examples.

    An example that does not fit into the row begun begins the next, so their order is kept; the datasets take turns row
    by row. Rows that are missing in the last batch are padding: segment 0 and no label. So all batches have one shape,
    and all processes equally many. Raises `ValueError` at once if the batch does not divide over the processes.
    """
    for examples in datasets:
        check_shape(examples, sequence_length=sequence_length, mode=mode)
    mine = local_rows(batch_size, process_index, process_count)
    most_open = min(MODES[mode], 1)
    layouts = [Layout.of(e.lengths, np.arange(len(e)), sequence_length, most_open) for e in datasets]
    counts = [len(layout.ends) for layout in layouts]
    turns = range(max(counts, default=0))
    places = [(dataset, row) for row in turns for dataset, count in enumerate(counts) if row < count]

    def row(n: int) -> np.ndarray:
        if n >= len(places):
            return lay_out_examples([], sequence_length)
        dataset, number = places[n]
        return layouts[dataset].row(number, datasets[dataset], sequence_length)

    return (stack([row(first + number) for number in mine]) for first in range(0, len(places), batch_size))
