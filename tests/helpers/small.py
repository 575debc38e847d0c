"""The small model of the generation tests, and its native checkpoint with a tokenizer."""

import functools
from pathlib import Path

from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import DeepSeekMoE
from tests.helpers.hf_folder import make_tokenizer

SMALL = ModelConfig(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_shared_experts=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.3,  # distributions far from uniform
)


@functools.cache
def small_model() -> DeepSeekMoE:
    return DeepSeekMoE.init(SMALL)


def save_checkpoint(home: Path, model: DeepSeekMoE) -> Path:
    """Return a native checkpoint with a tokenizer."""
    make_tokenizer(home / "tokenizer", model.config.vocab_size)
    save(model, home / "native", extra_files=sorted((home / "tokenizer").iterdir()))
    return home / "native"
