"""The minimum operations and bytes of a task, by arithmetic. No jax or torch.

A floor is the larger of operations over the measured matmul rate and bytes over the measured bandwidth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe_jax.config import ModelConfig
from tests.benchmarks import plan


def expert_flops(rows: int, width: int, hidden: int, legs: int = 1) -> int:
    """Count the FLOPs of a SwiGLU over routed rows: three matmuls per leg (fwd, dgrad, wgrad)."""
    return legs * 6 * rows * width * hidden


def train_flops(config: ModelConfig, rows: int, tokens: int, *, frozen: bool = False) -> int:
    """Count the FLOPs of a train step, without recomputation; backward costs 2× forward, 1× if weights are `frozen`."""
    return (2 if frozen else 3) * plan.flops(config, rows, tokens)


def decode_flops(config: ModelConfig, rows: int, held: int) -> int:
    """Count the FLOPs of a decode step with `held` keys per query, including the new token."""
    per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return plan.flops(config, rows, 1) + rows * (held - 1) * per_key


def hit_by_chance(config: ModelConfig, rows: int) -> float:
    """Return the expected number of activated experts per layer under random routing."""
    E, A = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    return E * (1 - (1 - A / E) ** rows) if E else 0.0


def decode_bytes(
    config: ModelConfig, sizes: Mapping[str, int], rows: int, tokens: int, hits: Sequence[float], width: int
) -> int:
    """Count the bytes that a decode step reads: weights, activated experts, cached keys and values.

    `sizes` are the bytes of each parameter, `hits` the activated experts of each MoE layer, `width` the bytes of a
    cached value.
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
    """Count the cached bytes of a token over all layers."""
    return 2 * config.num_hidden_layers * config.num_kv_heads * config.head_dim * width


def group_sizes(tokens: int, experts: int, kept: int, *, skewed: bool) -> np.ndarray:
    """Return the rows of each expert, int32 [E]: uniform routing, or skewed by k^-½ for the k-th expert."""
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
    """Return the floor of a row in seconds; None if its work or a ceiling is unknown."""
    parts = []
    if row.get("flops") and ceilings.get("matmul"):
        parts.append(row["flops"] / ceilings["matmul"])
    if row.get("bytes") and (bandwidth := max(ceilings.get("copy", 0), ceilings.get("read", 0))):
        parts.append(row["bytes"] / bandwidth)
    return max(parts, default=None)
