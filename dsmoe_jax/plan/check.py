"""The plan of a run that starts, against the memory of its devices: `check_memory`."""

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from typing import Final

import jax
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.memory_plan import available_bytes
from dsmoe_jax.plan.absent_gpu import DESCRIPTIONS
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.progress import byte_size
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import RunConfig

_OVERESTIMATE: Final = 1.15  # of temporaries, at most (tests/benchmarks/plan_check.py)
_NEGLIGIBLE: Final = 1e-3  # of the arguments
_log = logging.getLogger(__name__)


def check_memory(config: RunConfig, mesh: Mesh | None, *, force: bool = False, command: Sequence[str] = ()) -> None:
    """Log the plan of a run in one line, and refuse one that cannot fit.

    Args:
        config: The run. The temporaries of batches whose shape depends on the data are not counted.
        mesh: Its devices; None: the default device.
        force: Warn instead of refusing.
        command: The arguments of `dsmoe` that start the run, for the message; empty: not known.

    Raises:
        DSMoEError: The memory of a device is known and too small.
    """
    model, devices = config.model_config(), 1 if mesh is None else mesh.size
    sizes = MeshConfig() if mesh is None else MeshConfig(*mesh.shape.values())
    name, available = _card_here(), available_bytes(mesh)
    card = dataclasses.replace(CARDS[name], memory=available or 0)
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
            memory = available * card.memory / card.usable / 1e9  # GB, of which `available` is usable
            figures = f"--devices {devices} --device {name} --device-memory {memory:.4g}"
            search = f"dsmoe plan {shlex.join(command) or '…'} {figures} --search"
            raise DSMoEError(f"{text}: `{search}` looks for settings that fit; --force starts regardless")
        _log.warning("Starting although %s", text)


def _card_here() -> str:
    """Return the key of the card of this process, or of one with the same compiler."""
    if jax.default_backend() == "cpu":
        return "cpu"
    kind = jax.local_devices()[0].device_kind
    return next((name for name, card in DESCRIPTIONS.items() if card.name == kind), "h100")
