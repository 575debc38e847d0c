"""The routed experts as batched matmuls over [E, C, D]: plain XLA, full speed wherever batched matmuls are.

Read `_forward` first. Each expert gets C places, a little above the mean of its rows; experts with more rows are served
in further passes over the same places, so nothing is dropped and memory stays bounded however skewed the routing is.
Rows go to their places and back by gathers. The number of passes depends on the data, hence the custom VJP.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Int
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS

_HEADROOM = 1.25  # places above the mean: a balanced router then needs one pass


def batched(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str) -> Array:
    """See `expert_ffn` for shapes."""
    return _batched(rows, gate, up, down, group_sizes, activation)


class _Places(NamedTuple):
    """Where one pass puts which rows."""

    row: Int[Array, "E C"]  # the row in each place
    taken: Bool[Array, "E C 1"]
    place: Int[Array, "R"]  # the place, in E·C, of each row
    served: Bool[Array, "R 1"]  # whether this pass serves the row


def capacity(rows: int, experts: int) -> int:
    """Places per expert: a multiple of 8 above the mean, or all rows where those are fewer."""
    return min(rows, -(-int(_HEADROOM * rows / experts + 1) // 8) * 8)


def _places(group_sizes: Array, rows: int, index: Array | int) -> _Places:
    E, C = group_sizes.shape[0], capacity(rows, group_sizes.shape[0])
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    offset = index * C + jnp.arange(C)[None, :]
    row = jnp.arange(rows)
    expert = jnp.searchsorted(ends, row, side="right").clip(max=E - 1)
    within = row - starts[expert] - index * C
    served = (row < ends[-1]) & (within >= 0) & (within < C)
    return _Places(
        row=(starts[:, None] + offset).clip(max=rows - 1),
        taken=(offset < group_sizes[:, None])[:, :, None],
        place=expert * C + within.clip(0, C - 1),
        served=served[:, None],
    )


def _over_passes(one_pass, start, group_sizes: Array, rows: int):
    """`one_pass(index, carry)` for as many passes as the fullest expert needs; the first stands outside the loop."""
    passes = -(-group_sizes.max() // capacity(rows, group_sizes.shape[0]))
    return jax.lax.fori_loop(1, passes, one_pass, one_pass(0, start))


def _into_places(rows: Array, places: _Places) -> Array:
    return jnp.where(places.taken, rows[places.row], 0)


def _from_places(y: Array, places: _Places, otherwise: Array) -> Array:
    return jnp.where(places.served, y.reshape(-1, y.shape[-1])[places.place].astype(otherwise.dtype), otherwise)


def _matmul(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _forward(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str) -> Array:
    act = ACTIVATION_FUNCTIONS[activation]

    def one_pass(index: Array | int, out: Array) -> Array:
        places = _places(group_sizes, len(rows), index)
        x = _into_places(rows, places)
        hidden = act(_matmul("ecd,efd->ecf", x, gate)) * _matmul("ecd,efd->ecf", x, up)
        return _from_places(_matmul("ecf,edf->ecd", hidden.astype(rows.dtype), down), places, out)

    return _over_passes(one_pass, jnp.zeros_like(rows), group_sizes, len(rows))


def _vjp_forward(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str):
    return _forward(rows, gate, up, down, group_sizes, activation), (rows, gate, up, down, group_sizes)


def _vjp_backward(activation: str, saved: tuple[Array, ...], grad_out: Array):
    """Repeats the passes; recomputes the hidden rows and sums the weight gradients in fp32."""
    rows, gate, up, down, group_sizes = saved
    act = ACTIVATION_FUNCTIONS[activation]

    def one_pass(index: Array | int, grads: tuple[Array, ...]) -> tuple[Array, ...]:
        d_rows, d_gate, d_up, d_down = grads
        places = _places(group_sizes, len(rows), index)
        x, dy = _into_places(rows, places), _into_places(grad_out, places)
        before = _matmul("ecd,efd->ecf", x, gate), _matmul("ecd,efd->ecf", x, up)
        hidden, undo = jax.vjp(lambda g, u: act(g) * u, *before)
        dg, du = undo(_matmul("ecd,edf->ecf", dy, down))
        dg, du, hidden = (t.astype(rows.dtype) for t in (dg, du, hidden))
        dx = _matmul("ecf,efd->ecd", dg, gate) + _matmul("ecf,efd->ecd", du, up)
        return (
            _from_places(dx, places, d_rows),
            d_gate + _matmul("ecf,ecd->efd", dg, x),
            d_up + _matmul("ecf,ecd->efd", du, x),
            d_down + _matmul("ecd,ecf->edf", dy, hidden),
        )

    zeros = (jnp.zeros_like(w, jnp.float32) for w in (gate, up, down))
    d_rows, d_gate, d_up, d_down = _over_passes(one_pass, (jnp.zeros_like(rows), *zeros), group_sizes, len(rows))
    return d_rows, d_gate.astype(gate.dtype), d_up.astype(up.dtype), d_down.astype(down.dtype), None


_batched = jax.custom_vjp(_forward, nondiff_argnums=(5,))
_batched.defvjp(_vjp_forward, _vjp_backward)
