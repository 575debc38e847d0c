"""Validation of config dataclasses: `check_choices`, `check_minimum` and, against a model, `check_model`."""

import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError, check_choice

_log = logging.getLogger(__name__)


def check_choices(config: Any, prefix: str = "") -> None:
    """Raise `DSMoEError` for a field whose value is not in its `Literal` type."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        for literal in (hint, *get_args(hint)):  # of `Literal[…] | None` and `tuple[Literal[…], …]` too
            if get_origin(literal) is not Literal:
                continue
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    check_choice(f"{prefix}{name}", one, get_args(literal))


def check_minimum(config: Any, minimum: Mapping[str, int], prefix: str = "") -> None:
    """Raise `DSMoEError` for a field below its minimum, or NaN; None is valid."""
    for name, least in minimum.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise DSMoEError(f"{prefix}{name} must be at least {least}, got {value}")


def check_model(config: Any, model: ModelConfig) -> None:
    """Check the settings of a run that depend on its model: raise `DSMoEError`, or warn."""
    if (length := config.data.sequence_length) is not None and length > model.context_length:
        text = "data.sequence_length %d exceeds the model's max_position_embeddings %d"
        _log.warning(text, length, model.context_length)
    groups, alpha = config.step.device_balance_groups, config.step.device_balance_alpha
    if model.n_routed_experts is not None and model.n_routed_experts % groups:
        raise DSMoEError(f"step.device_balance_groups must divide {model.n_routed_experts} experts, got {groups}")
    if (groups > 1) != (alpha > 0):
        text = "step.device_balance_groups %d and step.device_balance_alpha %s have no effect: set both"
        _log.warning(text, groups, alpha)
