"""(Token, expert) pairs as rows sorted by expert: `Sorted`, and the gathers between tokens and rows, `Rows`."""

from typing import NamedTuple

import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.kernels.operand import range_of


class Rows(NamedTuple):
    """The rows of (token, expert) pairs: gather from tokens to rows, and its transpose."""

    pair: Int[Array, "C"]  # the pair of each row, of token `pair // K`; arbitrary for unused rows
    row: Int[Array, "M K"]  # the row of each pair; in range only if valid
    valid: Bool[Array, "M K"]  # whether the pair has a row

    def gather(self, x: Float[Array, "M D"]) -> Float[Array, "C D"]:
        """Copy each token's state to its rows."""
        return x[self.pair // self.row.shape[1]]

    def combine(self, y: Float[Array, "C D"]) -> Float[Array, "M D"]:
        """Sum each token's rows in fp32: the transpose of `gather`."""
        taken = y[self.row.clip(0, len(y) - 1)].astype(jnp.float32)
        return jnp.where(self.valid[:, :, None], taken, 0).sum(axis=1)

    def gather_weights(self, weights: Float[Array, "M K"]) -> Float[Array, "C"]:
        """Return each row's weight."""
        return weights.reshape(-1)[self.pair]

    def combine_weights(self, weights: Float[Array, "C"]) -> Float[Array, "M K"]:
        """Return each pair's value: the transpose of `gather_weights`."""
        return jnp.where(self.valid, weights[self.row.clip(0, len(weights) - 1)], 0)


class Sorted(NamedTuple):
    """All pairs stably sorted by expert: within an expert, rows keep the order of tokens."""

    rows: Rows  # one for every pair
    group_sizes: Int[Array, "E"]

    @classmethod
    def by_expert(cls, ids: Int[Array, "M K"], experts: int) -> "Sorted":
        """Sort pairs by expert id; pairs with id `experts` (no expert) come last."""
        flat = ids.reshape(-1)
        pair = jnp.argsort(flat, stable=True)
        row = jnp.zeros_like(pair).at[pair].set(jnp.arange(pair.size), unique_indices=True).reshape(ids.shape)
        group_sizes = (flat[:, None] == jnp.arange(experts)[None, :]).sum(axis=0, dtype=jnp.int32)
        return cls(Rows(pair, row, ids < experts), group_sizes)

    def window(self, index: Array | int, size: int) -> "Sorted":
        """Return the rows of window `index`, with their group sizes."""
        start, ends = index * size, jnp.cumsum(self.group_sizes)
        inside = jnp.clip(ends, start, start + size)
        group_sizes = inside - jnp.clip(ends - self.group_sizes, start, start + size)
        row = self.rows.row - start
        pair = self.rows.pair[(start + jnp.arange(size)).clip(max=self.rows.pair.size - 1)]
        return Sorted(Rows(pair, row, self.rows.valid & (row >= 0) & (row < size)), group_sizes)

    def slots(self, ways: int, index: Array | int, size: int) -> tuple[Rows, Int[Array, "slots"]]:
        """Fill `size` slots for each of `ways` equal ranges of experts with the rows of window `index`.

        Also return the expert of each slot within its range, or the number of experts in a range for an unused slot.
        """
        per_range = self.group_sizes.reshape(ways, -1)
        ends = jnp.cumsum(per_range.sum(axis=1))
        starts = ends - per_range.sum(axis=1) + index * size
        owner = range_of(self.rows.row, ends).clip(max=ways - 1)
        within = self.rows.row - starts[owner]
        valid = self.rows.valid & (within >= 0) & (within < size)
        row = (starts[:, None] + jnp.arange(size)[None, :]).reshape(-1)
        used = row < jnp.repeat(ends, size)
        expert = range_of(row, jnp.cumsum(self.group_sizes)) % per_range.shape[1]
        pair = self.rows.pair[row.clip(max=self.rows.pair.size - 1)]
        return Rows(pair, owner * size + within, valid), jnp.where(used, expert, per_range.shape[1])
