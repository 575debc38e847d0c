"""The least that a task must do: operations and bytes, by arithmetic. Nothing here needs jax or torch.

A floor is the larger of operations over the measured matmul rate and bytes over the measured bandwidth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe_jax.config import ModelConfig
from tests.benchmarks import plan


def expert_flops(rows: int, width: int, hidden: int, legs: int = 1) -> int:
    """Of a SwiGLU over routed rows: three products a leg; forward, gradient of rows, gradient of weights."""
    return legs * 6 * rows * width * hidden


def train_flops(config: ModelConfig, rows: int, tokens: int, *, frozen: bool = False) -> int:
    """Of a step; the gradient costs twice the forward pass, once where weights are `frozen`. Recomputing is no work."""
    return (2 if frozen else 3) * plan.flops(config, rows, tokens)


def decode_flops(config: ModelConfig, rows: int, held: int) -> int:
    """Of one step whose queries read `held` keys each, their own included."""
    per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return plan.flops(config, rows, 1) + rows * (held - 1) * per_key


def hit_by_chance(config: ModelConfig, rows: int) -> float:
    """How many experts of a layer that many tokens reach if each chooses at random."""
    E, A = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    return E * (1 - (1 - A / E) ** rows) if E else 0.0


def decode_bytes(
    config: ModelConfig, sizes: Mapping[str, int], rows: int, tokens: int, hits: Sequence[float], width: int
) -> int:
    """What one step reads: weights once, of the experts those that were hit, and the keys and values that are held.

    `sizes` are the bytes of each parameter, `hits` the experts hit in each MoE layer, `width` the bytes of a value in
    the cache.
    """
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    hit = experts * sum(hits) / (len(layers) * (config.n_routed_experts or 1)) if layers else 0
    looked_up = rows / config.vocab_size  # of the embedding
    others = sum(
        size * (looked_up if name == "embed" and not config.tie_word_embeddings else 1)
        for name, size in sizes.items()
        if ".experts." not in name
    )
    return int(hit + others + rows * tokens * cache_bytes_per_token(config, width))


def cache_bytes_per_token(config: ModelConfig, width: int) -> int:
    """Keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_kv_heads * config.head_dim * width


def group_sizes(tokens: int, experts: int, kept: int, *, skewed: bool) -> np.ndarray:
    """Rows of each expert, int32 [E]: of a random router, or of one whose k-th expert gets k^-½ as much."""
    rows = tokens * kept
    if not skewed:
        choices = np.random.default_rng(plan.SEED).random((tokens, experts), np.float32)
        chosen = choices.argpartition(kept, axis=1)[:, :kept] if kept < experts else choices.argsort(axis=1)
        return np.bincount(chosen.ravel(), minlength=experts).astype(np.int32)
    share = np.arange(1, experts + 1) ** -0.5
    sizes = np.floor(rows * share / share.sum()).astype(np.int32)
    sizes[: rows - sizes.sum()] += 1
    return sizes


def total(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
    """The floor of a row in seconds; None where its work or a ceiling is not known."""
    parts = []
    if row.get("flops") and ceilings.get("matmul"):
        parts.append(row["flops"] / ceilings["matmul"])
    if row.get("bytes") and (bandwidth := max(ceilings.get("copy", 0), ceilings.get("read", 0))):
        parts.append(row["bytes"] / bandwidth)
    return max(parts, default=None)
