"""The one source of chance: a permutation that a key decides."""

import numpy as np

from dsmoe_jax.errors import DSMoEError


def shuffled(count: int, seed: int, *key: int) -> np.ndarray:
    """The numbers below `count` in an order, int64, that (seed, *key) decides.

    They are sorted by the raw bits of Philox: numpy promises those for all its versions, but not its `permutation`.
    """
    if seed < 0:
        raise DSMoEError(f"seed must be at least 0, got {seed}")
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(bits, kind="stable")
