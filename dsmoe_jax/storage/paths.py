"""Paths as users write them: `~` is expanded, an empty one is refused."""

import os
from pathlib import Path

from dsmoe_jax.errors import DSMoEError


def expand_user(path: str | os.PathLike[str], name: str) -> str:
    """Returns `path` with a leading `~` expanded, spelled as it was otherwise.

    Raises ValueError, by `name`, for an empty path: `Path("")` would be the current folder. An unset shell variable
    gives one.
    """
    text = os.fspath(path)
    if not text.strip():
        raise DSMoEError(f"{name} must be a path, got an empty string")
    return os.path.expanduser(text)


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns `path` as a Path, as `expand_user` does."""
    return Path(expand_user(path, name))
