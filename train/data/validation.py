"""The validation split as batches, once and in order: `validation_batches`."""

import itertools
from collections.abc import Iterator, Sequence

from ..batch import Batch
from .packing import DocumentPacking, Packing, pack
from .shards import TokenShards
from .stream import local_indices, stack


def validation_batches(
    datasets: Sequence[TokenShards],
    *,
    sequence_length: int,
    batch_size: int,
    packing: str = "block_causal",
    packer: type[Packing] = DocumentPacking,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Iterate over all tokens of the datasets once, unshuffled.

    Sequences are packed as in training and interleaved over the datasets. Padding (segment 0, no label) fills the last
    sequence of a dataset and the last batch, so that shapes and the number of batches are equal on all processes.

    Args:
        datasets: The validation split of each dataset.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per batch, over all processes.
        packing: One of `packer.CHOICES`.
        packer: `DocumentPacking`, or `ExamplePacking` for fine-tuning examples.
        process_index: This process.
        process_count: Number of processes.

    Returns:
        This process's part of every batch; nothing if the datasets are empty.

    Raises:
        DSMoEError: The batch does not divide over the processes, or the shape is invalid; before the first batch.
    """
    local = local_indices(batch_size, process_index, process_count)
    packed = [packer.in_order(data, sequence_length=sequence_length, packing=packing) for data in datasets]
    rounds = range(max((count for count, _ in packed), default=0))
    builders = ((build, n) for n in rounds for count, build in packed if n < count)

    def batches() -> Iterator[Batch]:
        padding = pack([], sequence_length)
        while some := list(itertools.islice(builders, batch_size)):
            mine = [some[i] for i in local if i < len(some)]
            yield stack([build(n) for build, n in mine] + [padding] * (len(local) - len(mine)))

    return batches()
