"""Pretraining data: batches as a pure function of (seed, step, index).

sources.py   files, folders, patterns, the standard library   formats.py     readers of file formats
writer.py    texts to token shards, once                      shards.py      the shards, memory-mapped
packing.py   documents to sequences                           shuffle.py     the only source of randomness
mixture.py   datasets by weight                               stream.py      the training stream
loader.py    prefetching, per process                         validation.py  the validation split
"""

from .loader import loader
from .mixture import Mixture
from .packing import DocumentPacking, Packing
from .shards import TokenShards, is_token_shards, tokenizer_hash
from .sources import PYTHON_STDLIB, Document, documents, find_files, source_bytes, warn_on_overlap
from .stream import Stream
from .validation import validation_batches
from .writer import ShardStats, SplitStats, is_validation, tokenize

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
    "source_bytes",
    "tokenize",
    "tokenizer_hash",
    "validation_batches",
    "warn_on_overlap",
]
