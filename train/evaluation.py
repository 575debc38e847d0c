"""The validation loss of a training state: `evaluation_loss`."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe_jax.sharding import BATCH_AXES

from .batch import Batch
from .step import TrainState


def evaluation_loss(
    eval_step: Any, frozen: Mapping[str, Any], mesh: Mesh | None, state: TrainState, batches: Iterator[Batch]
) -> tuple[float, int] | None:
    """Return validation loss and token count; None without validation data."""
    total, count = 0.0, 0
    for batch in batches:
        ce, counted = eval_step(state.params, state.router_bias, place(batch, mesh), frozen)
        total, count = total + float(ce), count + int(counted)
    return (total / count, count) if count else None


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """Move this process's sequences of a batch to its devices."""
    if mesh is None:
        return Batch(*map(jax.device_put, batch))
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return Batch(*(jax.make_array_from_process_local_data(sharding, rows) for rows in batch))
