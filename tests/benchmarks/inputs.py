"""The token ids that every contender gets: drawn by numpy, without jax or torch."""

import numpy as np

from dsmoe_jax.config import ModelConfig
from tests.benchmarks import plan


def batch(config: ModelConfig, rows: int, tokens: int) -> np.ndarray:
    """Random token ids, int32 [rows, tokens]; the same for the same shape."""
    return np.random.default_rng(plan.SEED).integers(0, config.vocab_size, (rows, tokens), dtype=np.int32)
