"""Validation of config dataclasses: `check_choices` and `check_minimum`."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dsmoe_jax.errors import DSMoEError, check_choice


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
