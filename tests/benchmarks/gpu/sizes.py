"""The sizes of a run: the 16B's, or small ones for a trial. Start at `FULL`. No jax or torch."""

import dataclasses
from typing import Final, NamedTuple

from dsmoe_jax.config import ModelConfig


class Sizes(NamedTuple):
    """The sizes for all parts."""

    model: ModelConfig
    expert_tokens: tuple[int, ...]  # the main size first
    block_shape: tuple[int, int]  # sequences, tokens per sequence
    train_layers: int
    train_shape: tuple[int, int]
    whole_presets: tuple[str, ...]  # largest first
    adapter_shape: tuple[int, int]
    prompt: int  # prompt tokens
    context: int  # cached tokens before a decode step
    steps: int  # decode steps per turn
    batches: tuple[int, ...]  # in order of priority
    copied_bytes: int
    matmul_side: int
    dtype: str = "bfloat16"
    trial: bool = False
    turn_seconds: float = 2.0  # duration of the repetitions, within the bounds of `cases.turns`

    @property
    def trained(self) -> ModelConfig:
        """The model's widths with fewer layers."""
        return dataclasses.replace(self.model, num_hidden_layers=self.train_layers)


FULL: Final = Sizes(
    model=ModelConfig.preset("deepseek_moe_16b"),
    expert_tokens=(16384, 4096, 65536),
    block_shape=(4, 4096),
    train_layers=8,
    train_shape=(4, 4096),
    whole_presets=("deepseek_moe_145b", "deepseek_moe_16b", "deepseek_moe_2b", "bench"),
    adapter_shape=(4, 1024),
    prompt=2048,
    context=512,
    steps=32,
    batches=(1, 32, 8, 128),
    copied_bytes=2 * 2**30,
    matmul_side=8192,
)
SMALL: Final = Sizes(
    model=ModelConfig.preset("tiny"),
    expert_tokens=(128, 64),
    block_shape=(1, 64),
    train_layers=2,
    train_shape=(1, 64),
    whole_presets=("tiny",),
    adapter_shape=(1, 32),
    prompt=64,
    context=32,
    steps=2,
    batches=(1, 4),
    copied_bytes=2**22,
    matmul_side=256,
    trial=True,
    turn_seconds=0.1,
)


def sizes(*, small: bool) -> Sizes:
    """Return the small or the full sizes."""
    return SMALL if small else FULL
