"""The plan of a run that starts, against the memory of its devices: `check_memory`."""

import dataclasses
import logging
from typing import Final

import jax
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.memory_plan import available_bytes
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.progress import byte_size
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import RunConfig

_OVERESTIMATE: Final = 1.15  # of temporaries, at most (tests/benchmarks/plan_check.py)
_NEGLIGIBLE: Final = 1e-3  # of the arguments
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
    platform, available = "cpu" if jax.default_backend() == "cpu" else "gpu", available_bytes(mesh)
    card = dataclasses.replace(CARDS["cpu" if platform == "cpu" else "h100"], memory=available or 0)
    dtype = DTYPES.get(model.torch_dtype or "", DTYPES["bfloat16"])
    plan = TrainingPlan.of(dataclasses.replace(config, mesh=sizes), model, devices, card, dtype=dtype)
    known = config.data.sequence_length and config.data.batch_size
    temporary = plan.temporaries if known else 0
    parts = [f"{name} {byte_size(size)}" for name, size in plan.held.items() if size > _NEGLIGIBLE * plan.arguments]
    parts = ", ".join([*parts, f"temporaries {f'about {byte_size(temporary)}' if known else 'by the data'}"])
    bound = f" of {byte_size(available)}" if available else ""
    _log.info("Memory plan: %s%s per device (%s)", byte_size(plan.arguments + temporary), bound, parts)
    if available and plan.arguments + temporary / _OVERESTIMATE > available:
        needs = f"the run needs {byte_size(plan.arguments + temporary)} per device ({parts})"
        text = f"{needs}, {byte_size(available)} are available"
        if not force:
            raise DSMoEError(f"{text}: `dsmoe plan … --search` finds settings that fit; --force starts regardless")
        _log.warning("Starting although %s", text)
