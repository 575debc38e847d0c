"""Evaluation with lm-evaluation-harness: `evaluate`, the model `DSMoELM`, a task from texts: `write_continuations`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe_jax.evaluate.continuations import write_continuations
    from dsmoe_jax.evaluate.harness import DSMoELM
    from dsmoe_jax.evaluate.run import Evaluation, evaluate

_MODULES = {"DSMoELM": "harness", "Evaluation": "run", "evaluate": "run", "write_continuations": "continuations"}

__all__ = ["DSMoELM", "Evaluation", "evaluate", "write_continuations"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dsmoe_jax.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dsmoe_jax.evaluate.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
