"""The only source of randomness: a permutation determined by a key."""

import numpy as np

from dsmoe_jax.errors import DSMoEError


def shuffled(count: int, seed: int, *key: int) -> np.ndarray:
    """Return a permutation of range(count), int64, determined by (seed, *key).

    It sorts by the raw bits of Philox, which numpy guarantees across versions, unlike its `permutation`.
    """
    if seed < 0:
        raise DSMoEError(f"seed must be at least 0, got {seed}")
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(bits, kind="stable")
