"""The DeepSeekMoE feed-forward layer: shared experts, a softmax router, routed experts.

Read `MoE.__call__` first; every other name in it is one of its steps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Bool, Float
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import EXPERT_AXES, Experts
from dsmoe_jax.layers.mlp import MLP
from dsmoe_jax.layers.router import Router, Routing
from dsmoe_jax.layers.token_dispatcher import Dispatch, routed_experts
from dsmoe_jax.layers.weights import Initializer, weight


class RoutedExperts(nnx.Module):
    """The weights of E small SwiGLUs, stacked; `set_attributes(dispatch=Dispatch(…))` says how they are reached."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        initializer = Initializer("normal", config.initializer_range)
        self.activation = config.hidden_act
        self.dispatch = Dispatch()
        gate, up, down = EXPERT_AXES
        self.gate = weight(rngs, (E, F, D), gate, initializer, dtype)
        self.up = weight(rngs, (E, F, D), up, initializer, dtype)
        self.down = weight(rngs, (E, D, F), down, initializer, dtype)

    def __call__(
        self, x: Float[Array, "B T D"], routing: Routing, real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The weighted sum of each token's chosen experts, and the routing with the number of extra passes.

        Tokens that are not `real` visit nobody: no expert is read for their sake.
        """
        visited = routing.ids if real is None else jnp.where(real[:, :, None], routing.ids, routing.scores.shape[-1])
        ids, weights = (choice.reshape(-1, choice.shape[-1]) for choice in (visited, routing.weights))
        experts = Experts(self.gate.get_value(), self.up.get_value(), self.down.get_value())
        y, extra_passes = routed_experts(
            x.reshape(-1, x.shape[-1]), ids, weights, experts, activation=self.activation, options=self.dispatch
        )
        return y.reshape(x.shape), routing._replace(extra_passes=extra_passes)


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
    def __call__(
        self,
        x: Float[Array, "B T D"],
        router_bias: Float[Array, "E"] | None = None,
        real: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns the layer's output and what the router decided."""
        y, routing = self.experts(x, self.router(x, router_bias), real)
        return (y if self.shared is None else y + self.shared(x)), routing
