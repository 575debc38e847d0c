"""Several processes that train together: how they start. See `start`."""

import os
from typing import Final

import jax

from dsmoe_jax.errors import DSMoEError

from .config import ProcessConfig

# What launchers set where a job has more than one process; jax.distributed reads the rest of it.
_LAUNCHERS: Final = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # Slurm's srun, Open MPI's mpirun


def start(config: ProcessConfig) -> None:
    """Join the other processes, if there are any; before any other use of JAX.

    With a coordinator's address all three of `coordinator`, `processes` and `index` are needed; else Slurm, Open MPI
    or a Kubernetes job say them. Raises `ValueError` where only some are given.
    """
    explicit = (config.coordinator, config.processes, config.index)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise DSMoEError("processes: coordinator, processes and index go together")
        _initialize(coordinator_address=config.coordinator, num_processes=config.processes, process_id=config.index)
    elif config.distributed or any(int(os.environ.get(name, "1")) > 1 for name in _LAUNCHERS):
        _initialize()


def _initialize(**options: object) -> None:
    if jax.distributed.is_initialized():
        return
    # CPUs have no collectives across processes but these.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)  # type: ignore[arg-type]
