"""Weights from PyTorch checkpoints in the Hugging Face layout, and back. Imported as `dsmoe_jax.convert`."""

from .conversion import Conversion
from .exporter import export_hf
from .importer import import_hf, load_hf
from .verify import Report, verify

__all__ = ["Conversion", "Report", "export_hf", "import_hf", "load_hf", "verify"]
