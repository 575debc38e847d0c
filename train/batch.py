"""What a training step reads."""

from typing import NamedTuple

from dsmoe_jax.axes import Array, Int


class Batch(NamedTuple):
    """Rows of tokens. Arrays of numpy or JAX, int32."""

    token_ids: Int[Array, "B T"]
    labels: Int[Array, "B T"]  # the next token at each position, -100 where none counts
    segment_ids: Int[Array, "B T"]  # the document in the row, from 1; 0 is padding
    position_ids: Int[Array, "B T"]
