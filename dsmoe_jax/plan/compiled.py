"""Programs compiled for devices that are simulated or absent. Start at `compile_plan`, the training step."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import base_config, make_plan
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.model import abstract
from dsmoe_jax.plan import absent_gpu
from dsmoe_jax.plan.hlo import Collective, collectives
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.plan.workload import optimizer_of
from dsmoe_jax.quantize import kind_of, quantized_spec
from dsmoe_jax.sharding import MeshConfig, make_mesh, sharding
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.step import Trainable, init_state, make_step, state_shardings


class Compiled(NamedTuple):
    """What XLA plans for a program.

    Attributes:
        seconds: Time of lowering and compilation.
        arguments: Bytes of the arguments on a device.
        temporaries: Bytes of temporaries on a device.
        collectives: The communication.
        text: The program.
    """

    seconds: float
    arguments: int
    temporaries: int
    collectives: list[Collective]
    text: str


def compile_plan(plan: TrainingPlan, card: str) -> Compiled:
    """Compile the step of a plan; otherwise as `compile_for`."""
    work, batch = plan.work, (plan.work.sequences, plan.work.length)
    lower = lambda mesh: lower_step(work.config, work.model, mesh, batch, dtype=work.dtype)  # noqa: E731
    return compile_for(card, work.mesh, lower)


def compile_for(card: str, axes: AbstractMesh, lower: Callable[[Mesh | None], Any]) -> Compiled:
    """Compile a program for simulated devices (`cpu`), or for GPUs that are absent.

    Args:
        card: A key of `cards.CARDS`.
        axes: The mesh.
        lower: Lowers the program for devices; None: the default device.

    Raises:
        DSMoEError: As `mesh_of_card`.
    """
    mesh, started = mesh_of_card(card, axes), time.perf_counter()
    with contextlib.nullcontext() if card == "cpu" else absent_gpu.chosen_as_on_gpu():
        program = lower(mesh).compile()
    memory, text = program.memory_analysis(), program.as_text()
    seconds, found = time.perf_counter() - started, collectives(text, axes.shape)
    return Compiled(seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes, found, text)


def mesh_of_card(card: str, axes: AbstractMesh) -> Mesh | None:
    """Return the devices to compile for; None: the default device.

    Args:
        card: A key of `cards.CARDS`.
        axes: The mesh, without devices.

    Raises:
        DSMoEError: There are fewer simulated devices, or jax cannot compile for the card.
    """
    sizes = MeshConfig(*axes.shape.values())
    if card != "cpu":
        return make_mesh(sizes, absent_gpu.devices(card, axes.size))
    if len(jax.devices()) < axes.size:
        flag = "XLA_FLAGS=--xla_force_host_platform_device_count"
        raise DSMoEError(f"{axes.size} simulated devices need {flag}={axes.size}, got {len(jax.devices())}")
    return None if axes.size == 1 else make_mesh(sizes, jax.devices()[: axes.size])


def lower_step(
    config: RunConfig, model: ModelConfig, mesh: Mesh | None, batch: tuple[int, int], *, dtype: Any = jnp.bfloat16
) -> Any:
    """Lower the training step of a run without allocating anything.

    Args:
        config: The run; fine-tuning with `lora` has a frozen base.
        model: The model.
        mesh: The devices; None: the default device.
        batch: Sequences of the global batch, tokens per sequence.
        dtype: Storage dtype of a frozen base.

    Returns:
        The lowered step.
    """
    trainable, frozen = Trainable.all_params(model), {}
    if adapter := getattr(config, "lora", None):
        plan = make_plan(adapter, model)
        model = base_config(plan, model)
        scheme = getattr(config, "quantize", None)
        frozen = abstract_params(model, mesh, lambda name: (dtype, scheme if kind_of(name) else None))
        attach = lambda own, frozen, key: lora.attach(plan, frozen, own, key)  # noqa: E731
        trainable = Trainable(lora.specs(plan, model), attach, adapter.lora_dropout)
    optimizer, schedule = optimizer_of(config)
    places = state_shardings(model, optimizer, config.step, mesh, trainable)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in trainable.specs.items()}
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda params: init_state(model, params, optimizer, config.step), params),
        places,
    )
    rows = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=sharding("batch", batch, ("batch", None), mesh))
    inputs = (state, Batch(rows, rows, rows, rows), frozen)
    graph = abstract(model, config.dispatch)[0]
    options: dict[str, Any] = {"mesh": mesh, "max_grad_norm": config.optimizer.max_grad_norm, "trainable": trainable}
    step: Any = make_step(model, graph, optimizer, schedule, config.step, **options)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return step.lower(*inputs)


def abstract_params(
    config: ModelConfig, mesh: Mesh | None, stored: Callable[[str], tuple[Any, str | None]]
) -> dict[str, Operand]:
    """Return parameters as `load_params` places them: dense, or quantized and sharded over experts alone.

    Args:
        config: The model.
        mesh: The devices; None: the default device.
        stored: Returns the dtype of a parameter and its quantization.
    """

    def put(axes: tuple[str | None, ...], name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(name, leaf.shape, axes, mesh))

    found: dict[str, Any] = {}
    for name, spec in abstract(config)[1].items():
        dtype, scheme = stored(name)
        if scheme is None:
            found[name] = put(spec.axes, name, jax.ShapeDtypeStruct(spec.shape, dtype))
            continue
        stacked = ("experts",) * (len(spec.shape) == 3)
        place = lambda leaf, name=name, stacked=stacked: put(  # noqa: E731
            (*stacked, *(None,) * (leaf.ndim - len(stacked))), name, leaf
        )
        found[name] = jax.tree.map(place, quantized_spec(spec.shape, scheme))
    return found
