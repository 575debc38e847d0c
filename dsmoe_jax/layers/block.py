"""A pre-norm decoder block: attention, then a dense or MoE feed-forward, each with a residual connection."""

import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Bool, Float, Int, PRNGKeyArray
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.attention import CausalMask
from dsmoe_jax.kv_cache import LayerCache
from dsmoe_jax.layers.attention import Attention
from dsmoe_jax.layers.mlp import MLP
from dsmoe_jax.layers.moe import MoE
from dsmoe_jax.layers.norm import RMSNorm
from dsmoe_jax.layers.rope import Rotation
from dsmoe_jax.layers.router import Routing


class Block(nnx.Module):
    """x + attention(norm x), then x + feed_forward(norm x), where the latter is `mlp` or `moe` (the other is None)."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        is_moe = config.is_moe_layer(layer)
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, rngs=rngs, dtype=dtype)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, rngs=rngs, dtype=dtype)
        self.mlp = None if is_moe else MLP(config, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.moe = MoE(config, rngs=rngs, dtype=dtype) if is_moe else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        mask: CausalMask,
        cache: LayerCache | None = None,
        start: Int[Array, "B"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
        router_bias: Float[Array, "E"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        assigned: Int[Array, "B T 1"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Routing | None]:
        """Return the states, the updated cache (None without one) and the routing (None for a dense block)."""
        y, cache = self.attention(self.attention_norm(x), rotation, mask, cache, start, dropout_key)
        x = x + y
        if self.moe is not None:
            y, routing = self.moe(self.ffn_norm(x), router_bias, valid, assigned)
        else:
            assert self.mlp is not None
            y, routing = self.mlp(self.ffn_norm(x)), None
        return x + y, cache, routing
