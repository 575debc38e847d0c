"""Convert weights from and to PyTorch checkpoints in the Hugging Face layout. Imported as `dsmoe_jax.convert`."""

import warnings
from pathlib import Path
from typing import Any

from dsmoe_jax.model import DeepSeekMoE, assemble

from .cast import ConversionReport
from .exporter import export_hf
from .gguf_export import export_gguf
from .hub import resolve
from .importer import import_hf, stored_dtypes
from .merging import merge_to
from .peft import attach_adapter, merge_adapter, read_adapter, write_adapter
from .push import push
from .sources import load_params
from .verify import VerificationReport, verify

__all__ = [
    "ConversionReport",
    "VerificationReport",
    "attach_adapter",
    "export_gguf",
    "export_hf",
    "import_hf",
    "merge_adapter",
    "merge_to",
    "push",
    "read_adapter",
    "stored_dtypes",
    "verify",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name != "load_hf":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("dsmoe_jax.convert.load_hf is deprecated: use dsmoe_jax.load", DeprecationWarning, stacklevel=2)

    def load_hf(path: str | Path, **options: Any) -> DeepSeekMoE:
        return assemble(*load_params(resolve(path), **options))

    return load_hf


def __dir__() -> list[str]:
    return __all__
