"""Codebooks of quantized values: NF4 for weights, dynamic 8-bit for scales. Start at `nearest`."""

from typing import Final

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Float, Shaped

# Quantiles of a normal distribution, scaled to [-1, 1] and including zero: arXiv 2305.14314, appendix E.
# fmt: off
NF4: Final = (
    -1.0,                 -0.6961928009986877,  -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534,  0.16093020141124725,  0.24611230194568634, 0.33791524171829224,
     0.44070982933044434,  0.5626170039176941,   0.7229568362236023,  1.0,
)
# fmt: on


def _dynamic() -> tuple[float, ...]:
    """Return the signed dynamic 8-bit values of bitsandbytes (arXiv 1511.04561), finer towards zero.

    0, 1, and ± the midpoints of equal intervals of seven decades: 64 in [0.1, 1], half as many in each decade below.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, (64 >> decade) + 1)
        midpoints = (edges[:-1] + edges[1:]) / 2 * 10.0**-decade
        values += [*midpoints, *-midpoints]
    return tuple(np.sort(np.asarray(values, np.float32)).tolist())


DYNAMIC: Final = _dynamic()


def nearest(x: Float[Array, "n"], codebook: tuple[float, ...]) -> Shaped[Array, "n"]:
    """Return the code of the value nearest to each x, uint8; ties go to the lower value."""
    values = np.asarray(codebook)
    midpoints = jnp.asarray((values[:-1] + values[1:]) / 2, jnp.float32)
    method = "compare_all" if len(codebook) <= 16 else "scan"  # faster for a small codebook
    return jnp.searchsorted(midpoints, x, side="left", method=method).astype(jnp.uint8)
