"""Recipes, functions that return a config: `RECIPES` and `FINETUNING`."""

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
    """Train 4.5M parameters in 3 minutes on 2 CPU cores; validation loss 3.5."""
    return RunConfig(
        output_dir="runs/tiny",
        model="tiny",
        steps=1000,
        data=DataConfig(sequence_length=256, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=50),
        checkpoint=CheckpointConfig(interval=250),
        eval_batches=32,
    )


def bench() -> RunConfig:
    """Train the 271M model of `tests/benchmarks`."""
    return RunConfig(
        output_dir="runs/bench",
        model="bench",
        steps=10_000,
        data=DataConfig(sequence_length=1024, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=6e-4, schedule="cosine", warmup_steps=500),
        step=StepConfig(compute_dtype="bfloat16"),
    )


def deepseek_moe_2b() -> RunConfig:
    """Train the paper's 2B on 100B tokens (arXiv 2401.06066, section 4)."""
    return RunConfig(
        output_dir="runs/deepseek_moe_2b",
        model="deepseek_moe_2b",
        steps=25_000,
        data=DataConfig(sources=("data",), sequence_length=2048, batch_size=2048),
        optimizer=OptimizerConfig(learning_rate=1.08e-3),
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=8, remat="dots"),
    )


def deepseek_moe_16b() -> RunConfig:
    """Train the paper's 16B on 2T tokens (section 5)."""
    return RunConfig(
        output_dir="runs/deepseek_moe_16b",
        model="deepseek_moe_16b",
        steps=106_449,
        data=DataConfig(sources=("data",), sequence_length=4096, batch_size=4608),
        optimizer=OptimizerConfig(learning_rate=4.2e-4),
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=9, remat="full"),
        mesh=MeshConfig(fsdp=-1),
    )


def deepseek_moe_145b() -> RunConfig:
    """Train the paper's 145B on 245B tokens (section 7)."""
    recipe = deepseek_moe_16b()
    return dataclasses.replace(
        recipe,
        output_dir="runs/deepseek_moe_145b",
        model="deepseek_moe_145b",
        steps=13_000,
        optimizer=OptimizerConfig(learning_rate=3.0e-4, schedule="constant"),
        step=dataclasses.replace(recipe.step, device_balance_groups=4, device_balance_alpha=0.05),
        mesh=MeshConfig(fsdp=-1, expert=4),
    )


RECIPES: Final[dict[str, Callable[[], RunConfig]]] = {
    recipe.__name__: recipe for recipe in (tiny, bench, deepseek_moe_2b, deepseek_moe_16b, deepseek_moe_145b)
}


# --- fine-tuning: the settings of the original's finetune.py and README, without `init_from` ---


_EXAMPLES: Final = ExamplesConfig(sequence_length=1024, batch_size=64)


def full() -> FinetuneConfig:
    """Fine-tune all parameters in fp32, with the optimizer settings of the original."""
    return FinetuneConfig()


def full_8x40gb() -> FinetuneConfig:
    """Fine-tune all parameters of the 16B on 8 GPUs of 40 GB."""
    return FinetuneConfig(
        data=_EXAMPLES,
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=8, remat="full"),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, schedule="cosine", warmup_steps=10, weight_decay=0.0, moments="factored"
        ),
        mesh=MeshConfig(fsdp=-1),
    )


def lora_1x80gb() -> FinetuneConfig:
    """Fine-tune the 16B by LoRA of rank 8 in bf16 on one GPU of 80 GB."""
    return FinetuneConfig(
        data=_EXAMPLES,
        step=StepConfig(compute_dtype="bfloat16", gradient_accumulation_steps=16, remat="full"),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_steps=10, weight_decay=0.0, b2=0.999),
        lora=LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1),
    )


def qlora_1x80gb() -> FinetuneConfig:
    """Fine-tune the 16B by QLoRA over nf4 weights (arXiv 2305.14314)."""
    recipe = lora_1x80gb()
    return dataclasses.replace(
        recipe, quantize="nf4", optimizer=dataclasses.replace(recipe.optimizer, max_grad_norm=0.3)
    )


def tiny_finetune() -> FinetuneConfig:
    """Fine-tune all parameters of the `tiny` recipe's model."""
    return FinetuneConfig(
        data=ExamplesConfig(sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.0),
    )


FINETUNING: Final[dict[str, Callable[[], FinetuneConfig]]] = {
    "full": full,
    "full_8x40gb": full_8x40gb,
    "lora_1x80gb": lora_1x80gb,
    "qlora_1x80gb": qlora_1x80gb,
    "tiny": tiny_finetune,
}
