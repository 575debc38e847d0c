"""Start-up of multi-process training: `initialize`."""

import os
from typing import Final

import jax

from dsmoe_jax.errors import DSMoEError

from .config import DistributedConfig

# Set by launchers for jobs of more than one process; jax.distributed reads the rest.
_LAUNCHERS: Final = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # Slurm's srun, Open MPI's mpirun


def initialize(config: DistributedConfig) -> None:
    """Initialize `jax.distributed` for multi-process runs, before JAX is used."""
    explicit = {
        "coordinator_address": config.coordinator_address,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }
    if any(value is not None for value in explicit.values()):
        if missing := [name for name, value in explicit.items() if value is None]:
            raise DSMoEError(f"distributed.{missing[0]} must be set together with {', '.join(explicit)}")
    elif config.initialize or any(int(os.environ.get(name, "1")) > 1 for name in _LAUNCHERS):
        explicit = {}  # from the cluster's environment
    else:
        return
    if not jax.distributed.is_initialized():
        # The only CPU collectives that work across processes.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**explicit)  # type: ignore[arg-type]
