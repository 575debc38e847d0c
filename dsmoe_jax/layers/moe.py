"""The DeepSeekMoE feed-forward layer: shared experts, a softmax router, routed experts. Start at `MoE.__call__`."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import EXPERT_AXES, Experts
from dsmoe_jax.layers.mlp import MLP
from dsmoe_jax.layers.router import Router, Routing
from dsmoe_jax.layers.token_dispatcher import DispatchConfig, routed_experts
from dsmoe_jax.layers.weights import Initializer, weight


class RoutedExperts(nnx.Module):
    """The stacked weights of E SwiGLUs; `set_attributes(dispatch=DispatchConfig(…))` configures token dispatch."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        initializer = Initializer("normal", config.initializer_range)
        self.activation = config.hidden_act
        self.dispatch = DispatchConfig()
        gate, up, down = EXPERT_AXES
        self.gate = weight(rngs, (E, F, D), gate, initializer, dtype)
        self.up = weight(rngs, (E, F, D), up, initializer, dtype)
        self.down = weight(rngs, (E, D, F), down, initializer, dtype)

    def __call__(
        self, x: Float[Array, "B T D"], routing: Routing, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Return the weighted sum of each token's top-k experts, and the routing with the number of overflow passes.

        Padding tokens (not `valid`) are not routed, so their experts are never read.
        """
        ids = routing.ids if valid is None else jnp.where(valid[:, :, None], routing.ids, routing.scores.shape[-1])
        ids, weights = (values.reshape(-1, values.shape[-1]) for values in (ids, routing.weights))
        experts = Experts(self.gate.get_value(), self.up.get_value(), self.down.get_value())
        y, overflow_passes = routed_experts(
            x.reshape(-1, x.shape[-1]), ids, weights, experts, activation=self.activation, config=self.dispatch
        )
        return y.reshape(x.shape), routing._replace(overflow_passes=overflow_passes)


class MoE(nnx.Module):
    """The shared experts, unweighted, plus the weighted top-k routed experts of every token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.router = Router(config, rngs=rngs, dtype=dtype)
        self.experts = RoutedExperts(config, rngs=rngs, dtype=dtype)
        shared = config.n_shared_experts
        width = (shared or 0) * config.moe_intermediate_size
        self.shared = MLP(config, width, rngs=rngs, dtype=dtype) if width else None
        self.use_shared = True  # see `layers.ablation`

    @jax.named_scope("moe")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        router_bias: Float[Array, "E"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        assigned: Int[Array, "B T 1"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Return the output and the routing; padding tokens (not `valid`) are not routed."""
        y, routing = self.experts(x, self.router(x, router_bias, assigned), valid)
        return (y + self.shared(x) if self.shared is not None and self.use_shared else y), routing
