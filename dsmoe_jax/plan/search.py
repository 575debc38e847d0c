"""Search for the fastest mesh, micro-batch, remat policy and quantization that fit: `search`."""

import contextlib
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
from dsmoe_jax.plan.workload import UNLIMITED, Parameters
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.shape import fit_batch_size

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
    plans = plans_of(config, model, devices, card, dtype=dtype)
    if not plans:
        raise DSMoEError(_no_mesh(config, model, devices, card))
    return Found(
        tuple(sorted((plan for plan in plans if plan.fits), key=_rank)), min(plans, key=lambda plan: plan.bytes)
    )


def plans_of(
    config: RunConfig,
    model: ModelConfig,
    devices: int,
    card: Card,
    *,
    dtype: Any = jnp.bfloat16,
    lean: bool = False,
) -> list[TrainingPlan]:
    """Return the plans of the candidates that divide; otherwise as `search`.

    Args:
        config: The run.
        model: The model to train.
        devices: Number of devices.
        card: The device.
        dtype: Storage dtype of a frozen base.
        lean: Only those of small micro-batches and full remat, which need the least memory.
    """
    parameters, plans = Parameters.of(config, model), []
    for candidate in _candidates(config, model, devices, lean=lean):
        with contextlib.suppress(DSMoEError):  # does not divide
            plans.append(TrainingPlan.of(candidate, model, devices, card, parameters=parameters, dtype=dtype))
    return plans


def _no_mesh(config: RunConfig, model: ModelConfig, devices: int, card: Card) -> str:
    """Describe that there is no candidate, with the nearest batch size for which there is one."""
    text, batch = f"no mesh of {devices} devices divides the model", config.data.batch_size
    if batch is None:
        return text
    ways = {devices // mesh.tensor for mesh in _meshes(model, devices)}
    for size in sorted({max(1, round(batch / some)) * some for some in ways}, key=lambda size: abs(size - batch)):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))
        if plans_of(changed, model, devices, card, lean=True):
            return f"{text} and a batch of {batch} sequences; one does with --data.batch-size {size}"
    return text


def _rank(plan: TrainingPlan) -> tuple[float, bool, int]:
    """Order by time, then unquantized and large micro-batches first."""
    return math.prod(plan.speed.step), plan.work.scheme is not None, -plan.work.rows


def flags(plan: TrainingPlan) -> str:
    """Return a plan's choices as flags of `dsmoe pretrain` and `dsmoe finetune`."""
    work = plan.work
    axes = " ".join(f"--mesh.{axis} {size}" for axis, size in work.mesh.shape.items())
    quantize = "" if work.scheme is None else f" --quantize {work.scheme}"
    return f"{axes} --step.gradient-accumulation-steps {work.parts} --step.remat {work.config.step.remat}{quantize}"


def _candidates(config: RunConfig, model: ModelConfig, devices: int, *, lean: bool) -> Iterator[RunConfig]:
    batch, remats = config.data.batch_size or fit_batch_size(UNLIMITED, 1), _REMAT[-1:] if lean else _REMAT
    for mesh in _meshes(model, devices):
        parts = _parts(config, batch // (devices // mesh.tensor))[: 1 if lean else None]
        for count, remat, others in itertools.product(parts, remats, _quantizations(config)):
            step = dataclasses.replace(config.step, gradient_accumulation_steps=count, remat=remat)
            yield dataclasses.replace(config, mesh=mesh, step=step, **others)


def _quantizations(config: RunConfig) -> Sequence[Mapping[str, str]]:
    """Return the fields of quantizations of a frozen base, none first; only that of the run if it has one."""
    if getattr(config, "lora", None) is None or getattr(config, "quantize", None) is not None:
        return [{}]
    return [{}, {"quantize": "int8"}, {"quantize": "nf4"}]


def _parts(config: RunConfig, rows: int) -> Sequence[int]:
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
