"""RMSNorm."""

import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float
from dsmoe_jax.layers.weights import Initializer, weight


class RMSNorm(nnx.Module):
    """x / rms(x) in fp32, cast to x's dtype, then times the weight: the order of the original."""

    def __init__(self, width: int, *, eps: float | int, rngs: nnx.Rngs, dtype=jnp.float32):
        self.eps = eps
        self.weight = weight(rngs, (width,), ("embed",), Initializer("constant", 1), dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalize the last axis."""
        x32 = x.astype(jnp.float32)
        normalized = x32 / jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normalized.astype(x.dtype) * self.weight[...][None, None, :]
