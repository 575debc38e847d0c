"""What is minimised: the cross-entropy of the next token and the balance loss of every MoE layer."""

from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.layers.router import Routing

IGNORED: Final = -100  # a label that counts for nothing


def cross_entropy(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean over all labels but the ignored ones; labels are the token ids, the shift by one happens here.

    The labels are shifted, not the logits, and the target is picked by comparison: no copy of [B, T, V], forth or back.
    """
    logits = logits.astype(jnp.float32)
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    counted = targets != IGNORED
    is_target = targets[:, :, None] == jnp.arange(logits.shape[-1])[None, None, :]
    picked = jnp.where(is_target, logits, 0).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(counted, losses, 0).sum() / counted.sum()


def balance_loss(config: ModelConfig, routing: Mapping[int, Routing]) -> dict[int, Float[Array, ""]]:
    """The expert-level balance loss of each MoE layer, α · Σ_e f_e · P_e (arXiv 2401.06066, eq. 12 to 14).

    P_e is the mean score of expert e, f_e its share of the choices times E; both over each sequence and then averaged
    (`seq_aux`), or over the whole batch. Padding counts, as in the original. f carries no gradient.
    """
    return {layer: _expert_balance(config, routed) for layer, routed in routing.items()}


def _expert_balance(config: ModelConfig, routed: Routing) -> Float[Array, ""]:
    B, _, E = routed.scores.shape
    sequences = B if config.seq_aux else 1
    scores = routed.scores.reshape(sequences, -1, E).mean(axis=1)
    chosen = jax.nn.one_hot(routed.ids.reshape(sequences, -1), E).mean(axis=1) * E
    return config.aux_loss_alpha * (chosen * scores).sum(axis=1).mean()
