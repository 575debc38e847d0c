"""Token dispatch: sort tokens by expert, apply the experts and combine the results, on one device or over a mesh.

Start at `routed_experts`, then `_forward_pass` and `_backward_pass`. All communication of the model is here. Dispatch
and combine are transposes, so the backward pass uses the same functions. Rows are processed in passes of bounded size
until every device is done, so no token is dropped under any routing. Data moves by gathers: autodiff would transpose
them to scatter-adds, which are slow everywhere and not deterministic on GPU.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, PartitionSpec

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.kernels import expert_ffn as ffn
from dsmoe_jax.kernels import few_tokens
from dsmoe_jax.kernels.batched import Part
from dsmoe_jax.kernels.operand import EXPERT_AXES, Experts, GradMask, Inputs, LowRank, Quantized, leaf_axes
from dsmoe_jax.layers.sorted_rows import Rows, Sorted
from dsmoe_jax.sharding import (
    AXIS_NAMES,
    BATCH_AXES,
    EXPERT,
    FSDP,
    TENSOR,
    check_divides,
    constrain,
    current_mesh,
    spec,
)

_DEFAULT_FACTOR: Final = 1.5
_FEW_ROWS: Final = 4096  # over all devices; up to this, all rows fit in one pass, without a data-dependent loop
_PART_BYTES: Final = 300 << 20  # of the weights that are gathered at a time
_WIDEST_GATHER: Final = 8  # ways; with top-6 it moves 1.33× the bytes of all_to_all there, in fewer steps

Strategy: TypeAlias = Literal["gather", "all_to_all"]


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """Configuration of token dispatch; results do not depend on it.

    Attributes:
        strategy: Expert parallelism. "gather" all-gathers tokens over the expert axis and reduce-scatters the sums,
          "all_to_all" sends each row to its expert's device. Default: gather up to 8 ways and for few tokens.
        buffer_factor: Rows per pass, as a multiple of a device's fair share; a smaller one saves memory and may need
          more passes. Default: 1.5, or all rows if they are few.
        backend: Expert kernel, or three for forward and both gradients. Default: the environment variable
          DSMOE_EXPERT_BACKEND, or else by device.
    """

    strategy: Strategy | None = None
    buffer_factor: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.strategy is not None:
            check_choice("dispatch.strategy", self.strategy, STRATEGIES)
        if self.buffer_factor is not None and not self.buffer_factor > 0:
            raise DSMoEError(f"dispatch.buffer_factor must be positive, got {self.buffer_factor}")
        if self.backend:
            ffn.parse_backend(self.backend)


# --- the strategies ---


class _ExchangedRows(NamedTuple):
    """`Rows` through an all-to-all between devices."""

    sent: Rows
    received: Rows

    def gather(self, x: Array) -> Array:
        return self.received.gather(_exchange(self.sent.gather(x)))

    def combine(self, y: Array) -> Array:
        return self.sent.combine(_exchange(self.received.combine(y).astype(y.dtype)))

    def gather_weights(self, weights: Array) -> Array:
        return self.received.gather_weights(_exchange(self.sent.gather_weights(weights))[:, None])

    def combine_weights(self, weights: Array) -> Array:
        return self.sent.combine_weights(_exchange(self.received.combine_weights(weights)[:, 0]))


def _exchange(slots: Array) -> Array:
    return jax.lax.all_to_all(slots, EXPERT, split_axis=0, concat_axis=0, tiled=True)


_Route: TypeAlias = tuple[Rows | _ExchangedRows, Int[Array, "E"]]  # and the group sizes of the rows


@dataclasses.dataclass(frozen=True)
class _Gather:
    """All-gather tokens over the expert axis, apply the local experts, reduce-scatter the sums; local on one device."""

    ways: int  # devices that share the experts
    experts: int  # per device
    buffer_factor: float | None

    def enter(self, x: Array) -> Array:
        return jax.lax.all_gather(x, EXPERT, tiled=True) if self.ways > 1 else x

    def leave(self, y: Array) -> Array:
        """Transpose `enter`."""
        return jax.lax.psum_scatter(y, EXPERT, tiled=True) if self.ways > 1 else y

    def local_ids(self, ids: Int[Array, "M K"]) -> Int[Array, "_ K"]:
        """Return the local expert ids of all tokens; `experts` for experts of other devices."""
        if self.ways == 1:
            return ids
        local = self.enter(ids) - jax.lax.axis_index(EXPERT) * self.experts
        return jnp.where((local >= 0) & (local < self.experts), local, self.experts)

    def order(self, ids: Int[Array, "M K"]) -> tuple[Sorted, int, Array | None]:
        """Return the sorted rows, the rows per pass, and the number of rows (None: one pass)."""
        most, size = ids.size * self.ways, self.buffer(ids.size * self.ways, ids.size)
        ordered = Sorted.by_expert(self.local_ids(ids), self.experts)
        return ordered, size, None if size == most else ordered.group_sizes.sum()

    def route(self, index: Any, size: int, ordered: Sorted) -> _Route:
        """Return the rows of one pass."""
        return ordered if size == ordered.rows.pair.size else ordered.window(index, size)

    def buffer(self, rows: int, share: int | float) -> int:
        """Return the rows per pass, for at most `rows` and a fair share of `share`."""
        if self.ways == 1 or (self.buffer_factor is None and rows * self.ways <= _FEW_ROWS):
            return rows
        factor = _DEFAULT_FACTOR if self.buffer_factor is None else self.buffer_factor
        return math.ceil(min(rows, factor * share))


class _AllToAll(_Gather):
    """Send each row to its expert's device and back, in a fixed number of slots per device and pass."""

    def enter(self, x: Array) -> Array:
        return x

    def leave(self, y: Array) -> Array:
        return y

    def order(self, ids: Int[Array, "M K"]) -> tuple[Sorted, int, Array | None]:
        """Return the sorted rows, the slots per device and pass, and the most rows for a device (None: one pass)."""
        ordered, size = Sorted.by_expert(ids, self.ways * self.experts), self.buffer(ids.size, ids.size / self.ways)
        most = ordered.group_sizes.reshape(self.ways, -1).sum(axis=1).max()
        return ordered, size, None if size == ids.size else most

    def route(self, index: Any, size: int, ordered: Sorted) -> _Route:
        """Return the rows that this device receives in one pass."""
        sent, expert = ordered.slots(self.ways, index, size)
        received, group_sizes = Sorted.by_expert(_exchange(expert)[:, None], self.experts)
        return _ExchangedRows(sent, received), group_sizes


