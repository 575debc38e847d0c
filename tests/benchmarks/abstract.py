"""`python -m tests.benchmarks.abstract` compiles train steps of the 16B and the 145B ahead of time, without devices.

No parameters are allocated. Prints compile times, bytes per device and temporaries, compiled and by `dsmoe plan`'s
arithmetic, for simulated CPUs, or with `--card` for GPUs (see `plan.absent_gpu`), with the predicted time of a step
(`predicted`). Pretraining recipes are compiled for fsdp 8 x expert 8, fine-tuning recipes for the devices they name.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import contextlib
import dataclasses
from typing import Any, Final, NamedTuple

from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.plan import absent_gpu
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.compiled import compile_for, lower_step
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.recipes import FINETUNING, RECIPES
from tests.benchmarks.predicted import predict

# XLA:CPU schedules each function in superlinear time: the 145B takes over 15 minutes in one function, 3 by block. Only
# for compilation: on simulated devices, collectives in nested functions would deadlock on the thread pool.
_BLOCKS_APART: Final = set_xla_metadata(inlineable="false")


class Case(NamedTuple):
    """A step to compile: two micro-batches of one sequence per device."""

    mesh: MeshConfig
    devices: int
    tokens: int  # per sequence


_WIDE: Final = MeshConfig(fsdp=8, expert=8)
CASES: Final[dict[str, Case]] = {
    "deepseek_moe_16b": Case(_WIDE, 64, 4096),
    "deepseek_moe_145b": Case(_WIDE, 64, 4096),
    "full_8x40gb": Case(MeshConfig(fsdp=8), 8, 1024),
    "lora_1x80gb": Case(MeshConfig(), 1, 1024),
    "qlora_1x80gb": Case(MeshConfig(), 1, 1024),
}


def main() -> None:
    """Print one line per recipe."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.abstract", description=(__doc__ or "").strip())
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default all")
    parser.add_argument("--card", choices=absent_gpu.DESCRIPTIONS, help="compile for GPUs of this kind")
    args = parser.parse_args()
    for recipe in args.recipes:
        if recipe not in CASES:
            parser.error(f"RECIPE {recipe!r} does not exist, only {', '.join(CASES)}")
    for recipe in args.recipes or CASES:
        print(recipe, compiled(recipe, args.card or "cpu"), flush=True)


def planned(recipe: str, card: str) -> TrainingPlan:
    """Return the plan of a recipe's case for a card."""
    case, run = CASES[recipe], {**RECIPES, **FINETUNING}[recipe]()
    model = run.model_config() if recipe in RECIPES else ModelConfig.preset("deepseek_moe_16b")
    step = dataclasses.replace(run.step, gradient_accumulation_steps=2)
    data = dataclasses.replace(run.data, sequence_length=case.tokens, batch_size=2 * case.devices)
    run = dataclasses.replace(run, step=step, data=data, mesh=case.mesh)
    return TrainingPlan.of(run, model, case.devices, CARDS[card])


def compiled(recipe: str, card: str) -> dict[str, Any]:
    """Compile a recipe's step; return seconds, bytes and, for a GPU, the predicted time."""
    plan, apart = planned(recipe, card), _BLOCKS_APART if card == "cpu" else contextlib.nullcontext()

    def lower(mesh: Mesh | None) -> Any:
        with apart:
            return lower_step(plan.work.config, plan.work.model, mesh, (plan.work.sequences, plan.work.length))

    found = compile_for(card, plan.work.mesh, lower)
    return {
        "seconds": round(found.seconds, 1),
        "argument_bytes": found.arguments,
        "by_arithmetic": plan.arguments,
        "temporary_bytes": found.temporaries,
        "estimated": plan.temporaries,
        **({} if card == "cpu" else predict(found.text, CARDS[card], plan.work.mesh.shape).row()),
    }


if __name__ == "__main__":
    main()
