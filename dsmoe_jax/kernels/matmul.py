"""The matmul with a weight that lies as in PyTorch, [out, in]."""

import functools
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Shaped

_FEW: Final = 64  # tokens
_FEW_OF_CODES: Final = 16


def matmul(
    x: Float[Array, "*tokens i"], weight: Shaped[Array, "o i"], preferred_element_type=None
) -> Float[Array, "*tokens o"]:
    """X Wᵀ; codes of int8 are cast to x's dtype.

    For few tokens on CPU it is computed as (W xᵀ)ᵀ: XLA's matmul wants the large operand on the left and as it lies.
    That is 1.3 to 2.2× as fast for 2 to 32 tokens (jax 0.10.1 and 0.12, 2 cores); for many, turning the result back
    costs more than it brings. Codes are multiplied token by token, up to 16: a matrix-vector product casts them on the
    way (a decode step of `bench` at batch 8 then takes 0.85 of the fp32 time instead of 1.3; on jax 0.12, 0.93).
    """
    I = x.shape[-1]  # noqa: E741
    on_cpu, codes = jax.default_backend() == "cpu", weight.dtype == jnp.int8
    if codes and on_cpu and x.size <= _FEW_OF_CODES * I:
        y = jax.lax.map(functools.partial(_one_token, weight), x.reshape(-1, I))
        return y.reshape(*x.shape[:-1], len(weight)).astype(preferred_element_type or x.dtype)
    weight = weight.astype(x.dtype) if codes else weight
    if not on_cpu or x.size > _FEW * I:
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=preferred_element_type)
    y = jnp.einsum("oi,ti->ot", weight, x.reshape(-1, I), preferred_element_type=preferred_element_type)
    # Without the barrier XLA would fold the transposition back into the matmul.
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], len(weight))


def _one_token(codes: Array, x: Array) -> Array:
    """Behind a barrier, else XLA would cast all codes before the loop; that of jax 0.12 does so all the same."""
    codes, x = jax.lax.optimization_barrier((codes, x))
    return jnp.einsum("i,oi->o", x, codes.astype(x.dtype))
