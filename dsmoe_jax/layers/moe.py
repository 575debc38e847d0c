"""The DeepSeekMoE feed-forward layer: shared experts, a softmax router, routed experts.

Read `MoE.__call__` first; every other name in it is one of its steps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.expert_ffn import expert_ffn
from dsmoe_jax.layers.dispatch import combine, dispatch, route_rows
from dsmoe_jax.layers.mlp import MLP
from dsmoe_jax.layers.router import Router, Routing
from dsmoe_jax.layers.weights import Initializer, weight


class RoutedExperts(nnx.Module):
    """The weights of E small SwiGLUs, stacked; each row visits its own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        initializer, axes = (
            Initializer("normal", config.initializer_range),
            ("experts", "expert_ffn", "embed"),
        )
        self.activation = config.hidden_act
        self.gate = weight(rngs, (E, F, D), axes, initializer, dtype)
        self.up = weight(rngs, (E, F, D), axes, initializer, dtype)
        self.down = weight(rngs, (E, D, F), ("experts", "embed", "expert_ffn"), initializer, dtype)

    def __call__(self, x: Float[Array, "M D"], routing: Routing) -> Float[Array, "M D"]:
        """The weighted sum of each token's chosen experts."""
        A = routing.ids.shape[-1]
        order = route_rows(routing.ids.reshape(-1, A), self.gate.shape[0])
        rows = expert_ffn(
            dispatch(x, order),
            self.gate[...],
            self.up[...],
            self.down[...],
            order.group_sizes,
            activation=self.activation,
        )
        return combine(rows, routing.weights.reshape(-1, A), order)


class MoE(nnx.Module):
    """Every token visits all shared experts, unweighted, and its A best routed experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.router = Router(config, rngs=rngs, dtype=dtype)
        self.experts = RoutedExperts(config, rngs=rngs, dtype=dtype)
        shared = config.n_shared_experts
        self.shared = (
            MLP(config, shared * config.moe_intermediate_size, rngs=rngs, dtype=dtype) if shared is not None else None
        )

    @jax.named_scope("moe")
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns the layer's output and what the router decided."""
        routing = self.router(x)
        y = self.experts(x.reshape(-1, x.shape[-1]), routing).reshape(x.shape)
        return (y if self.shared is None else y + self.shared(x)), routing
