"""Weights to another dtype, with a count of what that changes. Start at `Cast`."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_HALF = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class Loss(NamedTuple):
    """What a cast changed: of `values` numbers, those that came out otherwise, and the largest finite difference."""

    values: int = 0
    changed: int = 0
    overflowed: int = 0  # of the changed ones, those that became infinite
    max_error: float = 0.0

    def __add__(self, other: Any) -> "Loss":
        """Both together."""
        values, changed, overflowed = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Loss(values, changed, overflowed, max(self.max_error, other[3]))

    def __str__(self) -> str:
        """One line for a user."""
        part = f"{self.changed:,} of {self.values:,} values changed, by {self.max_error:.3g} at most"
        return part + (f"; {self.overflowed:,} overflowed to infinity" if self.overflowed else "")


class Cast:
    """Casts arrays to `dtype` (None: leaves them) and adds up the loss."""

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype
        self.loss = Loss()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """The array in the dtype, rounded to nearest even."""
        if self.dtype is None or array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(self.dtype)
        if not (array.dtype in _HALF and self.dtype == np.float32):
            self.loss += _loss(array.astype(np.float32), cast.astype(np.float32))
        return cast


def _loss(before: np.ndarray, after: np.ndarray) -> Loss:
    changed = (before != after) & ~(np.isnan(before) & np.isnan(after))
    overflowed = changed & np.isinf(after)
    finite = changed & ~overflowed
    error = float(np.abs(before[finite] - after[finite]).max(initial=0.0))
    return Loss(before.size, int(changed.sum()), int(overflowed.sum()), error)
