"""The data of fine-tuning: conversations and completions in, batches out in which only answers have labels.

formats.py   what a line says, by its fields             templates.py  as tokens, and which of them are targets
all_read.py  whether a template writes all of it
shorten.py   examples that are too long                  writer.py     files to a folder of examples, once
store.py     the folder, memory-mapped                   packing.py    whole examples to rows
evaluation.py  the held-out examples                     show.py       examples for a person to look at
ending.py    how a template ends an answer
"""

from .ending import endings_of
from .evaluation import example_batches
from .formats import FORMATS
from .packing import MODES, ExamplePacking
from .show import show
from .store import Examples, is_examples
from .templates import TARGETS, TEMPLATES, template_hash
from .writer import TOO_LONG, Written, write_examples

__all__ = [
    "FORMATS",
    "MODES",
    "TARGETS",
    "TEMPLATES",
    "TOO_LONG",
    "ExamplePacking",
    "Examples",
    "Written",
    "endings_of",
    "example_batches",
    "is_examples",
    "show",
    "template_hash",
    "write_examples",
]
