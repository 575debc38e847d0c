"""`python -m tests.benchmarks.abstract` compiles train steps of the 16B and the 145B ahead of time, without devices.

No parameters are allocated. Prints compile times, bytes per device and temporaries, compiled and by `dsmoe plan`'s
arithmetic, for simulated CPUs, or with `--card` for GPUs (see `plan.absent_gpu`), with the predicted time of a step
(`predicted`). Pretraining recipes are compiled for
fsdp 8 x expert 8, fine-tuning recipes for the devices in their name.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import contextlib
import dataclasses
import time
from typing import Any, Final, NamedTuple

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.plan import absent_gpu
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.compiled import lower_step
from dsmoe_jax.plan.memory import temporaries
from dsmoe_jax.plan.workload import Workload
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.recipes import FINETUNING, RECIPES
from tests.benchmarks.predicted import predict

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
    wide = make_mesh(
        MeshConfig(data=1, fsdp=8, expert=8), jax.devices() if card is None else absent_gpu.devices(card, 64)
    )
    eight = make_mesh(few, jax.devices()[:8] if card is None else absent_gpu.devices(card, 8))
    # On CPU one device has no mesh; to compile for an absent GPU, its device must be given.
    one = None if card is None else make_mesh(MeshConfig(), absent_gpu.devices(card, 1))
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
    parser.add_argument("--card", choices=absent_gpu.DESCRIPTIONS, help="compile for GPUs of this kind")
    args = parser.parse_args()
    known = cases(args.card)
    for recipe in args.recipes:
        if recipe not in known:
            parser.error(f"RECIPE {recipe!r} does not exist, only {', '.join(known)}")
    for recipe in args.recipes or known:
        with contextlib.nullcontext() if args.card is None else absent_gpu.chosen_as_on_gpu():
            print(recipe, compiled(known[recipe], args.card), flush=True)


def compiled(case: Case, card: str | None = None) -> dict[str, Any]:
    """Compile a recipe's step; return seconds, bytes and, for a GPU, the predicted time of the step."""
    step = dataclasses.replace(case.run.step, gradient_accumulation_steps=2)
    run, devices = dataclasses.replace(case.run, step=step), 1 if case.mesh is None else case.mesh.size
    batch = (devices * step.gradient_accumulation_steps, case.tokens)
    started = time.perf_counter()
    with _BLOCKS_APART if card is None else contextlib.nullcontext():
        lowered = lower_step(run, case.model, case.mesh, batch)
    lowering = time.perf_counter() - started
    program = lowered.compile()
    memory = program.memory_analysis()
    data = dataclasses.replace(run.data, sequence_length=case.tokens, batch_size=batch[0])
    mesh = MeshConfig() if case.mesh is None else MeshConfig(*case.mesh.shape.values())
    work = Workload.of(dataclasses.replace(run, data=data, mesh=mesh), case.model, devices)
    prediction = {}
    if card is not None and case.mesh is not None:
        prediction = predict(program.as_text(), CARDS[card], case.mesh.shape).row()
    return {
        "lowering_seconds": round(lowering, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "by_arithmetic": work.argument_bytes(),
        "temporary_bytes": memory.temp_size_in_bytes,
        **prediction,
        "estimated": sum(temporaries(work, "cpu" if card is None else "gpu").values()),
    }


if __name__ == "__main__":
    main()
