"""Backends without a loop, differentiated by JAX: grouped matmuls (`grouped`, `ragged`), and all experts (`dense`)."""

import functools
from collections.abc import Callable, Sequence
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels import grouped_matmul
from dsmoe_jax.kernels.operand import Inputs, dequantize_all, expert_of_rows, swiglu
from dsmoe_jax.kernels.tuning import Legs

RAGGED: Final = Legs("ragged", "ragged", "ragged")
# Implementations in order of preference, by tokamax's tables for an H100 (Mosaic: 290-420 TFLOP/s for fwd and dgrad,
# 110 for wgrad); not measured here.
_GROUPED: Final = Legs("tokamax pallas", "tokamax pallas", "pallas tokamax")


def grouped_legs() -> Legs:
    """Return the implementations that `grouped` uses here; raise with the reasons if none can run."""
    return Legs(*(_first_available(names.split()) for names in _GROUPED))


def _first_available(names: Sequence[str]) -> str:
    reasons = {name: grouped_matmul.available(name) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise DSMoEError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def forward_by_groups(legs: Callable[[], Legs], inputs: Inputs, group_sizes: Array, activation: str) -> Array:
    """Compute SwiGLU as three grouped matmuls (more for low-rank operands)."""
    dot = functools.partial(_grouped_dot, legs(), group_sizes)
    return swiglu(dequantize_all(inputs), activation, dot).astype(inputs.rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(legs: Legs, group_sizes: Array, rows: Array, weights: Array) -> Array:
    """`operand.dot` as a grouped matmul; JAX differentiates low-rank and quantized operands around it."""
    return grouped_matmul.gmm(rows, weights, group_sizes, implementation=legs.fwd, out_dtype=jnp.float32)


def _grouped_dot_backward(legs: Legs, saved: tuple[Array, ...], grad: Array):
    group_sizes, rows, weights = saved
    grad = grad.astype(rows.dtype)  # else bf16 operands would be multiplied in fp32
    return (
        None,
        grouped_matmul.gmm_transposed(grad, weights, group_sizes, implementation=legs.dgrad),
        grouped_matmul.tgmm(grad, rows, group_sizes, implementation=legs.wgrad).astype(weights.dtype),
    )


_grouped_dot.defvjp(lambda legs, *operands: (_grouped_dot(legs, *operands), operands), _grouped_dot_backward)


def forward_dense(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str) -> Float[Array, "R D"]:
    """Compute every expert on every row in fp32 and select one per row: the reference."""
    expert, valid = expert_of_rows(group_sizes, len(inputs.rows))
    exact = inputs._replace(rows=inputs.rows.astype(jnp.float32))
    per_expert = jax.vmap(lambda operands: swiglu(exact._replace(experts=operands), activation))(inputs.experts)
    y = jnp.take_along_axis(per_expert, expert[None, :, None], axis=0)[0]
    return jnp.where(valid[:, None], y, 0).astype(inputs.rows.dtype)
