"""The SwiGLU feed-forward: a dense layer, or the shared experts of a MoE layer as one SwiGLU."""

import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS
from dsmoe_jax.layers.weights import Linear


class MLP(nnx.Module):
    """down(act(gate x) · up x), without biases."""

    def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.activation = config.hidden_act
        D, options = config.hidden_size, {"std": config.initializer_range, "rngs": rngs, "dtype": dtype}
        self.gate = Linear((width, D), ("ffn", "embed"), **options)
        self.up = Linear((width, D), ("ffn", "embed"), **options)
        self.down = Linear((D, width), ("embed", "ffn"), **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Compute the layer."""
        return self.down(ACTIVATION_FUNCTIONS[self.activation](self.gate(x)) * self.up(x))
