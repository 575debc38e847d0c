"""The data of pretraining: text in, batches out, as a pure function of (seed, step, row).

sources.py   texts: files, folders, patterns, Python's own sources     formats.py  how each format is read
writer.py    texts to token shards, once                               shards.py   the shards, memory-mapped
packing.py   documents to rows                                         shuffle.py  the one source of chance
mixture.py   datasets by weight                                        stream.py   what training reads
loader.py    a process's share, ahead of time                          evaluation.py  the held-out documents
"""

from .evaluation import evaluation_batches
from .loader import loader
from .mixture import Mixture
from .packing import MODES, Packing
from .shards import TokenShards, is_token_shards, tokenizer_hash
from .sources import PYTHON_STDLIB, Document, documents, find_files, source_bytes, warn_of_overlap
from .stream import Stream
from .writer import Tokenized, is_held_out, tokenize

__all__ = [
    "MODES",
    "PYTHON_STDLIB",
    "Document",
    "Mixture",
    "Packing",
    "Stream",
    "TokenShards",
    "Tokenized",
    "documents",
    "evaluation_batches",
    "find_files",
    "is_held_out",
    "is_token_shards",
    "loader",
    "source_bytes",
    "tokenize",
    "tokenizer_hash",
    "warn_of_overlap",
]
