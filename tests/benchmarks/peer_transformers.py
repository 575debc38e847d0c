"""The nearest native model of transformers: Qwen2-MoE at the same sizes, with grouped experts. Start at `actions`.

Weights are random, as the architectures differ: Qwen2-MoE has an additional gate on the shared expert.
"""

import inspect
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    AutoModelForCausalLM,
    DynamicCache,
    Qwen2MoeConfig,
)

from dsmoe_jax.config import ModelConfig
from tests.benchmarks import plan
from tests.benchmarks.children import Actions
from tests.benchmarks.torch_tasks import Peer, torch_actions


def actions(task: str, folder: Path) -> Actions:
    """Create a random model of the sizes in the checkpoint's config."""
    torch.manual_seed(plan.SEED)
    config = ModelConfig.from_file(folder)
    model = AutoModelForCausalLM.from_config(
        qwen2_moe_config(config), attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    # Renamed in transformers 5.
    keyword = next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)

    def last_logits(ids: Tensor, cache: DynamicCache) -> Tensor:
        return model(ids, use_cache=True, logits_to_keep=1, **{keyword: cache}).logits[:, -1]

    peer = Peer(
        model=model,
        empty_cache=lambda rows, slots: DynamicCache(config=model.config),
        last_logits=last_logits,
        logits=lambda ids: model(ids, use_cache=False).logits,
    )
    return torch_actions(task, peer, config)


def qwen2_moe_config(config: ModelConfig) -> Qwen2MoeConfig:
    """Map our config to Qwen2-MoE's names."""
    assert config.n_routed_experts is not None
    assert config.num_experts_per_tok is not None
    layers = range(config.num_hidden_layers)
    return Qwen2MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        moe_intermediate_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=(config.n_shared_experts or 0) * config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        mlp_only_layers=[layer for layer in layers if not config.is_moe_layer(layer)],
        qkv_bias=config.attention_bias,
    )
