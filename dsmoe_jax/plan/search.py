"""Search for the fastest mesh, micro-batch, remat policy and quantization that fit: `search`."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax.numpy as jnp

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.plan.workload import Parameters
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import RunConfig

_REMAT: Final = ("none", "dots", "full")
_WIDEST_TENSOR: Final = 8  # its sums of activations need links of a node
_MOST_PARTS: Final = 8  # micro-batch sizes to try: powers of two sequences


class Found(NamedTuple):
    """The result of a search."""

    fitting: tuple[TrainingPlan, ...]  # the fastest first
    smallest: TrainingPlan  # of all candidates, the one with the least memory


def search(config: RunConfig, model: ModelConfig, devices: int, card: Card, *, dtype: Any = jnp.bfloat16) -> Found:
    """Plan all candidates.

    Args:
        config: The run; its mesh, micro-batches and remat policy are replaced, and the quantization of adapters' base.
        model: The model to train.
        devices: Number of devices.
        card: The device.
        dtype: Storage dtype of a frozen base.

    Returns:
        Those that fit, by estimated time, and the one that needs the least memory.

    Raises:
        DSMoEError: No mesh divides the devices, the model and the batch.
    """
    parameters, plans = Parameters.of(config, model), []
    for candidate in _candidates(config, model, devices):
        try:
            plans.append(TrainingPlan.of(candidate, model, devices, card, parameters=parameters, dtype=dtype))
        except DSMoEError:  # does not divide
            continue
    if not plans:
        raise DSMoEError(
            f"no mesh of {devices} devices divides the model and a batch of {config.data.batch_size} sequences"
        )
    return Found(
        tuple(sorted((plan for plan in plans if plan.fits), key=_rank)), min(plans, key=lambda plan: plan.bytes)
    )


def _rank(plan: TrainingPlan) -> tuple[float, bool, int]:
    """Order by time, then unquantized and large micro-batches first."""
    return math.prod(plan.speed.step), plan.work.scheme is not None, -plan.work.rows


def flags(plan: TrainingPlan) -> str:
    """Return a plan's choices as flags of `dsmoe pretrain` and `dsmoe finetune`."""
    work = plan.work
    axes = " ".join(f"--mesh.{axis} {size}" for axis, size in work.mesh.shape.items())
    quantize = "" if work.scheme is None else f" --quantize {work.scheme}"
    return f"{axes} --step.gradient-accumulation-steps {work.parts} --step.remat {work.config.step.remat}{quantize}"


def _candidates(config: RunConfig, model: ModelConfig, devices: int) -> Iterator[RunConfig]:
    batch = config.data.batch_size
    for mesh in _meshes(model, devices):
        data_parallel = devices // mesh.tensor
        rows = None if batch is None else batch // data_parallel
        parts = _parts(config, rows)
        for count, remat, others in itertools.product(parts, _REMAT, _quantizations(config)):
            step = dataclasses.replace(config.step, gradient_accumulation_steps=count, remat=remat)
            yield dataclasses.replace(config, mesh=mesh, step=step, **others)


def _quantizations(config: RunConfig) -> Sequence[Mapping[str, str]]:
    """Return the fields of quantizations of a frozen base, none first; only that of the run if it has one."""
    if getattr(config, "lora", None) is None or getattr(config, "quantize", None) is not None:
        return [{}]
    return [{}, {"quantize": "int8"}, {"quantize": "nf4"}]


def _parts(config: RunConfig, rows: int | None) -> Sequence[int]:
    """Return numbers of micro-batches, for 1, 2, 4, … sequences per device."""
    if not rows:
        return [config.step.gradient_accumulation_steps]
    sizes = [size for size in _divisors(rows) if not size & (size - 1)] or [1]
    return [rows // size for size in sizes[:_MOST_PARTS]]


def _meshes(model: ModelConfig, devices: int) -> Iterator[MeshConfig]:
    experts = model.n_routed_experts or 1
    for tensor, expert in itertools.product(_divisors(math.gcd(devices, _WIDEST_TENSOR)), _divisors(experts)):
        if model.num_kv_heads % tensor or devices % (tensor * expert):
            continue
        rest = devices // (tensor * expert)
        for fsdp in _divisors(rest):
            if model.hidden_size % fsdp == 0:
                yield MeshConfig(data=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
