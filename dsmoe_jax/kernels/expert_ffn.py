"""The SwiGLU of every expert on its rows, sorted by expert, as one operation with several backends.

Start at `expert_ffn`; `BACKENDS` lists the implementations, `LEGS` the defaults.
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
from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.kernels import batched, block_loop, plain, tuning
from dsmoe_jax.kernels.operand import Experts, GradMask, Inputs, Operand, shape
from dsmoe_jax.kernels.tuning import Legs

VARIABLE: Final = "DSMOE_EXPERT_BACKEND"  # the default backend
_FALLBACK: Final = "batched"  # needs nothing but XLA
_log = logging.getLogger("dsmoe_jax")


class Backend(NamedTuple):
    """An implementation of the operation and its gradients."""

    forward: Callable[[Inputs, Array, str], Array]
    backward: Callable[[Inputs, Array, str, Array, GradMask], list[Array]]


def differentiated(forward: Callable[[Inputs, Array, str], Array]) -> Backend:
    """Differentiate `forward` with JAX."""

    def backward(inputs: Inputs, group_sizes: Array, activation: str, grad: Array, needs_grad: GradMask) -> list[Array]:
        return needs_grad.vjp(lambda inputs: forward(inputs, group_sizes, activation), inputs, grad)

    return Backend(forward, backward)


BACKENDS: Final[dict[str, Backend]] = {
    "block_loop": Backend(block_loop.forward, block_loop.backward),
    "batched": Backend(batched.forward, batched.backward),
    "grouped": differentiated(functools.partial(plain.forward_by_groups, plain.grouped_legs)),
    "ragged": differentiated(functools.partial(plain.forward_by_groups, lambda: plain.RAGGED)),
    "dense": differentiated(plain.forward_dense),
}

# The defaults for cards that are not in `tuned.json`; the dtype is that of the rows. On GPU a loop of data-dependent
# length synchronizes with the host every iteration. What `ragged_dot` compiles to there depends on cuDNN: from 9.22 on,
# XLA fuses the forward pass and the row gradients (openxla/xla#40189, #42313); weight gradients, older versions and CPU
# get dense matmuls over all experts. On GPU and TPU few tokens take `few_tokens` instead.
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
    """Compute weight · down_e(act(gate_e x) · up_e x) for each row x of expert e; rows past the last group give zeros.

    Differentiable in rows, weights and every float leaf of the operands; only inputs are saved, and frozen leaves cost
    nothing in the backward pass. The model calls `forward` and `backward` through `layers.token_dispatcher`.
    """
    inputs, group_sizes = equally_varying((Inputs(rows, weights, Experts(gate, up, down)), group_sizes))
    check(inputs, group_sizes)
    requested_legs(backend)
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


@jax.named_scope("experts")
def forward(
    inputs: Inputs,
    group_sizes: Int[Array, "E"],
    activation: str,
    backend: str | None,
    part: batched.Part | None = None,
) -> Float[Array, "R D"]:
    """Compute `expert_ffn`; not differentiable. For `part` see `backward`."""
    if part is not None:
        return batched.forward(inputs, group_sizes, activation, part)
    return BACKENDS[_legs_for(inputs, group_sizes, backend).fwd].forward(inputs, group_sizes, activation)


@jax.named_scope("experts_backward")
def backward(
    inputs: Inputs,
    group_sizes: Int[Array, "E"],
    activation: str,
    grad_out: Float[Array, "R D"],
    needs_grad: GradMask,
    backend: str | None,
    part: batched.Part | None = None,
) -> list[Array | None]:
    """Return the gradient of each leaf of `inputs`, None where it is not needed.

    With `part` the operands are those of some experts, for backends that take parts.
    """
    if part is not None:
        return needs_grad.fill(
            batched.backward(inputs, group_sizes, activation, grad_out, needs_grad, part), [None] * len(needs_grad)
        )
    legs = _legs_for(inputs, group_sizes, backend)
    by_leaf = [legs.dgrad if by_row else legs.wgrad for by_row in inputs.by_row()]
    grads: list[Array | None] = [None] * len(needs_grad)
    for name in dict.fromkeys(legs[1:]):
        mask = GradMask(needed and leg == name for needed, leg in zip(needs_grad, by_leaf, strict=True))
        if any(mask):
            grads = mask.fill(BACKENDS[name].backward(inputs, group_sizes, activation, grad_out, mask), grads)
    return grads


def takes_parts(rows: Float[Array, "R D"], experts: int, backend: str | None) -> bool:
    """Whether the backend of all legs can compute some of the experts at a time."""
    return set(choose_legs(jax.default_backend(), rows.dtype, len(rows), experts, backend)) == {"batched"}


def _legs_for(inputs: Inputs, group_sizes: Array, backend: str | None) -> Legs:
    return choose_legs(jax.default_backend(), inputs.rows.dtype, len(inputs.rows), len(group_sizes), backend)


def choose_legs(platform: str, dtype: Any, rows: int, experts: int, backend: str | None = None) -> Legs:
    """Choose the backend of each leg: `backend`, DSMOE_EXPERT_BACKEND, `tuned.json`, or else `LEGS`.

    Each choice is logged once. A backend that cannot run here is replaced by `batched`, with a warning.
    """
    if legs := requested_legs(backend):
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


def requested_legs(backend: str | None = None) -> Legs | None:
    """Return the backends of the argument, or else of the environment variable, or else None."""
    if backend:
        return parse_backend(backend)
    requested = os.environ.get(VARIABLE)
    return parse_backend(requested, VARIABLE) if requested else None


def parse_backend(backend: str, name: str = "expert_ffn backend") -> Legs:
    """Parse "name" or "fwd,dgrad,wgrad"; `name` is for errors."""
    backends = backend.split(",")
    for one in backends:
        check_choice(name, one, BACKENDS)
    if len(backends) not in (1, len(Legs._fields)):
        raise DSMoEError(f"{name} must be one name or {','.join(Legs._fields)}, got {backend!r}")
    return Legs(*(backends * 3)[:3])


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
    """Raise for shapes that do not agree, and for concrete group sizes that exceed the rows."""
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
        total, least = sizes.sum(), sizes.min()
        if least < 0 or total > R:
            raise DSMoEError(f"expert_ffn: group_sizes must sum to at most {R} rows, got {total}, min {least}")


def equally_varying(operands: Any) -> Any:
    """Make all leaves vary over the same mesh axes in a `shard_map`, as the carry of a loop needs."""
    axes = frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(operands)))
    return jax.tree.map(lambda leaf: varying(leaf, axes), operands)


def varying(value: Array, axes: Iterable[str]) -> Array:
    """Cast to a value that varies over all `axes`; the transpose sums the gradient over the axes added."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(value).mat.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value
