"""The plan of a run that starts, against the memory of its devices: `check_memory`."""

import dataclasses
import logging
import os
from typing import Final

import jax
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.memory_plan import device_bytes
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import RunConfig

_OVERESTIMATE: Final = 1.15  # of temporaries, at most (tests/benchmarks/plan_check.py)
_log = logging.getLogger(__name__)


def check_memory(config: RunConfig, mesh: Mesh | None, *, force: bool = False) -> None:
    """Log the plan of a run in one line, and refuse one that cannot fit.

    Args:
        config: The run. The temporaries of batches whose shape depends on the data are not counted.
        mesh: Its devices; None: the default device.
        force: Warn instead of refusing.

    Raises:
        DSMoEError: The memory of a device is known and too small.
    """
    model, devices = config.model_config(), 1 if mesh is None else mesh.size
    sizes = MeshConfig() if mesh is None else MeshConfig(*mesh.shape.values())
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    available = device_bytes() or _machine_bytes()
    card = dataclasses.replace(CARDS["cpu" if platform == "cpu" else "h100"], memory=available or 0)
    dtype = DTYPES.get(model.torch_dtype or "", DTYPES["bfloat16"])
    plan = TrainingPlan.of(dataclasses.replace(config, mesh=sizes), model, devices, card, dtype=dtype)
    known = config.data.sequence_length and config.data.batch_size
    held, temporary = sum(plan.held.values()), sum(plan.temporary.values()) if known else 0
    parts = f"arguments {_size(held)}, temporaries {f'about {_size(temporary)}' if known else 'by the data'}"
    bound = f" of {_size(available)}" if available else ""
    _log.info("Memory plan: %s%s per device (%s)", _size(held + temporary), bound, parts)
    if available and held + temporary / _OVERESTIMATE > available:
        text = f"the run needs {_size(held + temporary)} per device ({parts}), {_size(available)} are there"
        if not force:
            raise DSMoEError(f"{text}: `dsmoe plan … --search` finds settings that fit; --force starts regardless")
        _log.warning("Starting although %s", text)


def _machine_bytes() -> int | None:
    """Return the memory that each simulated device has; None if it is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    except (AttributeError, OSError, ValueError):
        return None


def _size(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
