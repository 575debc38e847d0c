"""How a weight is declared: shape, logical axes and initialiser in one line. And `Linear`, made of it."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, dtype) -> nnx.Param:
    """A weight drawn from N(0, std²) with the logical name of each of its axes."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape)).astype(dtype), logical_axes=axes)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], bound: float, dtype) -> nnx.Param:
    """A weight drawn from U(-bound, bound)."""
    drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    return nnx.Param(drawn.astype(dtype), logical_axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype) -> nnx.Param:
    """A weight that starts as `value` everywhere."""
    return nnx.Param(jnp.full(shape, value, dtype), logical_axes=axes)


class Linear(nnx.Module):
    """y = x Wᵀ + b. W lies as in PyTorch, [out, in]: import is a copy, and decode reads rows at memory speed."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        std: float,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
    ):
        self.weight = normal(rngs, shape, axes, std, dtype)
        self.bias = constant(0, shape[:1], axes[:1], dtype) if bias else None

    def __call__(self, x: Float[Array, "*tokens i"]) -> Float[Array, "*tokens o"]:
        """Apply to the last axis."""
        y = jnp.einsum("...i,oi->...o", x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))
