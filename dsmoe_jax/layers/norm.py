"""RMSNorm."""

import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float
from dsmoe_jax.layers.weights import Initializer, weight


class RMSNorm(nnx.Module):
    """x / rms(x), in fp32 and rounded back to x's dtype, and only then times the weight: the original's order."""

    def __init__(self, width: int, *, eps: float | int, rngs: nnx.Rngs, dtype=jnp.float32):
        self.eps = eps
        self.weight = weight(rngs, (width,), ("embed",), Initializer("constant", 1), dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise the last axis."""
        x32 = x.astype(jnp.float32)
        normal = x32 / jnp.sqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.weight[...][None, None, :]
