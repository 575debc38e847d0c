"""The routed experts on few tokens, without sorting and without a loop of data-dependent length. Start at `form`.

On a GPU each step of sorting and gathering is a kernel launch, and such a loop synchronizes with the host: in a decode
step they would take longer than reading the experts.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels.operand import Experts, Inputs, as_sum, swiglu

# (x, ids, weights, experts, activation) -> fp32 sums
Form: TypeAlias = Callable[[Array, Array, Array, Experts, str], Array]

# Tokens up to which all experts compute all tokens: the matmuls are bound by reading the weights, and intermediates are
# a tenth of these (16B; by arithmetic, not measured).
_FEW: Final = 32


def form(platform: str, tokens: int, k: int, experts: int) -> Form | None:
    """Choose by tokens (after the all-gather) and experts per device; None, for sorting, on CPU or for many tokens."""
    if platform == "cpu" or tokens > _FEW:
        return None
    return by_choice if tokens * k <= experts else by_expert


@jax.named_scope("few_tokens")
def by_choice(
    x: Float[Array, "M D"], ids: Int[Array, "M K"], weights: Float[Array, "M K"], experts: Experts, activation: str
) -> Float[Array, "M D"]:
    """Compute each (token, expert) pair as matrix-vector products, in fp32; an expert of two tokens is read twice.

    Dots would need a gathered copy of the weights. The id E (no expert) adds nothing.
    """

    def one(x: Array, weight: Array, expert: Array) -> Array:
        operands = jax.tree.map(lambda leaf: leaf[expert], experts)
        return swiglu(Inputs(x[None], weight[None], operands), activation, as_sum)[0]

    count = jax.tree.leaves(experts)[0].shape[0]
    per_token = jax.vmap(one, in_axes=(None, 0, 0))
    y = jax.vmap(per_token)(x, weights, ids.clip(max=count - 1))
    return jnp.where((ids < count)[:, :, None], y, 0).sum(axis=1)


@jax.named_scope("few_tokens")
def by_expert(
    x: Float[Array, "M D"], ids: Int[Array, "M K"], weights: Float[Array, "M K"], experts: Experts, activation: str
) -> Float[Array, "M D"]:
    """Compute all experts on all tokens as batched matmuls and sum the selected ones, in fp32."""
    count = jax.tree.leaves(experts)[0].shape[0]
    chosen = ids[None, :, :] == jnp.arange(count)[:, None, None]
    by_token = jnp.where(chosen, weights[None], 0).sum(axis=2)
    y = jax.vmap(lambda weights, operands: swiglu(Inputs(x, weights, operands), activation))(by_token, experts)
    return jnp.where(chosen.any(axis=2)[:, :, None], y, 0).sum(axis=0)
