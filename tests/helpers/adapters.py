"""Random LoRA adapters and a small model to match them with."""

from typing import Any

import numpy as np

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import MatchingRules, make_plan, modules
from dsmoe_jax.lora import LoraConfig, Plan
from tests.helpers.hf_folder import tiny

MODEL = tiny(num_hidden_layers=3, n_routed_experts=4)  # layer 0 is dense, 1 and 2 are MoE layers


def scales(config: LoraConfig, rules: MatchingRules | None = None) -> dict[str, float]:
    """Return the scale of each adapted module by its path below `model.`."""
    plan, paths = make_plan(config, MODEL, rules=rules), modules(MODEL)
    return {
        path.removeprefix("model."): scale
        for name, target in plan.targets.items()
        for path, scale in zip(paths[name], target.scales, strict=True)
        if scale
    }


def random_adapter(plan: Plan, config: ModelConfig) -> dict[str, Any]:
    """Return random parameters, B's too, with zero rank padding. Nothing is compiled."""
    rng = np.random.default_rng(0)
    params = {
        name: (0.3 * rng.standard_normal(spec.shape)).astype(np.float32)
        for name, spec in lora.specs(plan, config).items()
    }
    for name, target in plan.targets.items():
        for n, rank in enumerate(target.ranks):
            expert = n if params[name + lora.LORA_A].ndim == 3 else ...
            params[name + lora.LORA_A][expert][rank:] = 0
            params[name + lora.LORA_B][expert][:, rank:] = 0
    return params
