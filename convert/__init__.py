"""Weights from PyTorch checkpoints in the Hugging Face layout, and back. Imported as `dsmoe_jax.convert`."""

from .importer import import_hf, load_hf

__all__ = ["import_hf", "load_hf"]