STRATEGIES: Final[dict[Strategy, type[_Gather]]] = {"gather": _Gather, "all_to_all": _AllToAll}


def choose_strategy(strategy: Strategy | None, ways: int) -> Strategy:
    """Return the requested strategy, or else the default for an expert axis of this size."""
    return strategy or ("gather" if ways <= _WIDEST_GATHER else "all_to_all")


# --- the passes and their gradient: one custom VJP, as autodiff rejects a loop of data-dependent length ---


class _Plan(NamedTuple):
    """The static arguments."""

    strategy: _Gather
    activation: str
    backend: str | None
    fsdp_dims: tuple[int | None, ...]  # the dimension of each operand leaf that is sharded over fsdp
    few: few_tokens.Form | None = None  # the forward pass for few tokens
    mesh_axes: tuple[str, ...] = ()  # empty on one device


_custom_vjp: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))  # untyped for pyright


@_custom_vjp
def _routed(plan: _Plan, x: Array, weights: Array, experts: Experts, ids: Array) -> tuple[Array, Array]:
    """Return the fp32 sums of this device's tokens, and the number of overflow passes."""
    strategy = plan.strategy
    if plan.few is not None:
        ids, x, weights = strategy.local_ids(ids), strategy.enter(x), strategy.enter(weights)
        experts = _gather(plan, experts)
        return strategy.leave(plan.few(x, ids, weights, experts, plan.activation)), jnp.int32(0)
    ordered, size, most = strategy.order(ids)
    operands = strategy.enter(x), strategy.enter(weights), experts
    one_pass = lambda index: _forward_pass(plan, strategy.route(index, size, ordered), *operands)  # noqa: E731
    y, overflow_passes = _over_passes(plan, size, most, one_pass)
    return strategy.leave(y), overflow_passes


