"""Weights from PyTorch checkpoints in the Hugging Face layout, and back. Imported as `dsmoe_jax.convert`."""

from .conversion import ConversionReport
from .exporter import export_hf
from .importer import import_hf, load_hf, load_hf_quantized, stored_dtypes
from .merging import merge_to
from .peft import attach_adapter, merge_adapter, read_adapter, write_adapter
from .verify import Report, verify

__all__ = [
    "ConversionReport",
    "Report",
    "attach_adapter",
    "export_hf",
    "import_hf",
    "load_hf",
    "load_hf_quantized",
    "merge_adapter",
    "merge_to",
    "read_adapter",
    "stored_dtypes",
    "verify",
    "write_adapter",
]
