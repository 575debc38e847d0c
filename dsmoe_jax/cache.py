"""The key-value cache as data: static shapes, rows of different lengths.

A row's tokens stand from slot 0 on, so a token's slot is its position and padding, always to the right, is overwritten
by what comes next. Shapes are 3-D, [B·K, S, H]: in 4-D, XLA chose layouts on CPU that cost 10× in decode. Only this
file knows the layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int, Shaped
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.sharding import constrain, current_mesh


class LayerCache(NamedTuple):
    """One layer's keys (already rotated) and values; in int8 with a scale for each token and head."""

    k: Shaped[Array, "BK S H"]
    v: Shaped[Array, "BK S H"]
    k_scale: Float[Array, "BK S 1"] | None = None
    v_scale: Float[Array, "BK S 1"] | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int, int], dtype) -> "LayerCache":
        """Zeros [BK, S, H]; with scales if `dtype` is int8."""
        # One buffer each: a buffer that is donated twice is an error.
        scales = [jnp.zeros((*shape[:2], 1)) for _ in range(2)] if dtype == jnp.int8 else []
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    def write(
        self, k: Float[Array, "BK T H"], v: Float[Array, "BK T H"], start: Int[Array, "B"] | None = None
    ) -> "LayerCache":
        """Lay T tokens into each row of the batch from its slot `start` on; None: from the first on."""
        new = [k, v]
        if self.k_scale is not None:
            (k8, k_scale), (v8, v_scale) = _rounded(k), _rounded(v)
            new = [k8, v8, k_scale, v_scale]
        own = [slots for slots in self if slots is not None]
        return type(self)(*(_write(slots, values, start) for slots, values in zip(own, new, strict=True)))

    def read(self, dtype) -> tuple[Array, Array]:
        """All keys and values, [BK, S, H] each, in the dtype of computation."""
        if self.k_scale is None or self.v_scale is None:
            return self.k.astype(dtype), self.v.astype(dtype)
        return (self.k * self.k_scale).astype(dtype), (self.v * self.v_scale).astype(dtype)


def _rounded(x: Float[Array, "BK T H"]) -> tuple[Array, Float[Array, "BK T 1"]]:
    """int8 and its scale: the largest of a token's values in a head is ±127."""
    scale = jnp.abs(x).max(axis=-1, keepdims=True).astype(jnp.float32) / 127
    return jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8), scale


def _write(slots: Shaped[Array, "BK S H"], new: Shaped[Array, "BK T H"], start: Int[Array, "B"] | None) -> Array:
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
        """A cache for `batch` rows of up to `slots` tokens; `dtype` may be int8."""
        shape = (batch * config.num_kv_heads, slots, config.head_dim)
        layers = tuple(LayerCache.empty(shape, dtype) for _ in range(config.num_hidden_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """How many tokens a row can hold."""
        return self.layers[0].k.shape[1]

    def mask(self, tokens: int) -> Bool[Array, "B T S"]:
        """Which slots each of the next `tokens` tokens may read: those up to and including its own."""
        own = self.lengths[:, None] + jnp.arange(tokens)[None, :]
        return jnp.arange(self.slots)[None, None, :] <= own[:, :, None]

    def placed(self) -> "KVCache":
        """The cache, split over all devices of the current mesh by row and head, or whole on each."""
        place = lambda x: constrain(x, ("cache", None, None), replicate=True)  # noqa: E731
        return KVCache(jax.tree.map(place, self.layers), constrain(self.lengths, (None,)))

    def rows(self, order: Int[Array, "R"], slots: int) -> "KVCache":
        """The rows `order` of it (one may come twice), with room for `slots` tokens each.

        Of a row that holds more, the first ones are kept.
        """
        B, kept = len(self.lengths), min(slots, self.slots)

        def take(x: Array) -> Array:
            by_row = x.reshape(B, -1, *x.shape[1:])[order, :, :kept]
            padded = jnp.pad(by_row, ((0, 0), (0, 0), (0, slots - kept), (0, 0)))
            return padded.reshape(-1, *padded.shape[2:])

        return KVCache(jax.tree.map(take, self.layers), jnp.minimum(self.lengths[order], slots))

    def put(self, row: Int[Array, ""], other: "KVCache", other_row: Int[Array, ""]) -> "KVCache":
        """With a row of another cache, of no more slots, in the place of its own row."""
        heads = len(self.layers[0].k) // len(self.lengths)

        def lay(own: Array, new: Array) -> Array:
            new = jax.lax.dynamic_slice_in_dim(new, other_row * heads, heads)
            return jax.lax.dynamic_update_slice(own, new, (row * heads, 0, 0))

        layers = jax.tree.map(lay, self.layers, other.layers)
        return KVCache(layers, self.lengths.at[row].set(other.lengths[other_row]))
