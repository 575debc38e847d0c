"""Default sequence length and batch size of fine-tuning, by its data: `fit_sequence_length` and `fit_batch_size`."""

from typing import Final

MAX_LENGTH: Final = 1024  # tokens per sequence
FIT_STEPS: Final = 40  # steps that the batch size leaves, if the data allow
FEW_STEPS: Final = 20  # fewer hardly train
_LENGTH_MULTIPLE: Final = 64
_MAX_BATCH_SIZE: Final = 64


def fit_sequence_length(longest: int, limit: int) -> int:
    """Return the multiple of 64 tokens that holds the longest example, at most `limit`."""
    return min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, limit)


def fit_batch_size(sequences: int, multiple: int, steps: int = FIT_STEPS) -> int:
    """Return `multiple` times the power of two, at most 64, that leaves at least `steps` steps, or else `multiple`."""
    size = multiple
    while 2 * size <= min(_MAX_BATCH_SIZE, sequences // steps):
        size *= 2
    return size