def _forward_pass(plan: _Plan, route: _Route, x: Array, weights: Array, experts: Experts) -> Array:
    rows, group_sizes = route
    x_rows, weight_rows, outs = rows.gather(x), rows.gather_weights(weights), []
    for own, sizes, part in _in_parts(plan, x_rows, group_sizes, experts, outs):
        inputs = Inputs(x_rows, weight_rows, own)
        ffn.check(inputs, sizes)
        part = part and part._replace(by_row=outs[-1:])
        outs.append(ffn.forward(inputs, sizes, plan.activation, plan.backend, part))
    return rows.combine(outs[-1])


def _backward_pass(
    plan: _Plan, route: _Route, x: Array, weights: Array, experts: Experts, grad: Array, needs_grad: GradMask
) -> list[Array | None]:
    """Return the fp32 gradients of x, weights and operand leaves; None if not needed."""
    rows, group_sizes = route
    x_rows, weight_rows = rows.gather(x), rows.gather_weights(weights)
    grad_rows = rows.gather(grad.astype(x.dtype))
    dx, dweights, reduced = None, None, []
    for own, sizes, part in _in_parts(plan, x_rows, group_sizes, experts, reduced):
        inputs = Inputs(x_rows, weight_rows, own)
        part = part and part._replace(by_row=[piece for piece in (dx, dweights) if piece is not None])
        dx, dweights, *grads = ffn.backward(inputs, sizes, plan.activation, grad_rows, needs_grad, plan.backend, part)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)  # maps None to None
        reduced.append([g if g is None else _reduce_scatter(d, g) for d, g in zip(plan.fsdp_dims, grads, strict=True)])
    dx, dweights = jax.tree.map(rows.combine, dx), jax.tree.map(rows.combine_weights, dweights)
    rest = [
        None if of[0] is None else of[0] if len(of) == 1 else jnp.concatenate(of) for of in zip(*reduced, strict=True)
    ]
    return jax.tree.map(lambda piece: piece.astype(jnp.float32), [dx, dweights, *rest])


