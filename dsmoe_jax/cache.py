"""The key-value cache as data: static shapes, rows of different lengths.

A row's tokens stand from slot 0 on, so a token's slot is its position and padding, always to the right, is overwritten
by what comes next. Shapes are 3-D, [B·K, S, H]: in 4-D, XLA chose layouts on CPU that cost 10× in decode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.sharding import current_mesh


class LayerCache(NamedTuple):
    """One layer's keys (already rotated) and values."""

    k: Float[Array, "BK S H"]
    v: Float[Array, "BK S H"]

    def write(
        self, k: Float[Array, "BK T H"], v: Float[Array, "BK T H"], start: Int[Array, "B"] | None = None
    ) -> "LayerCache":
        """Lay T tokens into each row of the batch from its slot `start` on; None: from the first on."""
        return type(self)(_write(self.k, k, start), _write(self.v, v, start))


def _write(slots: Float[Array, "BK S H"], new: Float[Array, "BK T H"], start: Int[Array, "B"] | None) -> Array:
    new = new.astype(slots.dtype)
    if start is None:
        return new if new.shape == slots.shape else jax.lax.dynamic_update_slice(slots, new, (0, 0, 0))
    heads = len(slots) // len(start)
    if jax.default_backend() != "cpu" or current_mesh() is not None:
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0)))
        return put(slots, new, jnp.repeat(start, heads))

    # XLA makes a scatter of the above, which goes element by element on CPU; this is one copy for each row.
    def put_row(row: Array | int, slots: Array) -> Array:
        own = jax.lax.dynamic_slice_in_dim(new, row * heads, heads)
        return jax.lax.dynamic_update_slice(slots, own, (row * heads, start[row], 0))

    return jax.lax.fori_loop(0, len(start), put_row, slots) if len(start) > 1 else put_row(0, slots)


class KVCache(NamedTuple):
    """All layers' caches, and how many tokens each row of the batch holds."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> "KVCache":
        """A cache for `batch` rows of up to `slots` tokens."""
        shape = (batch * config.num_kv_heads, slots, config.head_dim)
        # One buffer each: a buffer that is donated twice is an error.
        layers = tuple(
            LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)
        )
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """How many tokens a row can hold."""
        return self.layers[0].k.shape[1]

    def mask(self, tokens: int) -> Bool[Array, "B T S"]:
        """Which slots each of the next `tokens` tokens may read: those up to and including its own."""
        own = self.lengths[:, None] + jnp.arange(tokens)[None, :]
        return jnp.arange(self.slots)[None, None, :] <= own[:, :, None]
