"""Pretraining data: batches as a pure function of (seed, step, index)."""

from .files import PYTHON_STDLIB, find_files, source_bytes, warn_on_overlap
from .loader import loader
from .mixture import Mixture
from .packing import DocumentPacking, Packing
from .shards import TokenShards, is_token_shards, shards_tokenizer, tokenizer_hash
from .sources import Document, documents
from .stream import Stream, unique_names
from .tasks import merge, tokenize_task
from .tokenization import tokenize
from .validation import validation_batches
from .writer import ShardStats, SplitStats, is_validation, validation_threshold

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
    "unique_names",
    "validation_batches",
    "validation_threshold",
    "warn_on_overlap",
]
