"""The input of a training step: `Batch`."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Sequences of tokens, int32 [B, T]; NumPy on the host, JAX on devices.

    Attributes:
        token_ids: Input tokens.
        labels: Next token of each position; -100 has no loss.
        segment_ids: Document in the sequence, from 1; 0 is padding.
        position_ids: Position in the document.
    """

    token_ids: Any
    labels: Any
    segment_ids: Any
    position_ids: Any
