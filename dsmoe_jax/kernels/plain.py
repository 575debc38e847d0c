"""The backends that need no loop of their own: one expression over all rows, differentiated by JAX.

`grouped` and `ragged` multiply sorted rows by the weights of all experts, `slots` fetches the weights of each row,
`dense` multiplies every row by every expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels import grouped_matmul
from dsmoe_jax.kernels.operand import Inputs, Wanted, as_sum, dequantize_all, expert_of_rows, swiglu

Forward = Callable[[Inputs, Array, str], Array]


class MatmulLegs(NamedTuple):
    """The implementation of each leg of a grouped matmul, see `grouped_matmul.IMPLEMENTATIONS`."""

    forward: str
    rows: str
    weights: str


RAGGED: Final = MatmulLegs("ragged", "ragged", "ragged")
# In order of preference, the first that runs here is taken, leg by leg. Not measured on a GPU yet; others' tables for
# an H100 (tokamax) give Mosaic 290-420 TFLOP/s for forward and rows, and 110 for weights.
_GROUPED: Final = MatmulLegs("tokamax pallas", "tokamax pallas", "pallas tokamax")


def grouped_legs() -> MatmulLegs:
    """What `grouped` runs on here. Raises `ValueError` with the reasons where nothing does."""
    return MatmulLegs(*(_first_available(names.split()) for names in _GROUPED))


def _first_available(names: Sequence[str]) -> str:
    reasons = {name: grouped_matmul.available(name) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def forward_by_groups(legs: Callable[[], MatmulLegs], inputs: Inputs, group_sizes: Array, activation: str) -> Array:
    """SwiGLU as three grouped matmuls (more where operands are low-rank)."""
    experts = dequantize_all(inputs.experts)
    dot = functools.partial(_grouped_dot, legs(), group_sizes)
    return swiglu(inputs._replace(experts=experts), activation, dot).astype(inputs.rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_dot(legs: MatmulLegs, group_sizes: Array, rows: Array, weights: Array) -> Array:
    return grouped_matmul.gmm(rows, weights, group_sizes, implementation=legs.forward, out_dtype=jnp.float32)


def _grouped_dot_backward(legs: MatmulLegs, saved: tuple[Array, ...], grad: Array):
    group_sizes, rows, weights = saved
    grad = grad.astype(rows.dtype)  # else bf16 would be multiplied as fp32
    return (
        None,
        grouped_matmul.gmm_transposed(grad, weights, group_sizes, implementation=legs.rows),
        grouped_matmul.tgmm(grad, rows, group_sizes, implementation=legs.weights).astype(weights.dtype),
    )


_grouped_dot.defvjp(
    lambda legs, group_sizes, rows, weights: (
        _grouped_dot(legs, group_sizes, rows, weights),
        (group_sizes, rows, weights),
    ),
    _grouped_dot_backward,
)


def forward_by_slots(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str) -> Float[Array, "R D"]:
    """Every row with its own expert's weights, as R matrix-vector products: for few rows on a GPU.

    The number of slots is R whatever the routing, so the host is asked nothing. As products and sums, not as dots: so
    that XLA can read the weights where they lie; a dot would be given a gathered copy.
    """

    def one_row(row: Array, weight: Array | None, expert: Array) -> Array:
        own = jax.tree.map(lambda leaf: leaf[expert], inputs.experts)
        weight = None if weight is None else weight[None]
        return swiglu(Inputs(row[None], weight, own), activation, as_sum)[0]

    expert, has_one = expert_of_rows(group_sizes, len(inputs.rows))
    y = jax.vmap(one_row)(inputs.rows, inputs.weights, expert)
    return jnp.where(has_one[:, None], y, 0).astype(inputs.rows.dtype)


def forward_dense(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str) -> Float[Array, "R D"]:
    """Every expert on every row, in fp32, then the right one kept: the oracle."""
    expert, has_one = expert_of_rows(group_sizes, len(inputs.rows))
    exact = inputs._replace(rows=inputs.rows.astype(jnp.float32))
    per_expert = jax.vmap(lambda own: swiglu(exact._replace(experts=own), activation))(inputs.experts)
    y = jnp.take_along_axis(per_expert, expert[None, :, None], axis=0)[0]
    return jnp.where(has_one[:, None], y, 0).astype(inputs.rows.dtype)


def backward_of(forward: Forward) -> Callable[..., list[Array]]:
    """The gradients of the wanted leaves by JAX's own differentiation of `forward`, which is run again."""

    def backward(inputs: Inputs, group_sizes: Array, activation: str, grad_out: Array, wanted: Wanted) -> list[Array]:
        return wanted.gradients(lambda inputs: forward(inputs, group_sizes, activation), inputs, grad_out)

    return backward
