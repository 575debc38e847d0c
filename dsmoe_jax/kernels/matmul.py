"""The matmul with a weight [out, in], as in PyTorch."""

import functools
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Shaped
from dsmoe_jax.kernels.matvec import matvec

_FEW: Final = 64  # tokens
_FEW_NARROW: Final = 16


def matmul(
    x: Float[Array, "*tokens i"], weight: Shaped[Array, "o i"], preferred_element_type=None
) -> Float[Array, "*tokens o"]:
    """Compute x Wᵀ; int8 codes and fp16 are cast to x's dtype.

    Few tokens on CPU use (W xᵀ)ᵀ, as XLA's matmul is faster with the large operand untransposed on the left: 1.3 to
    2.2× for 2 to 32 tokens (jax 0.10.1 and 0.12, 2 cores). Up to 16 tokens multiply narrow weights per token: a
    matrix-vector product fuses the cast (a decode step of `bench` at batch 8 takes 0.85 of the fp32 time instead of
    1.3; on jax 0.12, 0.93).
    """
    I = x.shape[-1]  # noqa: E741
    on_cpu = jax.default_backend() == "cpu"
    narrow = weight.dtype == jnp.int8 or (weight.dtype, x.dtype) == (jnp.float16, jnp.float32)
    if narrow and on_cpu and x.size <= _FEW_NARROW * I:
        y = jax.lax.map(functools.partial(_one_token, weight), x.reshape(-1, I))
        return y.reshape(*x.shape[:-1], len(weight)).astype(preferred_element_type or x.dtype)
    weight = weight.astype(x.dtype) if narrow else weight
    if not on_cpu or x.size > _FEW * I:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=preferred_element_type)
    y = jnp.einsum("oi,ti->ot", weight, x.reshape(-1, I), preferred_element_type=preferred_element_type)
    # Without the barrier XLA folds the transposition back into the matmul.
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], len(weight))


def _one_token(weight: Array, x: Array) -> Array:
    """Multiply behind a barrier, else XLA casts the whole weight before the loop (jax 0.12 does so regardless)."""
    weight, x = jax.lax.optimization_barrier((weight, x))
    return matvec(x, weight)
