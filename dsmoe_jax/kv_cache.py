"""The key-value cache: static shapes, sequences of different lengths.

A sequence starts at slot 0, so the slot of a token is its position; padding is on the right and is overwritten by the
next tokens. Arrays are 3-D, [B·K, S, H]: with 4-D ones XLA chose layouts on CPU that made decode 10× slower. Only this
file knows the layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int, Shaped
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.sharding import constrain, current_mesh


class LayerCache(NamedTuple):
    """Keys and values of a layer.

    Attributes:
      k: Keys after RoPE, [BK, S, H]; float or int8.
      v: Values, [BK, S, H].
      k_scale: For int8: the scale of each token and head, [BK, S, 1].
      v_scale: As `k_scale`.
    """

    k: Shaped[Array, "BK S H"]
    v: Shaped[Array, "BK S H"]
    k_scale: Float[Array, "BK S 1"] | None = None
    v_scale: Float[Array, "BK S 1"] | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int, int], dtype) -> "LayerCache":
        """A layer cache of zeros [BK, S, H]; with scales if `dtype` is int8."""
        # Separate buffers: donating a buffer twice is an error.
        scales = [jnp.zeros((*shape[:2], 1)) for _ in range(2)] if dtype == jnp.int8 else []
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    def write(
        self, k: Float[Array, "BK T H"], v: Float[Array, "BK T H"], start: Int[Array, "B"] | None = None
    ) -> "LayerCache":
        """Write T tokens of each sequence from slot `start` on; None: from slot 0."""
        new = [k, v]
        if self.k_scale is not None:
            (k8, k_scale), (v8, v_scale) = _quantize(k), _quantize(v)
            new = [k8, v8, k_scale, v_scale]
        arrays = [slots for slots in self if slots is not None]
        return type(self)(*(_write(slots, values, start) for slots, values in zip(arrays, new, strict=True)))

    def read(self, dtype) -> tuple[Array, Array]:
        """All keys and values, [BK, S, H] each, in `dtype`."""
        if self.k_scale is None or self.v_scale is None:
            return self.k.astype(dtype), self.v.astype(dtype)
        return (self.k * self.k_scale).astype(dtype), (self.v * self.v_scale).astype(dtype)


def _quantize(x: Float[Array, "BK T H"]) -> tuple[Array, Float[Array, "BK T 1"]]:
    """Symmetric int8 with a scale per token and head."""
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

    # XLA turns the above into a scatter, elementwise on CPU; this is one copy per row.
    def put_row(row: Array | int, slots: Array) -> Array:
        tokens = jax.lax.dynamic_slice_in_dim(new, row * heads, heads)
        return jax.lax.dynamic_update_slice(slots, tokens, (row * heads, start[row], 0))

    return jax.lax.fori_loop(0, len(start), put_row, slots) if len(start) > 1 else put_row(0, slots)


class KVCache(NamedTuple):
    """The cache of all layers.

    Attributes:
      layers: One entry per layer.
      lengths: int32 [B], the tokens of each sequence.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> "KVCache":
        """An empty cache for `batch` sequences of up to `slots` tokens; `dtype` may be int8."""
        shape = (batch * config.num_kv_heads, slots, config.head_dim)
        layers = tuple(LayerCache.empty(shape, dtype) for _ in range(config.num_hidden_layers))
        return cls(layers, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """The capacity per sequence, in tokens."""
        return self.layers[0].k.shape[1]

    def mask(self, tokens: int) -> Bool[Array, "B T S"]:
        """The causal mask of the next `tokens` tokens over the slots."""
        positions = self.lengths[:, None] + jnp.arange(tokens)[None, :]
        return jnp.arange(self.slots)[None, None, :] <= positions[:, :, None]

    def placed(self) -> "KVCache":
        """The cache, sharded over the current mesh by sequence and head, or replicated."""
        place = lambda x: constrain(x, ("cache", None, None), replicate=True)  # noqa: E731
        return KVCache(jax.tree.map(place, self.layers), constrain(self.lengths, (None,)))

    def rows(self, order: Int[Array, "R"], slots: int) -> "KVCache":
        """The sequences `order`, repetitions allowed, truncated or extended to `slots` tokens."""
        B, used = len(self.lengths), min(slots, self.slots)

        def take(x: Array) -> Array:
            by_row = x.reshape(B, -1, *x.shape[1:])[order, :, :used]
            padded = jnp.pad(by_row, ((0, 0), (0, 0), (0, slots - used), (0, 0)))
            return padded.reshape(-1, *padded.shape[2:])

        return KVCache(jax.tree.map(take, self.layers), jnp.minimum(self.lengths[order], slots))

    def put(self, row: Int[Array, ""], other: "KVCache", other_row: Int[Array, ""]) -> "KVCache":
        """Replace sequence `row` by one of another cache with no more slots."""
        heads = len(self.layers[0].k) // len(self.lengths)

        def replace(old: Array, new: Array) -> Array:
            new = jax.lax.dynamic_slice_in_dim(new, other_row * heads, heads)
            return jax.lax.dynamic_update_slice(old, new, (row * heads, 0, 0))

        layers = jax.tree.map(replace, self.layers, other.layers)
        return KVCache(layers, self.lengths.at[row].set(other.lengths[other_row]))
