"""Pretraining data: batches as a pure function of (seed, step, index). Names are imported on first access."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import PYTHON_STDLIB, find_files, source_bytes, warn_on_overlap
    from .mixture import Mixture
    from .packing import DocumentPacking, Packing
    from .prefetch import loader
    from .shards import TokenShards, is_token_shards, shards_tokenizer, tokenizer_hash
    from .sources import Document, documents
    from .stream import Stream, unique_names
    from .tasks import merge, tokenize_task
    from .tokenization import tokenize, training_texts
    from .validation import validation_batches
    from .writer import ShardStats, SplitStats, is_validation, validation_threshold

_MODULES = {
    **dict.fromkeys(("PYTHON_STDLIB", "find_files", "source_bytes", "warn_on_overlap"), ".files"),
    "Mixture": ".mixture",
    **dict.fromkeys(("DocumentPacking", "Packing"), ".packing"),
    "loader": ".prefetch",
    **dict.fromkeys(("TokenShards", "is_token_shards", "shards_tokenizer", "tokenizer_hash"), ".shards"),
    **dict.fromkeys(("Document", "documents"), ".sources"),
    **dict.fromkeys(("Stream", "unique_names"), ".stream"),
    **dict.fromkeys(("merge", "tokenize_task"), ".tasks"),
    **dict.fromkeys(("tokenize", "training_texts"), ".tokenization"),
    "validation_batches": ".validation",
    **dict.fromkeys(("ShardStats", "SplitStats", "is_validation", "validation_threshold"), ".writer"),
}

__all__ = [
    "PYTHON_STDLIB",
    "Document",
    "DocumentPacking",
    "Mixture",
    "Packing",
    "ShardStats",
    "SplitStats",
    "Stream",
    "TokenShards",
    "documents",
    "find_files",
    "is_token_shards",
    "is_validation",
    "loader",
    "merge",
    "shards_tokenizer",
    "source_bytes",
    "tokenize",
    "tokenize_task",
    "tokenizer_hash",
    "training_texts",
    "unique_names",
    "validation_batches",
    "validation_threshold",
    "warn_on_overlap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
