"""The router: the top-k experts of each token and their weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.layers.weights import Initializer, weight


class Routing(NamedTuple):
    """The router's output of one MoE layer. Balance losses are computed from it in `train`.

    Attributes:
      weights: The weight of each of a token's top-k experts.
      ids: Their ids, by descending weight, ties by ascending id.
      scores: The softmax over all experts, never renormalized.
      overflow_passes: Passes after the first that dispatch over a mesh needed; see `layers.token_dispatcher`.
    """

    weights: Float[Array, "B T K"]
    ids: Int[Array, "B T K"]
    scores: Float[Array, "B T E"]
    overflow_passes: Int[Array, ""] | int = 0


class Router(nnx.Module):
    """Scores every expert for every token and selects the top k.

    Weights are the softmax over *all* experts, so those of a token sum to less than one, unless `norm_topk_prob`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        assert config.num_experts_per_tok is not None
        self.top_k = config.num_experts_per_tok
        # The original leaves the raw score of a single expert per token.
        self.normalize = config.norm_topk_prob and self.top_k > 1
        # The original initializes every weight but this one, which has PyTorch's default for linear layers.
        shape, bound = (config.n_routed_experts, config.hidden_size), config.hidden_size**-0.5
        self.weight = weight(rngs, shape, (None, "embed"), Initializer("uniform", bound), dtype)

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "E"] | None = None) -> Routing:
        """Route every token.

        `bias` is added to the scores for the top-k selection alone: loss-free balancing (arXiv 2408.15664), not part of
        DeepSeekMoE v1 and its checkpoints.
        """
        # fp32: near-ties decide which expert runs, and bf16 breaks them differently.
        logits = jnp.einsum(
            "btd,ed->bte", x.astype(jnp.float32), self.weight[...].astype(jnp.float32), precision="highest"
        )
        scores = jax.nn.softmax(logits, axis=-1)
        if bias is None:
            weights, ids = jax.lax.top_k(scores, self.top_k)
        else:
            ids = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias[None, None, :], self.top_k)[1]
            weights = jnp.take_along_axis(scores, ids, axis=-1)
        if self.normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(weights, ids, scores)
