"""The KV cache: static shapes, sequences of different lengths.

The slot of a token is its position; padding is on the right and is overwritten by the next tokens. Arrays are
[B·K, S, H]: with 4-D arrays XLA chose layouts on CPU that made decode 10× slower.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Float, Int, Shaped
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.sharding import constrain, current_mesh


class LayerCache(NamedTuple):
    """Keys (after RoPE) and values of a layer, float, or int8 with a scale per token and head."""

    k: Shaped[Array, "BK S H"]
    v: Shaped[Array, "BK S H"]
    k_scale: Float[Array, "BK S 1"] | None = None
    v_scale: Float[Array, "BK S 1"] | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int, int], dtype) -> "LayerCache":
        """Create a cache of zeros [BK, S, H], with scales if `dtype` is int8."""
        # Separate buffers: a buffer can be donated only once.
        scales = [jnp.zeros((*shape[:2], 1)) for _ in range(2)] if dtype == jnp.int8 else []
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    def write(
        self, k: Float[Array, "BK T H"], v: Float[Array, "BK T H"], start: Int[Array, "B"] | None = None
    ) -> "LayerCache":
        """Write T tokens of each sequence, starting at slot `start` (default 0)."""
        new = [k, v]
        if self.k_scale is not None:
            (k8, k_scale), (v8, v_scale) = _quantize(k), _quantize(v)
            new = [k8, v8, k_scale, v_scale]
        arrays = [slots for slots in self if slots is not None]
        return type(self)(*(_write(slots, values, start) for slots, values in zip(arrays, new, strict=True)))

    def read(self, dtype) -> tuple[Array, Array]:
        """Return all keys and values in `dtype`."""
        if self.k_scale is None or self.v_scale is None:
            return self.k.astype(dtype), self.v.astype(dtype)
        return (self.k * self.k_scale).astype(dtype), (self.v * self.v_scale).astype(dtype)


def _quantize(x: Float[Array, "BK T H"]) -> tuple[Array, Float[Array, "BK T 1"]]:
    """Quantize to symmetric int8 with a scale per token and head."""
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

    # XLA lowers the above to a scatter, which is elementwise on CPU; this is one copy per sequence.
    def put_row(row: Array | int, slots: Array) -> Array:
        tokens = jax.lax.dynamic_slice_in_dim(new, row * heads, heads)
        return jax.lax.dynamic_update_slice(slots, tokens, (row * heads, start[row], 0))

    return jax.lax.fori_loop(0, len(start), put_row, slots) if len(start) > 1 else put_row(0, slots)


class KVCache(NamedTuple):
    """The cache of all layers."""

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]  # tokens of each sequence

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> "KVCache":
        """Create an empty cache for `batch` sequences of up to `slots` tokens; `dtype` may be int8."""
        shape = (batch * config.num_kv_heads, slots, config.head_dim)
        layers = tuple(LayerCache.empty(shape, dtype) for _ in range(config.num_hidden_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """The capacity per sequence, in tokens."""
        return self.layers[0].k.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of keys and values as stored."""
        return self.layers[0].k.dtype

    def placed(self) -> "KVCache":
        """Shard the cache over the current mesh by sequence and head, or replicate it if that is uneven."""
        place = lambda x: constrain(x, ("cache", None, None), replicate=True)  # noqa: E731
        return KVCache(jax.tree.map(place, self.layers), constrain(self.lengths, (None,)))

    def rows(self, order: Int[Array, "R"], slots: int) -> "KVCache":
        """Select sequences, possibly repeated, and truncate or extend them to `slots` tokens."""
        B, used = len(self.lengths), min(slots, self.slots)

        def take(x: Array) -> Array:
            by_row = x.reshape(B, -1, *x.shape[1:])[order, :, :used]
            padded = jnp.pad(by_row, ((0, 0), (0, 0), (0, slots - used), (0, 0)))
            return padded.reshape(-1, *padded.shape[2:])

        return KVCache(jax.tree.map(take, self.layers), jnp.minimum(self.lengths[order], slots))

    def put(self, row: Int[Array, ""], other: "KVCache", other_row: Int[Array, ""]) -> "KVCache":
        """Replace sequence `row` by one of another cache with at most as many slots."""
        heads = len(self.layers[0].k) // len(self.lengths)

        def replace(old: Array, new: Array) -> Array:
            new = jax.lax.dynamic_slice_in_dim(new, other_row * heads, heads)
            return jax.lax.dynamic_update_slice(old, new, (row * heads, 0, 0))

        layers = jax.tree.map(replace, self.layers, other.layers)
        return KVCache(layers, self.lengths.at[row].set(other.lengths[other_row]))
