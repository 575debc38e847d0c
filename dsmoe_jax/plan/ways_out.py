"""What makes room for a run that fits on no mesh: `ways_out`."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.plan.search import plans_of
from dsmoe_jax.plan.training import TrainingPlan

_TIMES_DEVICES: Final = (2, 4, 8, 16, 32, 64)
_SHORTEST: Final = 128  # tokens of a sequence
_WORTH_SAYING: Final = 0.1  # of the memory that is missing


class WayOut(NamedTuple):
    """A changed setting, and the plan with the least memory that a search with it finds."""

    flags: str
    plan: TrainingPlan


def ways_out(config: Any, model: ModelConfig, smallest: TrainingPlan) -> list[WayOut]:
    """Search again with one setting changed at a time.

    Args:
        config: The run.
        model: The model to train.
        smallest: Of all candidates, the one with the least memory.

    Returns:
        The changes with which the run fits; if there are none, those that save a part of the memory that is missing.
    """
    tried = [way for change in _changes(config, smallest) if (way := _first_that_fits(model, smallest, change))]
    missing = smallest.bytes - smallest.card.usable
    helpful = [way for way in tried if smallest.bytes - way.plan.bytes >= _WORTH_SAYING * missing]
    return [way for way in helpful if way.plan.fits] or helpful


class _Setting(NamedTuple):
    flags: str
    config: Any
    devices: int


def _changes(config: Any, smallest: TrainingPlan) -> Iterator[Sequence[_Setting]]:
    """Yield the values to try of each setting, the mildest first."""
    devices, length = smallest.work.mesh.size, smallest.work.length
    if config.optimizer.moments != "factored":
        optimizer = dataclasses.replace(config.optimizer, moments="factored")
        yield [_Setting("--optimizer.moments factored", dataclasses.replace(config, optimizer=optimizer), devices)]
    if hasattr(config, "lora") and config.lora is None and not config.step.scan_layers:
        yield [_Setting("--lora", dataclasses.replace(config, lora=LoraConfig()), devices)]
    if getattr(config, "quantize", None) is not None:
        yield [_Setting("", dataclasses.replace(config, quantize=None), devices)]
    if smallest.card.platform != "cpu":  # simulated devices share the memory
        yield [_Setting(f"--devices {devices * n}", config, devices * n) for n in _TIMES_DEVICES]
    yield [
        _Setting(
            f"--data.sequence-length {short}",
            dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=short)),
            devices,
        )
        for short in [length >> n for n in range(1, length.bit_length()) if length >> n >= _SHORTEST]
    ]


def _first_that_fits(model: ModelConfig, smallest: TrainingPlan, values: Sequence[_Setting]) -> WayOut | None:
    """Return the first value that fits, or else the first that can be planned."""
    found: list[WayOut] = []
    for flags, changed, devices in values:
        try:
            plans = plans_of(changed, model, devices, smallest.card, dtype=smallest.work.dtype, lean=True)
        except DSMoEError:
            continue
        if plans:
            plan = min(plans, key=_preference)
            scheme = "" if plan.work.scheme == smallest.work.scheme else f" --quantize {plan.work.scheme}"
            found.append(WayOut(f"{flags}{scheme}".strip(), plan))
            if plan.fits:
                break
    return found[-1] if found and found[-1].plan.fits else next(iter(found), None)


def _preference(plan: TrainingPlan) -> tuple[bool, bool, int]:
    """Order by what fits, without quantization first, then by memory."""
    return not plan.fits, plan.fits and plan.work.scheme is not None, plan.bytes
