"""DeepSeekMoE in JAX: convert PyTorch checkpoints, generate text, pretrain and fine-tune.

The public API. Names are imported on first access, so `import dsmoe_jax` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe_jax import convert, evaluate, generate, train
    from dsmoe_jax.checkpoint.native import save
    from dsmoe_jax.config import ModelConfig
    from dsmoe_jax.generate import Chat, Completion, Generator, SamplingParams
    from dsmoe_jax.loading import load
    from dsmoe_jax.model import DeepSeekMoE
    from dsmoe_jax.sharding import MeshConfig, make_mesh
    from dsmoe_jax.text.tokenizer import Tokenizer

__version__ = "0.1.0"

_MODULES = {
    "ModelConfig": "config",
    "DeepSeekMoE": "model",
    "MeshConfig": "sharding",
    "make_mesh": "sharding",
    "load": "loading",
    "save": "checkpoint.native",
    "Tokenizer": "text.tokenizer",
    "Generator": "generate",
    "Chat": "generate",
    "Completion": "generate",
    "SamplingParams": "generate",
}
_SUBPACKAGES = ("convert", "evaluate", "generate", "train")

__all__ = [
    "Chat",
    "Completion",
    "DeepSeekMoE",
    "Generator",
    "MeshConfig",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
    "convert",
    "evaluate",
    "generate",
    "load",
    "make_mesh",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"dsmoe_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'dsmoe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dsmoe_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
