"""`python -m tests.benchmarks.abstract` compiles the train step of the 16B and the 145B for 64 simulated devices.

Nothing is allocated but the program. It shows that the step compiles in minutes on a large mesh, that each device is
given the bytes that arithmetic says, and what temporaries the compiler plans (for CPUs: on GPUs other kernels run).
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from dsmoe_jax.model import abstract
from dsmoe_jax.sharding import MeshConfig, make_mesh, sharding
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.optimizer import make_optimizer
from dsmoe_jax.train.recipes import RECIPES
from dsmoe_jax.train.step import init_state, make_step, state_shardings

MESH = MeshConfig(data=1, fsdp=8, expert=8)


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.abstract", description=(__doc__ or "").strip())
    parser.add_argument("recipes", nargs="*", default=["deepseek_moe_16b", "deepseek_moe_145b"])
    parser.add_argument("--tokens", type=int, default=4096, help="of a row; one row a device and micro-batch")
    asked = parser.parse_args()
    for recipe in asked.recipes:
        print(recipe, compiled(recipe, asked.tokens), flush=True)


def compiled(recipe: str, tokens: int) -> dict[str, Any]:
    """Seconds and bytes of one recipe's step."""
    run = RECIPES[recipe]()
    config, mesh = run.model_config(), make_mesh(MESH)
    options = dataclasses.replace(run.step, accumulation=2)
    optimizer, schedule = make_optimizer(run.optimizer, run.steps)
    places = state_shardings(config, optimizer, options, mesh)
    graph, specs = abstract(config)
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda params: init_state(config, params, optimizer, options), params),
        places,
    )
    shape = (64 * options.accumulation, tokens)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding("batch", shape, ("batch", None), mesh))
    batch = Batch(rows, rows, rows, rows)
    step = make_step(config, graph, optimizer, schedule, options, mesh=mesh)
    with jax.set_mesh(mesh):
        started = time.perf_counter()
        lowered = step.lower(state, batch)  # type: ignore[attr-defined]
        lowering = time.perf_counter() - started
        program = lowered.compile()
    memory = program.memory_analysis()
    by_hand = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves((state, batch))
    )
    return {
        "lowering_seconds": round(lowering, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "by_arithmetic": by_hand,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main()
