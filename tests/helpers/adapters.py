"""Low-rank adapters that change every weight they may."""

from typing import Any

import numpy as np

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.lora import Plan


def random_adapter(plan: Plan, config: ModelConfig) -> dict[str, Any]:
    """Every value that counts is drawn, B's too; what fills up ranks is zero. Nothing to compile."""
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
