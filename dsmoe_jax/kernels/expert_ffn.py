"""The routed experts on sorted rows: the SwiGLU of every expert on its own rows, as one operation.

Start at `expert_ffn`; `LEGS` is the table of defaults, `BACKENDS` lists what computes it. All backends have one
signature and one conformance suite.
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
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels import batched, block_loop, plain, tuning
from dsmoe_jax.kernels.operand import Experts, GradMask, Inputs, Operand, shape
from dsmoe_jax.kernels.tuning import Legs

VARIABLE: Final = "DSMOE_EXPERT_BACKEND"  # the backend where no argument names one
_FALLBACK: Final = "batched"  # needs nothing but XLA
_log = logging.getLogger("dsmoe_jax")


class Backend(NamedTuple):
    """One implementation of the operation and its gradients."""

    forward: Callable[[Inputs, Array, str], Array]
    backward: Callable[[Inputs, Array, str, Array, GradMask], list[Array]]


def _differentiated(forward: Callable[[Inputs, Array, str], Array]) -> Backend:
    return Backend(forward, plain.backward_of(forward))


BACKENDS: Final[dict[str, Backend]] = {
    "block_loop": Backend(block_loop.forward, block_loop.backward),
    "batched": Backend(batched.forward, batched.backward),
    "grouped": _differentiated(functools.partial(plain.forward_by_groups, plain.grouped_legs)),
    "ragged": _differentiated(functools.partial(plain.forward_by_groups, lambda: plain.RAGGED)),
    "dense": _differentiated(plain.forward_dense),
}

# The defaults where `tuned.json` has no measurement of the card. On GPU a loop of data-dependent length synchronizes
# with the host every iteration, and `ragged_dot` multiplies every row by every expert, as it does on CPU (reported by
# others; not measured on a GPU here yet). The dtype is that of the rows. Few tokens never come here on GPU and TPU:
# see `few_tokens`.
# fmt: off
LEGS: Final[dict[tuple[str, str], Legs]] = {
    # device  dtype            fwd           dgrad         wgrad
    ("cpu",   "float32"):  Legs("block_loop", "block_loop", "block_loop"),
    ("cpu",   "bfloat16"): Legs("block_loop", "block_loop", "block_loop"),
    ("gpu",   "float32"):  Legs("batched",    "batched",    "batched"),
    ("gpu",   "bfloat16"): Legs("batched",    "batched",    "batched"),
    ("tpu",   "float32"):  Legs("ragged",     "ragged",     "ragged"),
    ("tpu",   "bfloat16"): Legs("ragged",     "ragged",     "ragged"),
}
# fmt: on


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
    """Compute weight · down_e(act(gate_e x) · up_e x) for each row x of expert e.

    Differentiable in rows, weights and every float leaf of the operands; frozen leaves cost nothing in the backward
    pass, which saves the inputs alone. The model calls `forward` and `backward` from
    `layers.token_dispatcher`.

    Args:
      rows: Hidden states sorted by expert: the first `group_sizes[0]` are expert 0's. Rows beyond the sum give zeros.
      gate: [E, F, D] ([out, in], as in PyTorch), dense, quantized or low-rank (`kernels.operand`).
      up: [E, F, D].
      down: [E, D, F].
      group_sizes: The number of rows of each expert.
      weights: The router weight of each row; default 1.
      activation: A key of `ACTIVATION_FUNCTIONS`.
      backend: One of `BACKENDS`, or three, "fwd,dgrad,wgrad"; default as `choose_legs` says.

    Returns:
      The results, in the dtype of the rows.

    Raises:
      ValueError: For an unknown backend, for shapes that do not fit, and for group sizes that sum to more than the
        rows (where they are known).
    """
    inputs, group_sizes = equally_varying((Inputs(rows, weights, Experts(gate, up, down)), group_sizes))
    check(inputs, group_sizes)
    parse_backend(override(backend))
    return _expert_ffn(activation, backend, inputs, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_ffn(activation: str, backend: str | None, inputs: Inputs, group_sizes: Array) -> Array:
    return forward(inputs, group_sizes, activation, backend)


def _vjp_forward(activation: str, backend: str | None, inputs: Inputs, group_sizes: Any):
    needs_grad = GradMask(leaf.perturbed for leaf in jax.tree.leaves(inputs))
    inputs, group_sizes = jax.tree.map(lambda leaf: leaf.value, (inputs, group_sizes))
    return forward(inputs, group_sizes, activation, backend), (inputs, group_sizes, needs_grad)


def _vjp_backward(activation: str, backend: str | None, saved: tuple[Inputs, Array, GradMask], grad_out: Any):
    inputs, group_sizes, needs_grad = saved
    grads: list[Array | None] = [None] * len(needs_grad)
    if not isinstance(grad_out, jax.custom_derivatives.SymbolicZero):
        grads = backward(inputs, group_sizes, activation, grad_out, needs_grad, backend)
    return jax.tree.unflatten(jax.tree.structure(inputs), grads), None


_expert_ffn.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


@jax.named_scope("expert_ffn")
def forward(inputs: Inputs, group_sizes: Int[Array, "E"], activation: str, backend: str | None) -> Float[Array, "R D"]:
    """Compute `expert_ffn` without a gradient."""
    return BACKENDS[_legs_for(inputs, group_sizes, backend).fwd].forward(inputs, group_sizes, activation)


@jax.named_scope("expert_ffn_backward")
def backward(
    inputs: Inputs,
    group_sizes: Int[Array, "E"],
    activation: str,
    grad_out: Float[Array, "R D"],
    needs_grad: GradMask,
    backend: str | None,
) -> list[Array | None]:
    """Return the gradient of each leaf of `inputs`, None where it is not needed."""
    legs = _legs_for(inputs, group_sizes, backend)
    by_leaf = [legs.dgrad if by_row else legs.wgrad for by_row in inputs.by_row()]
    grads: list[Array | None] = [None] * len(needs_grad)
    for name in dict.fromkeys(legs[1:]):
        mask = GradMask(needed and leg == name for needed, leg in zip(needs_grad, by_leaf, strict=True))
        if any(mask):
            grads = mask.fill(BACKENDS[name].backward(inputs, group_sizes, activation, grad_out, mask), grads)
    return grads


def _legs_for(inputs: Inputs, group_sizes: Array, backend: str | None) -> Legs:
    return choose_legs(jax.default_backend(), inputs.rows.dtype, len(inputs.rows), len(group_sizes), backend)


def choose_legs(platform: str, dtype: Any, rows: int, experts: int, backend: str | None = None) -> Legs:
    """Choose the backend of each leg, and log each choice once per process.

    In order of precedence: `backend`, the environment variable DSMOE_EXPERT_BACKEND, what is tuned for this card and
    few (at most one per expert) or many rows, the table `LEGS`. A backend that cannot run here is replaced by `batched`
    with a warning. Raises `ValueError` for an unknown one.
    """
    if legs := parse_backend(override(backend)):
        reason = "as requested"
    else:
        key = (platform, "float32" if jnp.dtype(dtype) == jnp.float32 else "bfloat16")
        legs, reason = LEGS.get(key, plain.RAGGED), f"{platform}, {jnp.dtype(dtype)}"
        few_or_many = "few" if rows <= experts else "many"
        if platform == "gpu" and (card := tuning.kind()) and (tuned := tuning.legs(card, key[1], few_or_many)):
            legs, reason = legs._replace(**tuned), f"{reason}, {few_or_many} rows, tuned on {card}"
    legs = Legs(*map(_or_fallback, legs))
    _log_once(legs, reason)
    return legs


def override(backend: str | None = None) -> str | None:
    """Return the argument, or else the environment variable; None where neither names a backend."""
    return backend or os.environ.get(VARIABLE) or None


def parse_backend(backend: str | None) -> Legs | None:
    """Return the legs of "name" or "fwd,dgrad,wgrad". Raises `ValueError` for an unknown one."""
    if backend is None:
        return None
    names = backend.split(",")
    for name in names:
        if name not in BACKENDS:
            raise DSMoEError(f"expert_ffn backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if len(names) not in (1, len(Legs._fields)):
        raise DSMoEError(f"expert_ffn backend must be one name or {','.join(Legs._fields)}, got {backend!r}")
    return Legs(*(names * 3)[:3])


@functools.cache
def _or_fallback(name: str) -> str:
    if name == "grouped":
        try:
            plain.grouped_legs()
        except ValueError as error:
            warnings.warn(f"expert_ffn backend 'grouped' cannot run here ({error}): using {_FALLBACK}", stacklevel=4)
            return _FALLBACK
    return name


@functools.cache
def _log_once(legs: Legs, reason: str) -> None:
    _log.info("expert_ffn backend (%s): fwd %s, dgrad %s, wgrad %s", reason, *legs)


def check(inputs: Inputs, group_sizes: Array) -> None:
    """Raise `ValueError` for shapes that do not fit."""
    rows, weights, experts = inputs
    R, D = rows.shape
    if weights is not None and weights.shape != (R,):
        raise DSMoEError(f"expert_ffn: weights must have shape ({R},), got {weights.shape}")
    E = {leaf.shape[0] for leaf in jax.tree.leaves(experts)} | {group_sizes.shape[0]}
    if len(E) > 1:
        raise DSMoEError(f"expert_ffn: operands and group_sizes have different numbers of experts: {sorted(E)}")
    F, _ = shape(experts.gate)
    for name, operand, fits in zip(Experts._fields, experts, ((F, D), (F, D), (D, F)), strict=True):
        if shape(operand) != fits:
            raise DSMoEError(f"expert_ffn: {name} [out, in] must be {fits} for rows of width {D}, got {shape(operand)}")
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if sizes.min() < 0 or sizes.sum() > R:
            raise DSMoEError(
                f"expert_ffn: group_sizes must sum to at most {R} rows, got {sizes.sum()}, min {sizes.min()}"
            )


def equally_varying(operands: Any) -> Any:
    """Make every leaf vary over all mesh axes that one of them varies over, inside a shard_map.

    A loop's carry must not change its type, and the cast of a weight that all devices share is what sums its gradient
    over them.
    """
    axes = frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(operands)))
    return jax.tree.map(lambda leaf: varying(leaf, axes), operands)


def varying(value: Array, axes: Iterable[str]) -> Array:
    """Cast to a value that varies over all `axes`; the gradient is summed over those it did not vary over."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(value).mat.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value
