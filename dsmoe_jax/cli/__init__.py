"""The command `dsmoe`: verbs, output and the demo."""

from dsmoe_jax.cli.commands import main

__all__ = ["main"]
