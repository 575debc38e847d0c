"""Declaration of weights (shape, logical axes, initializer), and the `Linear` layer."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float, PRNGKeyArray
from dsmoe_jax.kernels.matmul import matmul
from dsmoe_jax.kernels.operand import LowRank, Operand, Quantized, linear


class Initializer(NamedTuple):
    """The distribution of initial values: N(0, scale²), U(-scale, scale), or the constant `scale`."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> Array:
        """Draw initial values; traceable."""
        match self.kind:
            case "normal":
                return (self.scale * jax.random.normal(key, shape)).astype(dtype)
            case "uniform":
                return jax.random.uniform(key, shape, minval=-self.scale, maxval=self.scale).astype(dtype)
            case "constant":
                return jnp.full(shape, self.scale, dtype)


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], initializer: Initializer, dtype
) -> nnx.Param:
    """Create a weight with logical axes, which `sharding.py` maps to the mesh."""
    return nnx.Param(_draw(initializer, rngs.params(), shape, dtype), logical_axes=axes, initializer=initializer)


# One program per shape: random bits take seconds to compile.
_draw = functools.partial(jax.jit, static_argnums=(0, 2, 3))(Initializer.draw)


def cast(value: Operand, dtype) -> Operand:
    """Cast dense weights; kernels cast quantized and low-rank ones."""
    match value:
        case LowRank(base, a, b):
            return LowRank(cast(base, dtype), a, b)
        case Quantized():
            return value
        case _:
            return value.astype(dtype)


class Linear(nnx.Module):
    """y = x Wᵀ + b. W is any operand (`kernels.operand`), [out, in] as in PyTorch: decode reads rows sequentially."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        *,
        std: float | int,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
    ):
        self.weight = weight(rngs, shape, axes, Initializer("normal", std), dtype)
        self.bias = weight(rngs, shape[:1], axes[:1], Initializer("constant", 0), dtype) if bias else None

    def __call__(self, x: Float[Array, "*tokens i"]) -> Float[Array, "*tokens o"]:
        """Apply to the last axis."""
        y = linear(x, self.weight.get_value(), matmul).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))
