"""`python -m tests.benchmarks.abstract` compiles train steps of the 16B and the 145B ahead of time, without devices.

No parameters are allocated. Prints compile times, bytes per device and temporaries for simulated CPUs, or with `--card`
for GPUs (see `cards`). Pretraining recipes are compiled for fsdp 8 x expert 8, fine-tuning recipes for the devices in
their name.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import contextlib
import dataclasses
import math
import time
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.model import abstract
from dsmoe_jax.quantize import kind_of, quantized_spec
from dsmoe_jax.sharding import MeshConfig, make_mesh, sharding
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.optimizer import make_optimizer
from dsmoe_jax.train.recipes import FINETUNING, RECIPES
from dsmoe_jax.train.step import Trainable, init_state, make_step, state_shardings
from tests.benchmarks import cards

# XLA:CPU schedules each function in superlinear time: the 145B takes over 15 minutes in one function, 3 by block. Only
# for compilation: on simulated devices, collectives in nested functions would deadlock on the thread pool.
_BLOCKS_APART: Final = set_xla_metadata(inlineable="false")


class Case(NamedTuple):
    """A step to compile."""

    run: RunConfig
    model: ModelConfig
    mesh: Mesh | None
    tokens: int  # per sequence; one sequence per device and micro-batch


def cases(card: str | None = None) -> dict[str, Case]:
    """Return the cases by recipe."""
    few, base = MeshConfig(fsdp=8), ModelConfig.preset("deepseek_moe_16b")
    wide = make_mesh(MeshConfig(data=1, fsdp=8, expert=8), jax.devices() if card is None else cards.devices(card, 64))
    eight = make_mesh(few, jax.devices()[:8] if card is None else cards.devices(card, 8))
    # On CPU one device has no mesh; to compile for an absent GPU, its device must be given.
    one = None if card is None else make_mesh(MeshConfig(), cards.devices(card, 1))
    found = {}
    for name in ("deepseek_moe_16b", "deepseek_moe_145b"):
        run = RECIPES[name]()
        found[name] = Case(run, run.model_config(), wide, 4096)
    for name, mesh in (("full_8x40gb", eight), ("lora_1x80gb", one), ("qlora_1x80gb", one)):
        found[name] = Case(FINETUNING[name](), base, mesh, 1024)
    return found


def main() -> None:
    """Print one line per recipe."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.abstract", description=(__doc__ or "").strip())
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default all")
    parser.add_argument("--card", choices=cards.CARDS, help="compile for GPUs of this kind")
    args = parser.parse_args()
    known = cases(args.card)
    for recipe in args.recipes:
        if recipe not in known:
            parser.error(f"RECIPE {recipe!r} does not exist, only {', '.join(known)}")
    for recipe in args.recipes or known:
        with contextlib.nullcontext() if args.card is None else cards.chosen_as_on_gpu():
            print(recipe, compiled(known[recipe], apart=args.card is None), flush=True)


def compiled(case: Case, *, apart: bool = True) -> dict[str, Any]:
    """Compile a recipe's step; return seconds and bytes. With `apart`, blocks are separate functions."""
    run, config, mesh, tokens = case
    options = dataclasses.replace(run.step, gradient_accumulation_steps=2)
    optimizer, schedule = make_optimizer(run.optimizer, max(run.steps, 100))
    trained, frozen = Trainable.all_params(config), {}
    if adapter := getattr(run, "lora", None):
        plan = make_plan(adapter, config)
        frozen = _frozen(config, getattr(run, "quantize", None), mesh)
        attach = lambda own, frozen, key: lora.attach(plan, frozen, own, key)  # noqa: E731
        trained = Trainable(lora.specs(plan, config), attach, adapter.lora_dropout)
    places = state_shardings(config, optimizer, options, mesh, trained)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in trained.specs.items()}
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda params: init_state(config, params, optimizer, options), params),
        places,
    )
    shape = ((1 if mesh is None else mesh.size) * options.gradient_accumulation_steps, tokens)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding("batch", shape, ("batch", None), mesh))
    inputs = (state, Batch(rows, rows, rows, rows), frozen)
    step = make_step(config, abstract(config)[0], optimizer, schedule, options, mesh=mesh, trainable=trained)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        started = time.perf_counter()
        with _BLOCKS_APART if apart else contextlib.nullcontext():
            lowered = step.lower(*inputs)  # type: ignore[attr-defined]
        lowering = time.perf_counter() - started
        program = lowered.compile()
    memory = program.memory_analysis()
    by_hand = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(inputs)
    )
    return {
        "lowering_seconds": round(lowering, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "by_arithmetic": by_hand,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def _frozen(config: ModelConfig, scheme: str | None, mesh: Mesh | None) -> dict[str, Any]:
    """Return the frozen base on one device, in bf16 or quantized."""
    place = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())
    found = {}
    for name, spec in abstract(config)[1].items():
        value: Any = jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
        if scheme is not None and kind_of(name):
            value = quantized_spec(spec.shape, scheme)
        found[name] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), value)
    return found


if __name__ == "__main__":
    main()
