"""The routed experts on sorted rows: SwiGLU of every expert on its own rows, as one operation.

Start at `expert_ffn`; `LEGS` says which backend serves which leg on which device, `BACKENDS` what backends there are.
All have one signature and one conformance suite.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels import batched, block_loop, plain, tuning
from dsmoe_jax.kernels.operand import Experts, Inputs, Operand, Wanted, shape

VARIABLE: Final = "DSMOE_EXPERT_BACKEND"  # overrides the table where no argument does
_FALL_BACK: Final = "batched"  # needs nothing but XLA
_log = logging.getLogger("dsmoe_jax")


class Backend(NamedTuple):
    """One formulation of the operation and of its gradients."""

    forward: Callable[[Inputs, Array, str], Array]
    backward: Callable[[Inputs, Array, str, Array, Wanted], list[Array]]


class Legs(NamedTuple):
    """The backend of each leg: the forward pass, the gradients of rows (and their weights), those of the operands."""

    forward: str
    rows: str
    weights: str


def _differentiated(forward: Callable[[Inputs, Array, str], Array]) -> Backend:
    return Backend(forward, plain.backward_of(forward))


BACKENDS: Final[dict[str, Backend]] = {
    "block_loop": Backend(block_loop.forward, block_loop.backward),
    "batched": Backend(batched.forward, batched.backward),
    "grouped": _differentiated(functools.partial(plain.forward_by_groups, plain.grouped_legs)),
    "ragged": _differentiated(functools.partial(plain.forward_by_groups, lambda: plain.RAGGED)),
    "slots": _differentiated(plain.forward_by_slots),
    "dense": _differentiated(plain.forward_dense),
}

# What a card's own measurements (`tuning`, tuned.json) leave open. On GPU a loop whose length depends on the data asks
# the host at every turn, and `ragged_dot` multiplies every row by every expert, as it does on CPU (facts of others;
# nothing here is measured on a GPU yet). The dtype is that of rows.
# fmt: off
LEGS: Final[dict[tuple[str, str, str], Legs]] = {
    # device  dtype       rows                forward       rows          weights
    ("cpu",   "float32",  "few"):  Legs("block_loop", "block_loop", "block_loop"),
    ("cpu",   "float32",  "many"): Legs("block_loop", "block_loop", "block_loop"),
    ("cpu",   "bfloat16", "few"):  Legs("block_loop", "block_loop", "block_loop"),
    ("cpu",   "bfloat16", "many"): Legs("block_loop", "block_loop", "block_loop"),
    ("gpu",   "float32",  "few"):  Legs("slots",      "batched",    "batched"),
    ("gpu",   "float32",  "many"): Legs("batched",    "batched",    "batched"),
    ("gpu",   "bfloat16", "few"):  Legs("slots",      "batched",    "batched"),
    ("gpu",   "bfloat16", "many"): Legs("batched",    "batched",    "batched"),
    ("tpu",   "float32",  "few"):  Legs("slots",      "ragged",     "ragged"),
    ("tpu",   "float32",  "many"): Legs("ragged",     "ragged",     "ragged"),
    ("tpu",   "bfloat16", "few"):  Legs("slots",      "ragged",     "ragged"),
    ("tpu",   "bfloat16", "many"): Legs("ragged",     "ragged",     "ragged"),
}
# fmt: on


@jax.named_scope("expert_ffn")
def expert_ffn(
    rows: Float[Array, "R D"],
    gate: Operand,
    up: Operand,
    down: Operand,
    group_sizes: Int[Array, "E"],
    *,
    weights: Float[Array, "R"] | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Float[Array, "R D"]:
    """Weight · down_e(act(gate_e x) · up_e x) for each row x: the first `group_sizes[0]` rows are expert 0's, …

    Operands lie as PyTorch keeps them, [out, in]: gate and up [E, F, D], down [E, D, F], each dense, quantised or
    low-rank (`kernels.operand`). Rows beyond the sum of `group_sizes` give zeros; a row's `weights` entry defaults
    to 1. Differentiable in rows, weights and every leaf of the operands that is a float; what nobody differentiates by
    costs nothing. Memory for the backward pass is the inputs'.

    `backend` is one of `BACKENDS`, or three of them, "forward,rows,weights"; by default the environment variable
    DSMOE_EXPERT_BACKEND, else what `LEGS` says. Raises `ValueError` for a backend that does not exist, for operands
    whose shapes do not fit, and for group sizes that sum to more than the rows (where they are known).
    """
    inputs = Inputs(rows, weights, Experts(gate, up, down))
    _check(inputs, group_sizes)
    legs = choose(jax.default_backend(), rows.dtype, rows.shape[0], group_sizes.shape[0], backend)
    leaves, tree = jax.tree.flatten((inputs, group_sizes))
    return _expert_ffn(legs, activation, *jax.tree.unflatten(tree, _equally_varying(leaves)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_ffn(legs: Legs, activation: str, inputs: Inputs, group_sizes: Array) -> Array:
    return BACKENDS[legs.forward].forward(inputs, group_sizes, activation)


def _vjp_forward(legs: Legs, activation: str, inputs: Inputs, group_sizes: Any):
    """Each leaf comes with whether a gradient is asked of it: frozen ones are skipped in the backward pass."""
    wanted = Wanted(leaf.perturbed for leaf in jax.tree.leaves(inputs))
    inputs, group_sizes = jax.tree.map(lambda leaf: leaf.value, (inputs, group_sizes))
    return _expert_ffn(legs, activation, inputs, group_sizes), (inputs, group_sizes, wanted)


def _vjp_backward(legs: Legs, activation: str, saved: tuple[Inputs, Array, Wanted], grad_out: Any):
    inputs, group_sizes, wanted = saved
    grads: list[Array | None] = [None] * len(wanted)
    if isinstance(grad_out, jax.custom_derivatives.SymbolicZero):
        return jax.tree.unflatten(jax.tree.structure(inputs), grads), None
    for backend in dict.fromkeys((legs.rows, legs.weights)):
        serves = Wanted(
            want and (legs.rows if by_row else legs.weights) == backend
            for want, by_row in zip(wanted, inputs.by_row(), strict=True)
        )
        if any(serves):
            grads = serves.put(BACKENDS[backend].backward(inputs, group_sizes, activation, grad_out, serves), grads)
    return jax.tree.unflatten(jax.tree.structure(inputs), grads), None


_expert_ffn.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


def choose(platform: str, dtype: Any, rows: int, experts: int, backend: str | None = None) -> Legs:
    """The legs for a kind of device ("cpu", "gpu", "tpu"); said in the log once per process and choice.

    `backend`, or else the environment variable, goes before what is tuned for this card, and that before the table;
    what cannot run here gives way to `batched` with a warning. Raises `ValueError` for one that does not exist.
    """
    asked = override(backend)
    if not asked:
        width = "float32" if jnp.dtype(dtype) == jnp.float32 else "bfloat16"
        key = (platform, width, "few" if rows <= experts else "many")
        legs = LEGS.get(key, Legs("ragged", "ragged", "ragged"))
        reason = f"{platform}, {jnp.dtype(dtype)}, {key[2]} rows"
        if platform == "gpu" and (card := tuning.kind()) and (own := tuning.legs(card, *key[1:])):
            legs, reason = legs._replace(**own), f"{reason}, tuned on {card}"
    else:
        names = asked.split(",")
        for name in names:
            if name not in BACKENDS:
                raise ValueError(f"expert_ffn backend {name!r} does not exist, only {', '.join(BACKENDS)}")
        if len(names) not in (1, len(Legs._fields)):
            raise ValueError(f"expert_ffn backend {asked!r} must be one name, or three: {','.join(Legs._fields)}")
        legs, reason = Legs(*(names * 3)[:3]), "as asked"
    legs = Legs(*(_or_fall_back(name) for name in legs))
    _say_once(legs, reason)
    return legs


def override(backend: str | None = None) -> str | None:
    """What goes before all tables: the argument, or else the environment variable; None where neither asks."""
    return backend or os.environ.get(VARIABLE) or None


@functools.cache
def _or_fall_back(name: str) -> str:
    if name == "grouped":
        try:
            plain.grouped_legs()
        except ValueError as error:
            warnings.warn(f"expert_ffn backend 'grouped' cannot run here ({error}): {_FALL_BACK} instead", stacklevel=4)
            return _FALL_BACK
    return name


@functools.cache
def _say_once(legs: Legs, reason: str) -> None:
    _log.info("expert_ffn (%s): forward %s, gradient of rows %s, of weights %s", reason, *legs)


def _check(inputs: Inputs, group_sizes: Array) -> None:
    rows, weights, experts = inputs
    R, D = rows.shape
    if weights is not None and weights.shape != (R,):
        raise ValueError(f"expert_ffn: weights have shape {weights.shape}, there are {R} rows")
    E = {leaf.shape[0] for leaf in jax.tree.leaves(experts)} | {group_sizes.shape[0]}
    if len(E) > 1:
        raise ValueError(f"expert_ffn: operands and group_sizes disagree on the number of experts: {sorted(E)}")
    F, _ = shape(experts.gate)
    for name, operand, fits in zip(Experts._fields, experts, ((F, D), (F, D), (D, F)), strict=True):
        if shape(operand) != fits:
            raise ValueError(f"expert_ffn: {name} [out, in] is {shape(operand)}, rows of width {D} need {fits}")
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if sizes.min() < 0 or sizes.sum() > R:
            raise ValueError(f"expert_ffn: group_sizes sum to {sizes.sum()} (least {sizes.min()}), there are {R} rows")


def _equally_varying(operands: list[Array]) -> list[Array]:
    """Inside a shard_map, every operand varies over all axes that one does.

    A loop's carry must not change its type, and what turns a weight that all devices share into one that varies is
    what sums its gradient over them.
    """
    axes = frozenset().union(*(jax.typeof(operand).mat.varying for operand in operands))
    return [varying(operand, axes) for operand in operands]


def varying(value: Array, axes: Iterable[str]) -> Array:
    """The value as one that varies over all axes; the gradient of that sums over those it did not vary over."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(value).mat.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value
