"""Memory and time of an experiment's runs on GPUs, by arithmetic: `plan_text`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.experiments.variants import SCALES, choose, model_config, run_config, shortened
from dsmoe_jax.info import count_parameters
from dsmoe_jax.plan.cards import card_of
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.sharding import MeshConfig

_GB: Final = 1e9


def plan_text(
    scale: str, variants: Sequence[str], *, steps: int | None = None, devices: int | None = None, device: str = "h100"
) -> str:
    """Return a table of the memory and the hours of one run of each variant.

    Args:
        scale: A key of `SCALES`.
        variants: Keys of `VARIANTS`.
        steps: Steps of a run. Default: those of the scale.
        devices: Devices of a run. Default: 8 if the scale's runs have a mesh, 1 otherwise.
        device: Card, as `dsmoe plan --device`.

    Raises:
        DSMoEError: A name is unknown, or the runs do not divide over the devices.
    """
    check_choice("scale", scale, SCALES)
    card, sizes, nowhere = card_of(device), SCALES[scale], Path("unused")
    devices = (8 if sizes.mesh else 1) if devices is None else devices
    for name, value in (("devices", devices), ("steps", steps)):
        if value is not None and value < 1:
            raise DSMoEError(f"{name} must be at least 1, got {value}")
    sizes = sizes if steps is None else shortened(sizes, steps)
    lines = [f"{'variant':<14}{'parameters':>12}{'per device':>12}{'hours on ' + f'{devices} {device}':>24}"]
    for name in choose(variants):
        run = dataclasses.replace(
            run_config(sizes, 0, model=nowhere, data=nowhere, out=nowhere), mesh=MeshConfig(fsdp=devices)
        )
        model = model_config(name, sizes)
        try:
            plan = TrainingPlan.of(run, model, devices, card)
        except DSMoEError as error:
            most = sizes.batch_size // sizes.step.gradient_accumulation_steps
            raise DSMoEError(f"{error}: devices must be a power of two up to {most}, got {devices}") from None
        slow, fast = (sizes.steps * one.seconds / 3600 for one in plan.estimates)
        memory = f"{plan.bytes / _GB:.1f} GB{'' if plan.fits else ' !'}"
        parameters = count_parameters(model).total / 1e6
        lines.append(f"{name:<14}{f'{parameters:.1f}M':>12}{memory:>12}{f'{fast:.1f} to {slow:.1f}':>24}")
    return "\n".join(lines)
