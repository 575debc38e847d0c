"""Whole runs, as functions that return their config: `RECIPES` for `dsmoe pretrain`, `FINETUNING` for `finetune`."""

import dataclasses
from collections.abc import Callable
from typing import Final

from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.sharding import MeshConfig

from .config import CheckpointConfig, DataConfig, RunConfig
from .finetune import ExamplesConfig, FinetuneConfig
from .optimizer import OptimizerConfig
from .step import StepConfig


def tiny() -> RunConfig:
    """4.5 M parameters on the standard library's sources: three minutes on two CPU cores, held-out loss 3.5."""
    return RunConfig(
        out="runs/tiny",
        model="tiny",
        steps=1000,
        data=DataConfig(sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=50),
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
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=8, remat="dots"),
    )


def deepseek_moe_16b() -> RunConfig:
    """The paper's 16B (section 5): 2 T tokens in 106,449 steps of 4,608 rows of 4,096, no expert parallelism."""
    return RunConfig(
        out="runs/deepseek_moe_16b",
        model="deepseek_moe_16b",
        steps=106_449,
        data=DataConfig(sources=("data",), sequence_length=4096, batch_size=4608),
        optimizer=OptimizerConfig(learning_rate=4.2e-4),
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=9, remat="full"),
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
        step=StepConfig(
            compute_dtype="bfloat16", gradient_accumulation_steps=9, remat="full", device_groups=4, device_alpha=0.05
        ),
        mesh=MeshConfig(fsdp=-1, expert=4),
    )


RECIPES: Final[dict[str, Callable[[], RunConfig]]] = {
    recipe.__name__: recipe for recipe in (tiny, bench, deepseek_moe_2b, deepseek_moe_16b, deepseek_moe_145b)
}


# --- fine-tuning: the original's settings (its finetune.py and README), `init_from` to be filled in ---


def full_8x40gb() -> FinetuneConfig:
    """All weights of the 16B on eight GPUs of 40 GB: 64 rows of 1,024, the state split over all eight."""
    return FinetuneConfig(
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=8, remat="full"),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, schedule="cosine", warmup_steps=10, weight_decay=0.0, moments="factored"
        ),
        mesh=MeshConfig(fsdp=-1),
    )


def lora_1x80gb() -> FinetuneConfig:
    """Adapters of rank 8 on every projection of the 16B in bf16, on one GPU of 80 GB."""
    return FinetuneConfig(
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=16, remat="full"),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_steps=10, weight_decay=0.0, b2=0.999),
        lora=LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1),
    )


def qlora_1x80gb() -> FinetuneConfig:
    """The same over weights in nf4 (arXiv 2305.14314), gradients clipped at 0.3."""
    recipe = lora_1x80gb()
    return dataclasses.replace(
        recipe, quantize="nf4", optimizer=dataclasses.replace(recipe.optimizer, max_grad_norm=0.3)
    )


def tiny_finetune() -> FinetuneConfig:
    """What `tiny` leaves behind, all of its weights, on two CPU cores."""
    return FinetuneConfig(
        data=ExamplesConfig(sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.0),
    )


FINETUNING: Final[dict[str, Callable[[], FinetuneConfig]]] = {
    "full": FinetuneConfig,
    "full_8x40gb": full_8x40gb,
    "lora_1x80gb": lora_1x80gb,
    "qlora_1x80gb": qlora_1x80gb,
    "tiny": tiny_finetune,
}
