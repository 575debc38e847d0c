"""The command `dsmoe`: its verbs, what they print, and the demo."""

from dsmoe_jax.cli.commands import main

__all__ = ["main"]
