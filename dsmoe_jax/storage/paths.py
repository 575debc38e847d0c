"""Paths from users: `~` is expanded, an empty path is an error."""

import os
from pathlib import Path

from dsmoe_jax.errors import DSMoEError


def expand_user(path: str | os.PathLike[str], name: str) -> str:
    """Expand a leading `~`; raise `DSMoEError` for an empty path, usually an unset shell variable."""
    if not isinstance(path, str | os.PathLike):
        raise DSMoEError(f"{name} must be a path, got {path!r:.80}")
    text = os.fspath(path)
    if not text.strip():
        raise DSMoEError(f"{name} must be a path, got an empty string")
    return os.path.expanduser(text)


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Return `expand_user` as a Path."""
    return Path(expand_user(path, name))
