"""The router: which experts a token visits, and how much each counts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.layers.weights import Initializer, weight


class Routing(NamedTuple):
    """What one MoE layer's router decided; balance losses are computed from it, elsewhere.

    `ids` are by falling weight, ties by id; `scores` are the softmax over all experts, never renormalised.
    """

    weights: Float[Array, "B T A"]
    ids: Int[Array, "B T A"]
    scores: Float[Array, "B T E"]
    extra_passes: Int[Array, ""] | int = 0  # that dispatch over a mesh needed after the first; see `layers.dispatch`


class Router(nnx.Module):
    """Scores every expert for every token and keeps the best A.

    The weights are the raw softmax over *all* experts, so a token's sum to less than one, unless `norm_topk_prob`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        assert config.num_experts_per_tok is not None
        self.num_kept = config.num_experts_per_tok
        # With one expert per token there is nothing to normalise over: the original leaves the raw score.
        self.normalise = config.norm_topk_prob and self.num_kept > 1
        # The original's init reaches every weight but this one, which keeps PyTorch's default for linear layers.
        shape, bound = (config.n_routed_experts, config.hidden_size), config.hidden_size**-0.5
        self.weight = weight(rngs, shape, (None, "embed"), Initializer("uniform", bound), dtype)

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "B T D"], bias: Float[Array, "E"] | None = None) -> Routing:
        """Route every token.

        `bias` is added to the scores where the best A are chosen, and nowhere else: balancing without a loss (arXiv
        2408.15664), not of DeepSeekMoE v1, whose checkpoints have no place for it.
        """
        # fp32: near-ties decide which expert runs, and bf16 breaks them differently.
        logits = jnp.einsum(
            "btd,ed->bte", x.astype(jnp.float32), self.weight[...].astype(jnp.float32), precision="highest"
        )
        scores = jax.nn.softmax(logits, axis=-1)
        if bias is None:
            kept, ids = jax.lax.top_k(scores, self.num_kept)
        else:
            ids = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias[None, None, :], self.num_kept)[1]
            kept = jnp.take_along_axis(scores, ids, axis=-1)
        if self.normalise:
            kept = kept / (kept.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(kept, ids, scores)