def _in_parts(
    plan: _Plan, x_rows: Array, group_sizes: Array, experts: Experts, results: list[Any]
) -> Iterator[tuple[Experts, Array, Part | None]]:
    """Yield the gathered operands of a part of the experts, its group sizes, and which part it is; None: all.

    Unsharded, the experts of a layer of the 16B take 1 GB in bf16, and their gradients 2 GB in fp32. The caller appends
    the result of each part to `results`, for which the next but one waits: else XLA gathers all parts at once.
    """
    E, parts = len(group_sizes), _parts(plan, x_rows, experts)
    if parts == 1:
        yield _gather(plan, experts), group_sizes, None
        return
    for first in range(0, E, E // parts):
        chosen = slice(first, first + E // parts)
        own = jax.tree.map(operator.itemgetter(chosen), experts)
        if len(results) > 1:
            own, results[-2] = jax.lax.optimization_barrier((own, results[-2]))
        sizes = group_sizes[chosen]
        yield _gather(plan, own), sizes, Part(group_sizes[:first].sum(dtype=sizes.dtype), parts, [])


def _parts(plan: _Plan, x_rows: Array, experts: Experts) -> int:
    """Return the number of parts whose experts are gathered and computed one after the other."""
    leaves, sharded = jax.tree.leaves(experts), any(dim is not None for dim in plan.fsdp_dims)
    E, ways = len(leaves[0]), jax.lax.axis_size(FSDP) if sharded else 1
    size = sum(leaf.nbytes * (1 if dim is None else ways) for leaf, dim in zip(leaves, plan.fsdp_dims, strict=True))
    return 1 if ways == 1 or not ffn.takes_parts(x_rows, E, plan.backend) else count_parts(size, E)


def count_parts(size: int, experts: int) -> int:
    """Return the equal parts of experts of `size` bytes together, each as large as is gathered at a time."""
    fits = (parts for parts in range(1, experts + 1) if experts % parts == 0 and size <= parts * _PART_BYTES)
    return next(fits, experts)


def _routed_forward(plan: _Plan, *operands: Any):
    needs_grad = GradMask(leaf.perturbed for leaf in jax.tree.leaves(operands[:-1]))
    operands = jax.tree.map(lambda leaf: leaf.value, operands)
    return _routed(plan, *operands), (operands, needs_grad)


def _routed_backward(plan: _Plan, saved: tuple[Any, GradMask], output_grads: tuple[Array, Any]):
    """Gather and compute again: only the inputs are saved for the backward pass."""
    (x, weights, experts, ids), needs_grad = saved
    strategy, grad = plan.strategy, output_grads[0]
    if plan.mesh_axes:
        # Else XLA merges these all-gathers with those of the forward pass and keeps every layer's gathered weights.
        (x, weights, experts), grad = jax.lax.optimization_barrier(((x, weights, experts), grad))
    ordered, size, most = strategy.order(ids)
    operands = strategy.enter(x), strategy.enter(weights), experts, strategy.enter(grad)
    route = functools.partial(strategy.route, size=size, ordered=ordered)
    one_pass = lambda index: _backward_pass(plan, route(index), *operands, needs_grad)  # noqa: E731
    (dx, dweights, *rest), _ = _over_passes(plan, size, most, one_pass)

    stored, tree = jax.tree.flatten((x, weights, experts))
    left = [None if grad is None else strategy.leave(grad) for grad in (dx, dweights)]
    grads = [
        None if grad is None else grad.astype(leaf.dtype) for grad, leaf in zip((*left, *rest), stored, strict=True)
    ]
    if plan.mesh_axes:
        # The previous layer waits for this reduce-scatter: else XLA defers those of all layers to the end and keeps
        # unsharded gradients until then.
        grads = jax.lax.optimization_barrier(grads)
    return *jax.tree.unflatten(tree, grads), None


_routed.defvjp(_routed_forward, _routed_backward, symbolic_zeros=True)


def _over_passes(plan: _Plan, size: int, most: Array | None, one_pass: Callable[[Any], Any]) -> tuple[Any, Array]:
    """Sum `one_pass(index)` over as many passes as any device needs; also return the number of overflow passes."""
    total = one_pass(0)
    if most is None:
        return total, jnp.int32(0)
    # All devices run all passes: a collective that some devices skip would hang.
    passes = jax.lax.pmax(-(-most // size), plan.mesh_axes)
    total = jax.lax.fori_loop(1, passes, lambda index, sums: jax.tree.map(jnp.add, sums, one_pass(index)), total)
    return total, jnp.maximum(passes - 1, 0).astype(jnp.int32)


def _gather(plan: _Plan, experts: Experts) -> Experts:
    """All-gather operands over fsdp."""
    leaves, tree = jax.tree.flatten(experts)
    gathered = [
        leaf if dim is None else jax.lax.all_gather(leaf, FSDP, axis=dim, tiled=True)
        for dim, leaf in zip(plan.fsdp_dims, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, gathered)


def _reduce_scatter(dim: int | None, grad: Array) -> Array:
    return grad if dim is None else jax.lax.psum_scatter(grad, FSDP, scatter_dimension=dim, tiled=True)


# --- the entry point ---


@jax.named_scope("dispatch")
def routed_experts(
    x: Float[Array, "M D"],
    ids: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    experts: Experts,
    *,
    activation: str,
    config: DispatchConfig = DispatchConfig(),
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """Compute the weighted sum of each token's top-k experts (id E: none), and the number of overflow passes.

    Under a mesh tokens are sharded over the data, fsdp and expert axes, experts over the expert axis, their width over
    the tensor axis. Operands are all-gathered over fsdp here, so that their gradients are reduce-scattered.
    """
    mesh, count, K = current_mesh(), jax.tree.leaves(experts)[0].shape[0], ids.shape[1]
    ways = mesh.shape[EXPERT] if mesh else 1
    leaves, tree = jax.tree.flatten(experts)
    specs = [] if mesh is None else _specs(experts, mesh)
    fsdp_dims = tuple(spec.index(FSDP) if FSDP in spec else None for spec in specs) or (None,) * len(leaves)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1
    padding = -len(x) % shards  # tokens
    group_tokens, few = ways * (len(x) + padding) // shards, None
    if ffn.requested_legs(config.backend) is None and config.strategy != "all_to_all":
        few = few_tokens.form(jax.default_backend(), group_tokens, K, count // ways)
    chosen = "gather" if few or ways == 1 else choose_strategy(config.strategy, ways)
    strategy = STRATEGIES[chosen](ways, count // ways, config.buffer_factor)
    plan = _Plan(strategy, activation, config.backend, fsdp_dims, few, AXIS_NAMES if mesh else ())
    if mesh is None:
        x_, weights, experts, ids = ffn.equally_varying((x, weights, experts, ids))
        y, overflow_passes = _routed(plan, x_, weights, experts, ids)
        return y.astype(x.dtype), overflow_passes

    def on_device(*operands: Array) -> tuple[Array, Array]:
        x, ids, weights, *local = (ffn.varying(operand, AXIS_NAMES) for operand in operands)
        y, overflow_passes = _routed(plan, x, weights, jax.tree.unflatten(tree, local), ids)
        return jax.lax.psum(y, TENSOR), overflow_passes

    tokens = spec(("batch", None))
    replicates = bool(padding) and isinstance(x, Tracer)  # an array outside of jit has its sharding
    if replicates:
        x = constrain(x, ("batch", None), replicate=True)
    x_padded, weights = (jnp.pad(values, ((0, padding), (0, 0))) for values in (x, weights))
    ids = jnp.pad(ids, ((0, padding), (0, 0)), constant_values=count)
    split = {"in_specs": (tokens, tokens, tokens, *specs), "out_specs": (tokens, PartitionSpec())}
    on_mesh = jax.jit(jax.shard_map(on_device, **split))  # jit: JAX has no eager shard_map of a `custom_vjp`
    y, overflow_passes = on_mesh(x_padded, ids, weights, *leaves)
    y = y[: len(x)].astype(x.dtype)
    return constrain(y, ("batch", None), replicate=True) if replicates else y, overflow_passes


def _specs(experts: Experts, mesh: AbstractMesh) -> list[PartitionSpec]:
    """Return the partition spec of each leaf of the operands."""
    specs = []
    for name, operand, axes in zip(Experts._fields, experts, EXPERT_AXES, strict=True):
        name, base = f"{name} of the routed experts", operand.base if isinstance(operand, LowRank) else operand
        if isinstance(base, Quantized) and (ways := mesh.shape[TENSOR]) > 1:  # the sum over replicas would be wrong
            raise DSMoEError(f"{name} is quantized and cannot be sharded over tensor={ways}")
        for leaf, logical in zip(jax.tree.leaves(operand), leaf_axes(operand, axes), strict=True):
            check_divides(name, leaf.shape, logical, mesh)
            specs.append(spec(logical))
    return specs
