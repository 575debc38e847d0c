"""Locations of tensors in a checkpoint (`TensorInfo`), and checks of names and shapes from untrusted files."""

import math
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from dsmoe_jax.errors import DSMoEError

MAX_RANK: Final = 64  # numpy's limit
_BUFFER: Final = re.compile(r"(^|\.)(rotary_emb\.[a-z_]+|masked_bias|causal_mask|position_ids)$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of a tensor in a checkpoint."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: str  # name inside the checkpoint's folder
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None  # bytes; None means C order


def is_buffer(name: str) -> bool:
    """Return whether a tensor is a buffer stored by older releases of transformers, which the model recomputes."""
    return _BUFFER.search(name) is not None


def quote(value: object) -> str:
    """Return an untrusted value in one short line; nested values by type only."""
    value = value[:160] if isinstance(value, str) else value
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:157]}..."


def count_elements(name: str, shape: tuple[int, ...], itemsize: int) -> int:
    """Return the number of elements of `shape`, which must be a possible array shape."""
    if len(shape) > MAX_RANK:
        raise DSMoEError(f"tensor {quote(name)} has {len(shape)} dimensions; at most {MAX_RANK}")
    if bad := [size for size in shape if not 0 <= size < 2**63]:
        raise DSMoEError(f"tensor {quote(name)} has a dimension of {quote(bad[0])}; it must be in [0, 2**63)")
    if math.prod(max(size, 1) for size in shape) * itemsize >= 2**63:
        raise DSMoEError(f"tensor {quote(name)} has shape {quote(str(shape))}: 2**63 bytes or more")
    return math.prod(shape)
