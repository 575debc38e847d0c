"""The routed experts on few tokens: no rows, no sort, no loop whose length depends on the data.

Start at `form`. On a GPU each step of sorting and gathering is a launch, and such a loop asks the host: in a decode
step they would take longer than reading the experts.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels.operand import Experts, Inputs, as_sum, swiglu

Form: TypeAlias = Callable[[Array, Array, Array, Experts, str], Array]  # of (x, ids, weights, experts, activation)

# Tokens up to which all experts serve all tokens: their matmuls still take as long as reading the weights, and what is
# written between them is a tenth of that (16B; by arithmetic, not measured on a GPU yet).
_FEW: Final = 32


def form(platform: str, tokens: int, kept: int, experts: int) -> Form | None:
    """The form for a kind of device ("cpu", "gpu", "tpu"); None: the tokens are many, sort them."""
    if platform != "gpu" or tokens > _FEW:
        return None
    return by_choice if tokens * kept <= experts else by_expert


@jax.named_scope("few_tokens")
def by_choice(
    x: Float[Array, "M D"], ids: Int[Array, "M A"], weights: Float[Array, "M A"], experts: Experts, activation: str
) -> Float[Array, "M D"]:
    """Each choice as matrix-vector products with its own expert; an expert that two tokens chose is read twice.

    As products and sums, not as dots: so that XLA reads the weights where they lie; a dot would be given a copy.
    Choices of an id that is no expert's count for nothing. In fp32.
    """

    def one(x: Array, weight: Array, expert: Array) -> Array:
        own = jax.tree.map(lambda leaf: leaf[expert], experts)
        return swiglu(Inputs(x[None], weight[None], own), activation, as_sum)[0]

    count = jax.tree.leaves(experts)[0].shape[0]
    of_a_token = jax.vmap(one, in_axes=(None, 0, 0))
    y = jax.vmap(of_a_token)(x, weights, ids.clip(max=count - 1))
    return jnp.where((ids < count)[:, :, None], y, 0).sum(axis=1)


@jax.named_scope("few_tokens")
def by_expert(
    x: Float[Array, "M D"], ids: Int[Array, "M A"], weights: Float[Array, "M A"], experts: Experts, activation: str
) -> Float[Array, "M D"]:
    """All experts on all tokens as batched matmuls; what nobody chose is left out of the sum. In fp32."""
    count = jax.tree.leaves(experts)[0].shape[0]
    chosen = ids[None, :, :] == jnp.arange(count)[:, None, None]
    by_token = jnp.where(chosen, weights[None], 0).sum(axis=2)
    y = jax.vmap(lambda weights, own: swiglu(Inputs(x, weights, own), activation))(by_token, experts)
    return jnp.where(chosen.any(axis=2)[:, :, None], y, 0).sum(axis=0)
