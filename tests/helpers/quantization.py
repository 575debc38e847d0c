"""Memory and error of quantized parameters, by kind of weight."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dsmoe_jax.kernels.operand import LowRank, Operand, Quantized
from dsmoe_jax.quantize import kind_of


class Usage(NamedTuple):
    weights: int  # how many
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.weights


def usage(params: Mapping[str, Operand]) -> dict[str, Usage]:
    """The memory of parameters by kind (`KINDS`, the rest is "other"), without adapters."""
    used: dict[str, Usage] = {}
    for name, value in params.items():
        base = value.base if isinstance(value, LowRank) else value
        codes = base.codes if isinstance(base, Quantized) else base
        weights = math.prod(codes.shape) * (2 if isinstance(base, Quantized) and base.packed else 1)
        kind = kind_of(name) or "other"
        before = used.get(kind, Usage(0, 0))
        used[kind] = Usage(before.weights + weights, before.bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
    return used


def relative_error(dense: Mapping[str, Any], quantized: Mapping[str, Operand]) -> dict[str, float]:
    """The rms of the quantization error over the rms of the dense weights, by kind."""
    squares: dict[str, tuple[float, float]] = {}
    for name, value in quantized.items():
        if isinstance(value, Quantized):
            weight = np.asarray(dense[name], np.float64)
            restored = (_dequantize_stack if weight.ndim == 3 else _dequantize)(value)
            kind = kind_of(name) or name
            error, total = squares.get(kind, (0.0, 0.0))
            squares[kind] = error + np.square(np.asarray(restored) - weight).sum(), total + np.square(weight).sum()
    return {kind: math.sqrt(error / total) for kind, (error, total) in squares.items()}


_dequantize = jax.jit(Quantized.dequantize)
_dequantize_stack = jax.jit(jax.vmap(Quantized.dequantize))
