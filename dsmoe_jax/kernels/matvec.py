"""Products of one row with a quantized weight on CPU, which read codes at memory bandwidth. Start at `is_row`.

XLA casts codes in registers if x is in memory. But it fuses what computes x (norm, SwiGLU) as well and then computes x
again for every row of W: 2 to 5× slower (jax 0.10.1). Barriers are removed before fusion. Never fused are a division
whose result is read more than once, and functions that must not be inlined.
"""

from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from dsmoe_jax.axes import Array, Float, Shaped

# Bytes in a sum of integers: XLA computes longer sums in two passes, and LLVM does not vectorize shorter ones.
_GROUP: Final = 32
_INT16: Final = 32767
_LARGEST_CODE: Final = 1023  # its product with _INT16, 64 times, fits in int32


def is_row(x: Array) -> bool:
    """Return whether `x` is one row, on CPU."""
    return x.size == x.shape[-1] and jax.default_backend() == "cpu"


def matvec(x: Float[Array, "I"], weight: Shaped[Array, "O I"]) -> Float[Array, "O"]:
    """Compute W x in fp32, for codes of any dtype; a cast or decoding of W is fused."""
    x = x.astype(jnp.float32)
    x = x / jnp.where(x == x, jnp.ones_like(x), jnp.nan)  # equals x, in memory
    return jnp.einsum("i,oi->o", x, weight.astype(jnp.float32))


def fits(into: int, tile: int, codebook: tuple[float, ...]) -> bool:
    """Return whether `packed_matvec` can compute rows of `into` values."""
    small = max(map(abs, codebook)) * float(_factor(codebook)) <= _LARGEST_CODE
    return small and tile == 2 * _GROUP and into % tile == 0


def packed_matvec(
    x: Float[Array, "I"], codes: Shaped[Array, "O half"], scales: Float[Array, "O tiles"], codebook: tuple[float, ...]
) -> Float[Array, "O"]:
    """Compute W x in integers for 4-bit codes, two per byte, the first in the upper half; no gradient.

    x is rounded to 1/32767 of its largest value and the values of NF4 to 1/1023, a hundredth of the error of the codes.
    """
    with set_xla_metadata(inlineable="false"):
        even, odd, unit = jax.jit(_as_int16)(x)
    even, odd = even.astype(jnp.int32), odd.astype(jnp.int32)
    codes = codes.reshape(len(codes), -1, _GROUP)
    upper, lower = (_decode(half, codebook).astype(jnp.int32) for half in (codes >> 4, codes & 15))
    sums = (upper * even[None] + lower * odd[None]).sum(axis=-1)
    return (sums.astype(jnp.float32) * scales).sum(axis=-1) * (unit / _factor(codebook))


def _as_int16(
    x: Float[Array, "I"],
) -> tuple[Shaped[Array, "tiles group"], Shaped[Array, "tiles group"], Float[Array, ""]]:
    """Round to int16; return the even and the odd columns, and the unit."""
    x = x.astype(jnp.float32)
    unit = jnp.maximum(jnp.abs(x).max() * np.float32(1 / _INT16), np.finfo(np.float32).tiny)
    codes = jax.lax.round(x / unit, jax.lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int16)
    return codes[::2].reshape(-1, _GROUP), codes[1::2].reshape(-1, _GROUP), unit


def consecutive(codebook: tuple[float, ...]) -> bool:
    """Return whether the values are consecutive integers, as those of int4."""
    return codebook == tuple(codebook[0] + n for n in range(len(codebook)))


def _factor(codebook: tuple[float, ...]) -> np.float32:
    """Return the factor of a codebook of integers."""
    return np.float32(1 if consecutive(codebook) else _LARGEST_CODE)


def _decode(codes: Shaped[Array, "*n"], codebook: tuple[float, ...]) -> Shaped[Array, "*n"]:
    """Return the codebook's values in int16; by selection if not consecutive, as a lookup is not vectorized."""
    values = [round(value * float(_factor(codebook))) for value in codebook]
    if consecutive(codebook):
        return codes.astype(jnp.int16) + jnp.int16(values[0])
    found: list[Array] = [jnp.int16(value) for value in values]
    while len(found) > 1:
        bit = len(values).bit_length() - len(found).bit_length()
        found = [
            jnp.where((codes >> bit) & 1 != 0, odd, even) for even, odd in zip(found[::2], found[1::2], strict=True)
        ]
    return found[0]
