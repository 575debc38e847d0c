"""The input of a training step: `Batch`."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Sequences of tokens, int32 [B, T]; NumPy on the host, JAX on devices."""

    token_ids: Any
    labels: Any  # next token of each position; -100 has no loss
    segment_ids: Any  # index of the document, from 1; 0 is padding
    position_ids: Any  # position within the document
