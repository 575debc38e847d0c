"""Pretraining and fine-tuning. Imported as `dsmoe_jax.train`; names and submodules are imported on first access."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe_jax.lora import LoraConfig

    from . import config, data, loop, recipes, sft
    from .config import CheckpointConfig, DataConfig, RunConfig
    from .finetune import ExamplesConfig, FinetuneConfig
    from .loop import Result, run
    from .loss import balance_loss, cross_entropy
    from .optimizer import OptimizerConfig
    from .step import StepConfig

_MODULES = {
    "CheckpointConfig": ".config",
    "DataConfig": ".config",
    "ExamplesConfig": ".finetune",
    "FinetuneConfig": ".finetune",
    "LoraConfig": "dsmoe_jax.lora",
    "OptimizerConfig": ".optimizer",
    "Result": ".loop",
    "RunConfig": ".config",
    "StepConfig": ".step",
    "balance_loss": ".loss",
    "cross_entropy": ".loss",
    "run": ".loop",
}
_SUBMODULES = {module.name for module in pkgutil.iter_modules(__path__)}

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ExamplesConfig",
    "FinetuneConfig",
    "LoraConfig",
    "OptimizerConfig",
    "Result",
    "RunConfig",
    "StepConfig",
    "balance_loss",
    "config",
    "cross_entropy",
    "data",
    "loop",
    "recipes",
    "run",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
