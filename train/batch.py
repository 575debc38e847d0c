"""What a training step reads."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of tokens: arrays int32 [B, T], of numpy on their way to the devices, of JAX there."""

    token_ids: Any
    labels: Any  # the next token at each position, -100 where none counts
    segment_ids: Any  # the document in the row, from 1; 0 is padding
    position_ids: Any
