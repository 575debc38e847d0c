"""Multi-head, grouped-query or multi-query self-attention with rotary positions."""

import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float, Int, PRNGKeyArray
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.attention import CausalMask, attention
from dsmoe_jax.kv_cache import LayerCache
from dsmoe_jax.layers.rope import Rotation, rotate
from dsmoe_jax.layers.weights import Linear


class Attention(nnx.Module):
    """The q, k, v and output projections around `kernels.attention`; all four have biases, or none."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_kv_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = N, K, H
        self.dropout = config.attention_dropout
        options = {"std": config.initializer_range, "bias": config.attention_bias, "rngs": rngs, "dtype": dtype}
        self.q = Linear((N * H, D), ("heads", "embed"), **options)
        self.k = Linear((K * H, D), ("kv_heads", "embed"), **options)
        self.v = Linear((K * H, D), ("kv_heads", "embed"), **options)
        self.o = Linear((D, N * H), ("embed", "heads"), **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        mask: CausalMask,
        cache: LayerCache | None = None,
        start: Int[Array, "B"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attend to the T tokens and write their keys and values to the cache.

        With `start`, write from that slot of each sequence and attend to all S slots; else the cache is empty.
        """
        B, T, _ = x.shape
        q = rotate(self.q(x).reshape(B, T, self.heads, self.head_dim), rotation)
        k = _by_head(rotate(self.k(x).reshape(B, T, self.kv_heads, self.head_dim), rotation))
        v = _by_head(self.v(x).reshape(B, T, self.kv_heads, self.head_dim))
        if cache is not None:
            flat = (B * self.kv_heads, T, self.head_dim)
            written = cache.write(k.reshape(flat), v.reshape(flat), start)
            if start is not None:
                k, v = (slots.reshape(B, self.kv_heads, *slots.shape[1:]) for slots in written.read(x.dtype))
            cache = written
        out = attention(q, k, v, mask, dropout=self.dropout, dropout_key=dropout_key)
        return self.o(out.reshape(B, T, -1)), cache


def _by_head(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    return x.transpose(0, 2, 1, 3)
