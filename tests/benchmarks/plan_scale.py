"""`python -m tests.benchmarks.plan_scale` prints the tables of `dsmoe_jax/plan/README.md`, 8 to 4,096 GPUs.

Training: the fastest candidate of `dsmoe plan --search` by estimate, 4,096 sequences of 4,096 tokens per step. Serving:
bf16 weights and cache, expert parallelism in a node, the longest batch of 4,096 tokens that fits.
"""

import collections
import dataclasses
from typing import Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.plan.cards import CARDS
from dsmoe_jax.plan.generation import GenerationPlan
from dsmoe_jax.plan.search import search
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.recipes import RECIPES

CARD: Final = "h100"
BATCH: Final = 4096
SERVING: Final = (("deepseek_moe_16b", 1), ("deepseek_moe_16b", 8), ("deepseek_moe_145b", 8), ("deepseek_moe_145b", 64))


def main() -> None:
    """Print both tables."""
    print("| model | GPUs | data × fsdp × expert × tensor | micro-batch, remat | GB per GPU | GB communicated per step "
          "(all-gather, reduce-scatter, all-reduce, all-to-all) | s per step | MFU | bound by |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("deepseek_moe_16b", "deepseek_moe_145b"):
        for power in range(3, 13):
            print(training_row(name, 2**power), flush=True)
    print("\n| model | GPUs | outputs at once | GB per GPU | decode tok/s | prefill tok/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, devices in SERVING:
        print(serving_row(name, devices), flush=True)


def training_row(name: str, devices: int) -> str:
    """Return a row of the first table."""
    recipe = RECIPES[name]()
    config = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_size=BATCH))
    found = search(config, config.model_config(), devices, CARDS[CARD])
    label = f"{name.removeprefix('deepseek_moe_').upper()} | {devices:,}"
    if not found.fitting:
        plan = found.smallest
        axes = " × ".join(map(str, plan.work.mesh.shape.values()))
        return f"| {label} | {axes} | | {plan.bytes / 1e9:.0f}: does not fit | | | | |"
    plan, sizes = found.fitting[0], collections.Counter()
    for one in plan.traffic:
        sizes[one.kind] += one.bytes
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    axes, work, (slow, fast) = " × ".join(map(str, plan.work.mesh.shape.values())), plan.work, plan.speed.step
    bound = " or ".join(dict.fromkeys(one.bound for one in reversed(plan.estimates)))
    return (
        f"| {label} | {axes} | {work.rows} × {work.parts}, {work.config.step.remat} | {plan.bytes / 1e9:.0f} "
        f"| {', '.join(f'{sizes[kind] / 1e9:.0f}' for kind in kinds)} | {fast:.3g} to {slow:.3g} "
        f"| {plan.speed.mfu[0]:.0%} to {plan.speed.mfu[1]:.0%} | {bound} |"
    )


def serving_row(name: str, devices: int) -> str:
    """Return a row of the second table."""
    model, card = ModelConfig.preset(name), CARDS[CARD]
    mesh = MeshConfig(data=-1, fsdp=1, expert=min(devices, 8))
    batch = GenerationPlan.of(model, mesh, devices, card, batch_size=devices).longest // devices * devices
    plan = GenerationPlan.of(model, mesh, devices, card, batch_size=max(batch, devices))
    label = f"{name.removeprefix('deepseek_moe_').upper()} | {devices:,}"
    if not plan.fits:
        return f"| {label} | | {plan.memory.total / 1e9:.0f}: does not fit | | |"
    rates = (f"{low:,.0f} to {high:,.0f}" for low, high in (plan.decode, plan.prefill))
    return f"| {label} | {plan.batch_size:,} | {plan.memory.total / 1e9:.0f} | {' | '.join(rates)} |"


if __name__ == "__main__":
    main()
