"""What the codes of quantised weights stand for: NF4, and the 8-bit map of the scales. Start at `nearest`."""

from typing import Final

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Float, Shaped

# The quantiles of a normal distribution, scaled to [-1, 1], with a zero among them: arXiv 2305.14314, appendix E.
# fmt: off
NF4: Final = (
    -1.0,                 -0.6961928009986877,  -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534,  0.16093020141124725,  0.24611230194568634, 0.33791524171829224,
     0.44070982933044434,  0.5626170039176941,   0.7229568362236023,  1.0,
)
# fmt: on


def _dynamic() -> tuple[float, ...]:
    """Dynamic 8-bit values (arXiv 1511.04561; as in bitsandbytes' signed map): finer the smaller they are.

    Of each of seven decades, the highest from 0.1 to 1, the middles of equal parts with either sign: 64 parts of the
    highest, half as many of each one below. And 0, and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, (64 >> decade) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-decade
        values += [*middles, *-middles]
    return tuple(np.sort(np.asarray(values, np.float32)).tolist())


DYNAMIC: Final = _dynamic()


def nearest(x: Float[Array, "n"], codebook: tuple[float, ...]) -> Shaped[Array, "n"]:
    """The code of the value nearest to each x, uint8; of a number halfway between two values, that of the lower one."""
    values = np.asarray(codebook)
    halfway = jnp.asarray((values[:-1] + values[1:]) / 2, jnp.float32)
    # Counting the smaller ones is quickest while they are few.
    method = "compare_all" if len(codebook) <= 16 else "scan"
    return jnp.searchsorted(halfway, x, side="left", method=method).astype(jnp.uint8)
