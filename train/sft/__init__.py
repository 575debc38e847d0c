"""Fine-tuning data: conversations, completions or tokens, with loss masks."""

from ..data.shards import is_examples
from .examples import Examples
from .formats import FORMATS
from .packing import ExamplePacking
from .show import show
from .stop_config import infer_stop_config
from .templates import TEMPLATES, TRAIN_ON, template_hash
from .writer import EXCESS_LENGTH_STRATEGIES, write_examples

__all__ = [
    "EXCESS_LENGTH_STRATEGIES",
    "FORMATS",
    "TEMPLATES",
    "TRAIN_ON",
    "ExamplePacking",
    "Examples",
    "infer_stop_config",
    "is_examples",
    "show",
    "template_hash",
    "write_examples",
]
