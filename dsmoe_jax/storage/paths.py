"""Paths from users: `~` is expanded, an empty path is an error."""

import os
from pathlib import Path

from dsmoe_jax.errors import DSMoEError


def expand_user(path: str | os.PathLike[str], name: str) -> str:
    """Expand a leading `~` and change nothing else.

    Args:
      path: The path.
      name: What it is, for the error.

    Raises:
      DSMoEError: The path is empty, as that of an unset shell variable; `Path("")` would be the current folder.
    """
    text = os.fspath(path)
    if not text.strip():
        raise DSMoEError(f"{name} must be a path, got an empty string")
    return os.path.expanduser(text)


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """`expand_user`, as a Path."""
    return Path(expand_user(path, name))
