"""Mixing of datasets by weight. Start at `Mixture.place`."""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np

from dsmoe_jax.errors import DSMoEError

from .shuffle import shuffled

_BLOCK: Final = 256  # samples; more for a weight below one sample
_LARGEST_BLOCK: Final = 1 << 20
_MIXTURE: Final = 1 << 31  # shuffle key: no dataset has this number


class Mixture:
    """Samples several datasets by weight, in shuffled blocks.

    After every block each dataset has its share of all samples, rounded by largest remainder, so within one sample.
    """

    def __init__(self, weights: Sequence[float], *, seed: int):
        """Check and normalize the weights."""
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise DSMoEError(f"weights must be positive and finite, got {weight}")
        if not weights:
            raise DSMoEError("weights must name at least one dataset")
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        self._seed = seed
        # With at least one sample of each dataset per block the rounded totals never decrease.
        self.block = max(_BLOCK, math.ceil(1 / min(self._shares)))
        if self.block > _LARGEST_BLOCK:
            raise DSMoEError(f"weights must be at least one sample in {_LARGEST_BLOCK}, got {min(weights)}")
        self._cached = functools.lru_cache(maxsize=8)(self._build)

    def place(self, n: int) -> tuple[int, int]:
        """Return the dataset of sample `n`, and the sample's index in it."""
        block, at = divmod(n, self.block)
        datasets, numbers = self._cached(block)
        return int(datasets[at]), int(numbers[at])

    def counts(self, samples: int) -> list[int]:
        """Return the number of samples of each dataset among the first ones."""
        block, rest = divmod(samples, self.block)
        datasets = self._cached(block)[0][:rest]
        return [whole + int((datasets == dataset).sum()) for dataset, whole in enumerate(self.taken(block))]

    def taken(self, blocks: int) -> list[int]:
        """Return the number of samples of each dataset in the first blocks."""
        exact = [blocks * self.block * share for share in self._shares]
        counts = [math.floor(count) for count in exact]
        left = blocks * self.block - sum(counts)
        for dataset in sorted(range(len(exact)), key=lambda d: counts[d] - exact[d])[:left]:
            counts[dataset] += 1
        return counts

    def _build(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self.taken(block), self.taken(block + 1)
        # Sorted by dataset, then shuffled.
        datasets = np.repeat(np.arange(len(before)), [b - a for a, b in zip(before, after, strict=True)])
        datasets = datasets[shuffled(self.block, self._seed, _MIXTURE, block)]
        # Within a dataset the samples stay in order.
        numbers = np.empty_like(datasets)
        for dataset, (first, last) in enumerate(zip(before, after, strict=True)):
            numbers[datasets == dataset] = np.arange(first, last)
        return datasets, numbers
