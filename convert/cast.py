"""Cast weights and count changed values (`Cast`); report a finished conversion (`ConversionReport`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsmoe_jax.progress import byte_size

_HALF = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


class CastStats(NamedTuple):
    """Number of values that a cast changed, and the largest finite change."""

    values: int = 0
    changed: int = 0
    overflowed: int = 0  # changed to infinity
    max_error: float = 0.0

    def __add__(self, other: Any) -> "CastStats":
        """Return the combined statistics."""
        values, changed, overflowed = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return CastStats(values, changed, overflowed, max(self.max_error, other[3]))

    def __str__(self) -> str:
        """Return a one-line summary."""
        line = f"{self.changed:,} of {self.values:,} values changed, by {self.max_error:.3g} at most"
        return line + (f"; {self.overflowed:,} overflowed to infinity" if self.overflowed else "")


@dataclass
class Cast:
    """Casts arrays to `dtype` (None: no cast), rounding to nearest even, and collects `stats`."""

    dtype: np.dtype | None
    stats: CastStats = field(default_factory=CastStats)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """Return the cast array."""
        if self.dtype is None or array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(self.dtype)
        if not (array.dtype in _HALF and self.dtype == np.float32):
            self.stats += _compare(array.astype(np.float32), cast.astype(np.float32))
        return cast


def _compare(before: np.ndarray, after: np.ndarray) -> CastStats:
    changed = (before != after) & ~(np.isnan(before) & np.isnan(after))
    overflowed = changed & np.isinf(after)
    finite = changed & ~overflowed
    error = float(np.abs(before[finite] - after[finite]).max(initial=0.0))
    return CastStats(before.size, int(changed.sum()), int(overflowed.sum()), error)


@dataclass(frozen=True)
class ConversionReport:
    """Summary of a finished import or export, printed by `dsmoe convert` and `dsmoe export`.

    Attributes:
        path: The new checkpoint.
        tensors: Number of Hugging Face tensors, one per expert.
        bytes: Bytes of all tensors.
        reused_bytes: Bytes written by an earlier, interrupted run.
        seconds: Wall-clock time.
        cast_stats: Values changed by the cast.
        checksum: How the bytes were verified.
    """

    path: Path
    tensors: int
    bytes: int
    reused_bytes: int
    seconds: float
    cast_stats: CastStats
    checksum: str

    def __str__(self) -> str:
        """Return a summary of a few lines."""
        rate = (self.bytes - self.reused_bytes) / self.seconds / 1e9
        size = f"{self.tensors:,} tensors, {byte_size(self.bytes)}"
        lines = [f"{self.path}: {size} in {self.seconds:.1f} s ({rate:.2f} GB/s)"]
        if self.reused_bytes:
            lines.append(f"  resumed: {byte_size(self.reused_bytes)} were already written")
        if self.cast_stats.changed:
            lines.append(f"  cast: {self.cast_stats}")
        return "\n".join([*lines, f"  {self.checksum}"])
