"""The router: the top-k experts of each token and their weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.layers.weights import Initializer, weight


class Routing(NamedTuple):
    """The router's output of an MoE layer."""

    weights: Float[Array, "B T K"]  # of each token's top-k experts
    ids: Int[Array, "B T K"]  # by descending weight, ties by ascending id
    scores: Float[Array, "B T E"]  # softmax over all experts, not renormalized
    overflow_passes: Int[Array, ""] | int = 0  # see `layers.token_dispatcher`


class Router(nnx.Module):
    """Top-k softmax router; without `norm_topk_prob` the softmax is over all experts, so weights sum to less than 1."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        assert config.num_experts_per_tok is not None
        self.top_k = config.num_experts_per_tok
        # The original does not normalize top-1.
        self.normalize = config.norm_topk_prob and self.top_k > 1
        # The original initializes this weight alone by PyTorch's default for linear layers.
        shape, bound = (config.n_routed_experts, config.hidden_size), config.hidden_size**-0.5
        self.weight = weight(rngs, shape, (None, "embed"), Initializer("uniform", bound), dtype)

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "E"] | None = None) -> Routing:
        """Route every token; `bias` affects the selection only: loss-free balancing (arXiv 2408.15664), not in v1."""
        # fp32: near-ties decide which expert runs, and bf16 breaks them differently.
        x32, weight = x.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        logits = jnp.einsum("btd,ed->bte", x32, weight, precision="highest")
        scores = jax.nn.softmax(logits, axis=-1)
        if bias is None:
            weights, ids = jax.lax.top_k(scores, self.top_k)
        else:
            ids = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias[None, None, :], self.top_k)[1]
            weights = jnp.take_along_axis(scores, ids, axis=-1)
        if self.normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(weights, ids, scores)
