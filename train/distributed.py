"""Multi-process training: `initialize` and `on_process_0`."""

import os
from collections.abc import Callable
from typing import Any, Final

import jax

from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.errors import DSMoEError

from .config import DistributedConfig

# Set by launchers for jobs of more than one process; jax.distributed reads the rest.
_LAUNCHERS: Final = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # Slurm's srun, Open MPI's mpirun


def initialize(config: DistributedConfig) -> None:
    """Initialize `jax.distributed` for multi-process runs, before JAX is used."""
    explicit = {name: value for name, value in vars(config).items() if name != "initialize"}
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


def on_process_0(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function on process 0; if it raises, all processes raise. Collective."""
    with collective_errors():
        if jax.process_index() == 0:
            function(*args, **kwargs)
