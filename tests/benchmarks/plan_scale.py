"""`python -m tests.benchmarks.plan_scale` prints the tables of `dsmoe_jax/plan/README.md`, 8 to 4,096 GPUs.

Training: the fastest candidate of `dsmoe plan --search` by estimate, 4,096 sequences of 4,096 tokens per step. Serving:
bf16 weights and cache, expert parallelism, as many outputs of 4,096 tokens as fit; first one node of each card, then
several nodes of H100s.
"""

import collections
import dataclasses
import functools
from typing import Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.generation import GenerationPlan
from dsmoe_jax.plan.search import search
from dsmoe_jax.progress import plural
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.recipes import RECIPES

CARD: Final = "h100"
BATCH: Final = 4096
LENGTH: Final = 4096  # tokens of an output
SERVING: Final = {"deepseek_moe_16b": (1, 2, 4, 8), "deepseek_moe_145b": (8,)}  # GPUs of a node
NODES: Final = {"deepseek_moe_16b": (8, 16, 64, 512), "deepseek_moe_145b": (8, 16, 64, 512)}


def main() -> None:
    """Print the tables."""
    _training()
    _serving()


def _training() -> None:
    print("| model | GPUs | data × fsdp × expert × tensor | micro-batch, remat | GB per GPU | GB communicated per step "
          "(all-gather, reduce-scatter, all-reduce, all-to-all) | s per step | MFU | bound by |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("deepseek_moe_16b", "deepseek_moe_145b"):
        for power in range(3, 13):
            print(training_row(name, 2**power), flush=True)


def _serving() -> None:
    for name, counts in SERVING.items():
        print(f"\n| {label(name)} | {' | '.join(plural(count, 'GPU') for count in counts)} |")
        print("| --- |" + " --- |" * len(counts))
        for card in CARDS:
            if CARDS[card].platform == "gpu":
                print(f"| {card} | {' | '.join(serving_cell(name, card, count) for count in counts)} |", flush=True)
    print("\n| model | GPUs | data × fsdp × expert × tensor | outputs at once | GB per GPU | decode tok/s | bound by |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, counts in NODES.items():
        for devices in counts:
            for expert in sorted({8, min(devices, 64)}):
                print(nodes_row(name, devices, expert), flush=True)


def label(name: str) -> str:
    """Return the short name of a preset."""
    return name.removeprefix("deepseek_moe_").upper()


def served(name: str, card: str, devices: int, expert: int, quantize: str | None = None) -> GenerationPlan:
    """Return the plan of the largest batch that fits."""
    model, mesh = ModelConfig.preset(name), MeshConfig(data=-1, fsdp=1, expert=expert)
    plan = functools.partial(GenerationPlan.of, model, mesh, devices, CARDS[card], max_length=LENGTH, quantize=quantize)
    return plan(batch_size=max(plan(batch_size=devices).longest // devices * devices, devices))


def serving_cell(name: str, card: str, devices: int) -> str:
    """Return outputs at once and the range of decoded tokens per second; int8 weights if bf16 does not fit."""
    for quantize in (None, "int8"):
        plan = served(name, card, devices, devices, quantize)
        if plan.fits:
            low, high = plan.decode
            return f"{plan.batch_size:,}: {low:,.0f} to {high:,.0f}{f' ({quantize})' if quantize else ''}"
    return f"{plan.memory.total / 1e9:.0f} GB: does not fit"


def nodes_row(name: str, devices: int, expert: int) -> str:
    """Return a row of several nodes."""
    plan = served(name, CARD, devices, expert)
    axes, (low, high) = " × ".join(map(str, plan.mesh.shape.values())), plan.decode
    head = f"| {label(name)} | {devices:,} | {axes} | {plan.batch_size:,} | {plan.memory.total / 1e9:.0f}"
    return f"{head} | {low:,.0f} to {high:,.0f} | {' or '.join(plan.bounds)} |"


def training_row(name: str, devices: int) -> str:
    """Return a row of the first table."""
    recipe = RECIPES[name]()
    config = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_size=BATCH))
    found = search(config, config.model_config(), devices, CARDS[CARD])
    row = f"| {label(name)} | {devices:,}"
    if not found.fitting:
        plan = found.smallest
        axes = " × ".join(map(str, plan.work.mesh.shape.values()))
        return f"{row} | {axes} | | {plan.bytes / 1e9:.0f}: does not fit | | | | |"
    plan, sizes = found.fitting[0], collections.Counter()
    for one in plan.traffic:
        sizes[one.kind] += one.bytes
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    axes, work, (slow, fast) = " × ".join(map(str, plan.work.mesh.shape.values())), plan.work, plan.speed.step
    bound = " or ".join(dict.fromkeys(one.bound for one in reversed(plan.estimates)))
    return (
        f"{row} | {axes} | {work.rows} × {work.parts}, {work.config.step.remat} | {plan.bytes / 1e9:.0f} "
        f"| {', '.join(f'{sizes[kind] / 1e9:.0f}' for kind in kinds)} | {fast:.3g} to {slow:.3g} "
        f"| {plan.speed.mfu[0]:.0%} to {plan.speed.mfu[1]:.0%} | {bound} |"
    )


if __name__ == "__main__":
    main()
