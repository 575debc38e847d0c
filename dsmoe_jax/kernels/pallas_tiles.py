"""Tiles of arrays in Pallas kernels: `load` and `store` of spans, masked where a tile passes the end of an axis."""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsmoe_jax.axes import Array


class Span(NamedTuple):
    """`size` indices from `start` on; those from `end` on are masked."""

    start: Any
    size: int
    end: Any

    @property
    def inside(self) -> Array | None:
        """The mask [size] of valid indices; None if the axis is a multiple of the tile."""
        if isinstance(self.end, int) and self.end % self.size == 0:
            return None
        return self.indices < self.end

    @property
    def indices(self) -> Array:
        """The indices [size]."""
        return self.start + jnp.arange(self.size, dtype=jnp.int32)


Index: TypeAlias = tuple[Any, ...]  # scalars and spans


def load(ref, index: Index, other: Any = 0) -> Array:
    """Load a tile; masked elements, out of bounds or NaN, are `other`."""
    mask = _mask(index)
    return triton.load(_at(ref, index), mask=mask, other=None if mask is None else jnp.asarray(other, ref.dtype))


def store(ref, index: Index, value: Array) -> None:
    """Store a tile, cast to the dtype of the array."""
    triton.store(_at(ref, index), value.astype(ref.dtype), mask=_mask(index))


def _at(ref, index: Index):
    return ref.at[tuple(pl.ds(part.start, part.size) if isinstance(part, Span) else part for part in index)]


def _mask(index: Index) -> Array | None:
    spans = [part for part in index if isinstance(part, Span)]
    shape, parts = tuple(span.size for span in spans), []
    for axis, span in enumerate(spans):
        if (inside := span.inside) is not None:
            others = [n for n in range(len(spans)) if n != axis]
            parts.append(jnp.broadcast_to(jnp.expand_dims(inside, others), shape))
    return functools.reduce(jnp.logical_and, parts) if parts else None
