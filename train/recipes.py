"""Whole runs, as functions that return their config; `dsmoe pretrain NAME` starts from one. See `RECIPES`."""

from collections.abc import Callable
from typing import Final

from dsmoe_jax.sharding import MeshConfig

from .config import CheckpointConfig, DataConfig, RunConfig
from .optimizer import OptimizerConfig
from .step import StepConfig


def tiny() -> RunConfig:
    """4.5 M parameters on the standard library's sources: four minutes on two CPU cores, loss 2.8 at the end."""
    return RunConfig(
        out="runs/tiny",
        model="tiny",
        steps=1000,
        data=DataConfig(sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50),
        checkpoints=CheckpointConfig(every=250),
    )


def bench() -> RunConfig:
    """The 271 M parameters of `tests/benchmarks`: hours on a CPU, minutes on a GPU."""
    return RunConfig(
        out="runs/bench",
        model="bench",
        steps=10_000,
        data=DataConfig(sequence_length=1024, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=6e-4, schedule="cosine", warmup_steps=500),
        step=StepConfig(compute_dtype="bfloat16"),
    )


def deepseek_moe_2b() -> RunConfig:
    """The paper's 2B (arXiv 2401.06066, section 4): 100 B tokens in 25,000 steps of 2,048 rows of 2,048."""
    return RunConfig(
        out="runs/deepseek_moe_2b",
        model="deepseek_moe_2b",
        steps=25_000,
        data=DataConfig(sources=("data",), sequence_length=2048, batch_size=2048),
        optimizer=OptimizerConfig(learning_rate=1.08e-3),
        step=StepConfig(compute_dtype="bfloat16", accumulation=8, remat="dots"),
    )


def deepseek_moe_16b() -> RunConfig:
    """The paper's 16B (section 5): 2 T tokens in 106,449 steps of 4,608 rows of 4,096, no expert parallelism."""
    return RunConfig(
        out="runs/deepseek_moe_16b",
        model="deepseek_moe_16b",
        steps=106_449,
        data=DataConfig(sources=("data",), sequence_length=4096, batch_size=4608),
        optimizer=OptimizerConfig(learning_rate=4.2e-4),
        step=StepConfig(compute_dtype="bfloat16", accumulation=9, remat="full"),
        mesh=MeshConfig(fsdp=-1),
    )


def deepseek_moe_145b() -> RunConfig:
    """The paper's 145B (section 7): 245 B tokens in 13,000 steps, experts over 4 devices, a device-level loss."""
    return RunConfig(
        out="runs/deepseek_moe_145b",
        model="deepseek_moe_145b",
        steps=13_000,
        data=DataConfig(sources=("data",), sequence_length=4096, batch_size=4608),
        optimizer=OptimizerConfig(learning_rate=3.0e-4, schedule="constant"),
        step=StepConfig(compute_dtype="bfloat16", accumulation=9, remat="full", device_groups=4, device_alpha=0.05),
        mesh=MeshConfig(fsdp=-1, expert=4),
    )


RECIPES: Final[dict[str, Callable[[], RunConfig]]] = {
    recipe.__name__: recipe for recipe in (tiny, bench, deepseek_moe_2b, deepseek_moe_16b, deepseek_moe_145b)
}
