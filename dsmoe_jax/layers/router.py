"""The router: the experts of each token and their weights. Start at `Router.__call__`."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which of the ranked experts of a token a router selects.

    Attributes:
        top_k: Number of experts.
        skip: Experts of the highest scores that are left out.
        disabled: Experts that are left out for every token.
    """

    top_k: int
    skip: int = 0
    disabled: tuple[int, ...] = ()


class Router(nnx.Module):
    """Top-k softmax router; without `norm_topk_prob` the softmax is over all experts, so weights sum to less than 1.

    With `config.hash_routing` it has no weight: experts are assigned by `hash_experts`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        assert config.n_routed_experts is not None
        assert config.num_experts_per_tok is not None
        self.experts = config.n_routed_experts
        self.selection = Selection(config.num_experts_per_tok)
        # The original does not normalize top-1.
        self.normalize = config.norm_topk_prob and config.num_experts_per_tok > 1
        # The original initializes this weight alone by PyTorch's default for linear layers.
        shape, bound = (config.n_routed_experts, config.hidden_size), config.hidden_size**-0.5
        initializer = Initializer("uniform", bound)
        self.weight = None if config.hash_routing else weight(rngs, shape, (None, "embed"), initializer, dtype)

    @jax.named_scope("router")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "E"] | None = None,
        assigned: Int[Array, "B T 1"] | None = None,
    ) -> Routing:
        """Route every token.

        Args:
            x: Hidden states.
            bias: Affects the selection only: loss-free balancing (arXiv 2408.15664), not in v1.
            assigned: The expert of each token under hash routing, with weight 1.
        """
        if self.weight is None:
            assert assigned is not None
            return Routing(jnp.ones(assigned.shape), assigned, jax.nn.one_hot(assigned[:, :, 0], self.experts))
        # fp32: near-ties decide which expert runs, and bf16 breaks them differently.
        x32, weight = x.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        logits = jnp.einsum("btd,ed->bte", x32, weight, precision="highest")
        scores = jax.nn.softmax(logits, axis=-1)
        top_k, skip, disabled = dataclasses.astuple(self.selection)
        ranked = scores if bias is None else jax.lax.stop_gradient(scores) + bias[None, None, :]
        if disabled:
            ranked = ranked.at[:, :, list(disabled)].set(-jnp.inf)
        weights, ids = (values[:, :, skip:] for values in jax.lax.top_k(ranked, skip + top_k))
        if ranked is not scores:
            weights = jnp.take_along_axis(scores, ids, axis=-1)
        if self.normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(weights, ids, scores)


def hash_experts(token_ids: Int[Array, "B T"], layer: int, experts: int) -> Int[Array, "B T 1"]:
    """Assign an expert to each token by a hash of its id and the layer: hash routing (arXiv 2106.04426).

    The hash is the finalizer of MurmurHash3, so that the assignment depends on no random number generator.
    """
    x = token_ids.astype(jnp.uint32) + jnp.uint32(layer * 0x9E3779B9 % (1 << 32))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return (x % experts).astype(jnp.int32)[:, :, None]
