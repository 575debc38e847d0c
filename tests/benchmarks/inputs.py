"""The token ids for all contenders, drawn by NumPy: no jax or torch needed."""

import numpy as np

from dsmoe_jax.config import ModelConfig
from tests.benchmarks import plan


def batch(config: ModelConfig, rows: int, tokens: int) -> np.ndarray:
    """Return random token ids, int32 [rows, tokens], from a fixed seed."""
    return np.random.default_rng(plan.SEED).integers(0, config.vocab_size, (rows, tokens), dtype=np.int32)
