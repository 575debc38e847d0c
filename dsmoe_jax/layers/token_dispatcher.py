"""From tokens to rows sorted by expert, through the experts, and back; over a mesh, the only file that communicates.

Read `routed_experts`, then `_Gather.one_pass` or `_AllToAll.one_pass`. Every token's state goes once to each expert it
chose, as a row; rows come in windows of bounded size, and passes go on until no device has a row left, so nothing is
dropped however skewed the routing is. Both directions are index gathers, in the backward pass too: a gather's own
gradient would be a scatter-add, which is slow everywhere and not repeatable on GPU.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.kernels import few_tokens
from dsmoe_jax.kernels.expert_ffn import expert_ffn, override, varying
from dsmoe_jax.kernels.operand import EXPERT_AXES, Experts, LowRank, Quantized, Wanted, leaf_axes, range_of
from dsmoe_jax.sharding import AXIS_NAMES, BATCH_AXES, EXPERT, FSDP, TENSOR, check_divides, current_mesh, spec

_DEFAULT_FACTOR: Final = 1.5
_FEW_ROWS: Final = 4096  # of all devices; buffers then hold all of them: one pass, and no loop that asks the host
_WIDEST_GATHER: Final = 8  # ways; with top-6 it moves 1.33 times the bytes of all_to_all there, in fewer steps


class Dispatch(NamedTuple):
    """How routed experts are reached. Nothing here changes what they compute.

    `strategy` over the expert axis: "gather" (all tokens of the group to all its devices, each serves its own experts)
    or "all_to_all" (each row to its expert's device); None: gather up to 8 ways. `buffer_factor`: rows that a device
    serves in one pass, as a multiple of its fair share; None: 1.5, or all rows where they are few. `backend`: see
    `expert_ffn`.
    """

    strategy: str | None = None
    buffer_factor: float | None = None
    backend: str | None = None


class Rows(NamedTuple):
    """Which (token, choice) pair stands in which row."""

    pair: Int[Array, "C"]  # row -> pair, its token is pair // A; any pair where the row is not taken
    row: Int[Array, "M A"]  # pair -> row, in range only where `here`
    here: Bool[Array, "M A"]  # whether the pair has a row


class Sorted(NamedTuple):
    """All pairs by expert, stably: within an expert, rows keep the order of the tokens."""

    rows: Rows  # as if there were a row for every pair
    group_sizes: Int[Array, "E"]

    @classmethod
    def by_expert(cls, ids: Int[Array, "M A"], experts: int) -> "Sorted":
        """Sort; pairs whose id is `experts` are nobody's and come last."""
        flat = ids.reshape(-1)
        pair = jnp.argsort(flat, stable=True)
        row = jnp.zeros_like(pair).at[pair].set(jnp.arange(pair.size), unique_indices=True).reshape(ids.shape)
        group_sizes = (flat[:, None] == jnp.arange(experts)[None, :]).sum(axis=0, dtype=jnp.int32)
        return cls(Rows(pair, row, ids < experts), group_sizes)

    def window(self, index: Array | int, size: int) -> "Sorted":
        """The rows from `index · size` on, and how many of them each expert has."""
        start, ends = index * size, jnp.cumsum(self.group_sizes)
        inside = jnp.clip(ends, start, start + size)
        group_sizes = inside - jnp.clip(ends - self.group_sizes, start, start + size)
        row = self.rows.row - start
        pair = self.rows.pair[(start + jnp.arange(size)).clip(max=self.rows.pair.size - 1)]
        return Sorted(Rows(pair, row, self.rows.here & (row >= 0) & (row < size)), group_sizes)

    def slots(self, ways: int, index: Array | int, size: int) -> tuple[Rows, Int[Array, "slots"]]:
        """`size` slots for each of `ways` equal ranges of experts, filled with their rows from `index · size` on.

        Returns them with the expert of each slot, counted within its range; of a slot that is not taken, one past it.
        """
        per_range = self.group_sizes.reshape(ways, -1)
        ends = jnp.cumsum(per_range.sum(axis=1))
        starts = ends - per_range.sum(axis=1) + index * size
        owner = range_of(self.rows.row, ends).clip(max=ways - 1)
        within = self.rows.row - starts[owner]
        here = self.rows.here & (within >= 0) & (within < size)
        row = (starts[:, None] + jnp.arange(size)[None, :]).reshape(-1)
        taken = row < jnp.repeat(ends, size)
        expert = range_of(row, jnp.cumsum(self.group_sizes)) % per_range.shape[1]
        pair = self.rows.pair[row.clip(max=self.rows.pair.size - 1)]
        return Rows(pair, owner * size + within, here), jnp.where(taken, expert, per_range.shape[1])


# --- there and back: each of the two is the other's gradient ---


@jax.custom_vjp
def dispatch(
    x: Float[Array, "M D"], weights: Float[Array, "M A"], rows: Rows
) -> tuple[Float[Array, "C D"], Float[Array, "C"]]:
    """Each row's state and weight."""
    return x[rows.pair // weights.shape[1]], weights.reshape(-1)[rows.pair]


def _dispatch_backward(rows: Rows, grads: tuple[Array, Array]):
    grad_rows, grad_weights = grads
    row = rows.row.clip(0, len(grad_weights) - 1)
    return combine(grad_rows, rows).astype(grad_rows.dtype), jnp.where(rows.here, grad_weights[row], 0), None


dispatch.defvjp(lambda x, weights, rows: (dispatch(x, weights, rows), rows), _dispatch_backward)


@jax.custom_vjp
def combine(y: Float[Array, "C D"], rows: Rows) -> Float[Array, "M D"]:
    """The sum over each token's rows, in fp32."""
    taken = y[rows.row.clip(0, len(y) - 1)].astype(jnp.float32)
    return jnp.where(rows.here[:, :, None], taken, 0).sum(axis=1)


def _combine_backward(saved: tuple[Rows, Array], grad: Array):
    rows, like = saved
    return grad[rows.pair // rows.row.shape[1]].astype(like.dtype), None


combine.defvjp(lambda y, rows: (combine(y, rows), (rows, y[:0])), _combine_backward)


# --- the strategies ---


@dataclasses.dataclass(frozen=True)
class _Gather:
    """All tokens of the group come here, this device's experts serve theirs, the sums go home (a reduce-scatter).

    On one device there is nobody to gather from: this is then the whole of it.
    """

    ways: int  # devices that share the experts
    experts: int  # of this device
    activation: str
    options: Dispatch

    def enter(self, x: Array) -> Array:
        """What passes work on: the values of all tokens of the group."""
        return jax.lax.all_gather(x, EXPERT, tiled=True) if self.ways > 1 else x

    def leave(self, y: Array) -> Array:
        """The sums of this device's own tokens."""
        return jax.lax.psum_scatter(y, EXPERT, tiled=True) if self.ways > 1 else y

    def order(self, ids: Int[Array, "M A"]) -> tuple[Sorted, int, Array | None]:
        """The rows in order, how many of them a pass takes, and how many there are (None: not more than that)."""
        most, size = ids.size * self.ways, self.buffer(ids.size * self.ways, ids.size)
        if self.ways > 1:
            mine = self.enter(ids) - jax.lax.axis_index(EXPERT) * self.experts
            ids = jnp.where((mine >= 0) & (mine < self.experts), mine, self.experts)
        ordered = Sorted.by_expert(ids, self.experts)
        return ordered, size, None if size == most else ordered.group_sizes.sum()

    def one_pass(self, index: Any, size: int, ordered: Sorted, x: Array, weights: Array, experts: Experts) -> Array:
        """What this device's experts add to each token of the group."""
        all_rows = size == ordered.rows.pair.size
        return self.serve(ordered if all_rows else ordered.window(index, size), x, weights, experts)

    def buffer(self, rows: int, share: int | float) -> int:
        """How many of at most `rows` rows one pass takes, if `share` of them are a fair share."""
        factor = self.options.buffer_factor
        if self.ways == 1 or (factor is None and rows * self.ways <= _FEW_ROWS):
            return rows
        return math.ceil(min(rows, (_DEFAULT_FACTOR if factor is None else factor) * share))

    def serve(self, ordered: Sorted, x: Array, weights: Array, experts: Experts) -> Float[Array, "M D"]:
        """Rows through the experts of this device, summed by token, in fp32."""
        rows, row_weights = dispatch(x, weights, ordered.rows)
        options = {"weights": row_weights, "activation": self.activation, "backend": self.options.backend}
        return combine(expert_ffn(rows, *experts, ordered.group_sizes, **options), ordered.rows)


class _AllToAll(_Gather):
    """Each row goes to its expert's device, in a fixed number of slots for each device and pass, and comes back."""

    def enter(self, x: Array) -> Array:
        """Tokens stay where they are."""
        return x

    def leave(self, y: Array) -> Array:
        """They never left."""
        return y

    def order(self, ids: Int[Array, "M A"]) -> tuple[Sorted, int, Array | None]:
        """The rows in order, the slots for each device in a pass, and the most rows that are for one device."""
        ordered, size = Sorted.by_expert(ids, self.ways * self.experts), self.buffer(ids.size, ids.size / self.ways)
        most = ordered.group_sizes.reshape(self.ways, -1).sum(axis=1).max()
        return ordered, size, None if size == ids.size else most

    def one_pass(self, index: Any, size: int, ordered: Sorted, x: Array, weights: Array, experts: Experts) -> Array:
        """What all devices' experts add to each of this device's tokens."""
        slots, expert = ordered.slots(self.ways, index, size)
        sent, sent_weights = dispatch(x, weights, slots)
        come, come_weights, come_expert = (self._exchange(values) for values in (sent, sent_weights, expert))
        served = Sorted.by_expert(come_expert[:, None], self.experts)
        y = self.serve(served, come, come_weights[:, None], experts)
        return combine(self._exchange(y.astype(x.dtype)), slots)

    def _exchange(self, slots: Array) -> Array:
        return jax.lax.all_to_all(slots, EXPERT, split_axis=0, concat_axis=0, tiled=True)


STRATEGIES: Final = {"gather": _Gather, "all_to_all": _AllToAll}


# --- the passes, as one function with a gradient of its own: autodiff refuses a loop whose length depends on data ---


class _Plan(NamedTuple):
    """All that is static."""

    strategy: _Gather
    parted: tuple[int | None, ...]  # the dimension in which each leaf of the operands is split over fsdp
    few: few_tokens.Form | None = None  # what the forward pass computes instead, where tokens are few
    mesh_axes: tuple[str, ...] = ()  # none: a device on its own


_with_own_gradient: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))  # pyright has no type for its result


@_with_own_gradient
def _routed(plan: _Plan, x: Array, weights: Array, experts: Experts, ids: Array) -> tuple[Array, Array]:
    """A device's part of `routed_experts`: the sums for its own tokens, in fp32, and the number of extra passes."""
    strategy = plan.strategy
    if plan.few is not None:
        return plan.few(x, ids, weights, experts, strategy.activation), jnp.int32(0)
    ordered, size, most = strategy.order(ids)
    x, weights, experts = strategy.enter(x), strategy.enter(weights), _whole(plan, experts)
    one_pass = lambda index: strategy.one_pass(index, size, ordered, x, weights, experts)  # noqa: E731
    y, extra = _over_passes(plan, size, most, one_pass)
    return strategy.leave(y), extra


def _routed_forward(plan: _Plan, *operands: Any):
    wanted = Wanted(leaf.perturbed for leaf in jax.tree.leaves(operands[:-1]))
    operands = jax.tree.map(lambda leaf: leaf.value, operands)
    return _routed(plan, *operands), (operands, wanted)


def _routed_backward(plan: _Plan, saved: tuple[Any, Wanted], grads: tuple[Array, Any]):
    """Gathers again and repeats the passes: between forward and backward nothing is kept but the inputs."""
    (x, weights, experts, ids), wanted = saved
    strategy, grad = plan.strategy, grads[0]
    if plan.mesh_axes:
        # Without it the compiler sees the same gathers twice, makes one of them, and keeps every layer's result.
        (x, weights, experts), grad = jax.lax.optimization_barrier(((x, weights, experts), grad))
    ordered, size, most = strategy.order(ids)
    stored = jax.tree.leaves((x, weights, experts))
    operands = strategy.enter(x), strategy.enter(weights), _whole(plan, experts)
    grad = strategy.enter(grad)  # the gradient of `leave`

    def one_pass(index: Any) -> list[Array]:
        pieces = wanted.gradients(lambda own: strategy.one_pass(index, size, ordered, *own), operands, grad)
        return [piece.astype(jnp.float32) for piece in pieces]

    sums, _ = _over_passes(plan, size, most, one_pass)
    found: list[Any] = wanted.put(sums, [None] * len(stored))
    home = [strategy.leave, strategy.leave, *(functools.partial(_part, dim) for dim in plan.parted)]
    back = [
        None if g is None else send(g).astype(leaf.dtype) for g, send, leaf in zip(found, home, stored, strict=True)
    ]
    if plan.mesh_axes:
        # The layer before waits for the gradients of these experts to be scattered: else the compiler scatters those of
        # all layers at the end, and holds them whole until then.
        back = jax.lax.optimization_barrier(back)
    return *jax.tree.unflatten(jax.tree.structure(operands), back), None


_routed.defvjp(_routed_forward, _routed_backward, symbolic_zeros=True)


def _over_passes(plan: _Plan, size: int, most: Array | None, one_pass: Callable[[Any], Any]) -> tuple[Any, Array]:
    """The sum of `one_pass(index)` over as many passes as any device needs, and how many came after the first."""
    total = one_pass(0)
    if most is None:
        return total, jnp.int32(0)
    # Every device takes part in every pass: a collective that some do not reach would never return.
    passes = jax.lax.pmax(-(-most // size), plan.mesh_axes)
    total = jax.lax.fori_loop(1, passes, lambda index, sums: jax.tree.map(jnp.add, sums, one_pass(index)), total)
    return total, jnp.maximum(passes - 1, 0).astype(jnp.int32)


def _whole(plan: _Plan, experts: Experts) -> Experts:
    """This device's experts with all parts that lie elsewhere along fsdp."""
    leaves, tree = jax.tree.flatten(experts)
    gathered = [
        leaf if dim is None else jax.lax.all_gather(leaf, FSDP, axis=dim, tiled=True)
        for dim, leaf in zip(plan.parted, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, gathered)


def _part(dim: int | None, grad: Array) -> Array:
    return grad if dim is None else jax.lax.psum_scatter(grad, FSDP, scatter_dimension=dim, tiled=True)


# --- the way in ---


@jax.named_scope("routed_experts")
def routed_experts(
    x: Float[Array, "M D"],
    ids: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    experts: Experts,
    *,
    activation: str,
    options: Dispatch = Dispatch(),  # noqa: B008 (immutable)
) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
    """The weighted sum of each token's chosen experts, and how many passes came after the first on the mesh.

    Under a mesh (`jax.set_mesh`) tokens are split over its data, fsdp and expert axes, experts over its expert axis,
    their width over its tensor axis; operands are taken as they are stored and completed along fsdp here, so that
    their gradients are reduce-scattered. The numbers are those of one device. Raises `ValueError` for a strategy that
    does not exist, a buffer factor that is not positive, and operands that do not divide over the mesh (quantised ones
    do not over tensor).
    """
    mesh, count = current_mesh(), jax.tree.leaves(experts)[0].shape[0]
    ways = mesh.shape[EXPERT] if mesh else 1
    if options.strategy not in (None, *STRATEGIES):
        raise ValueError(f"dispatch strategy {options.strategy!r} does not exist, only {', '.join(STRATEGIES)}")
    if options.buffer_factor is not None and not options.buffer_factor > 0:
        raise ValueError(f"buffer_factor must be positive, not {options.buffer_factor}")
    chosen = options.strategy or ("gather" if ways <= _WIDEST_GATHER else "all_to_all")
    strategy = STRATEGIES[chosen if ways > 1 else "gather"](ways, count // ways, activation, options)
    leaves, tree = jax.tree.flatten(experts)
    if mesh is None:
        tokens, kept = ids.shape
        few = None if override(options.backend) else few_tokens.form(jax.default_backend(), tokens, kept, count)
        y, extra = _routed(_Plan(strategy, (None,) * len(leaves), few=few), x, weights, experts, ids)
        return y.astype(x.dtype), extra

    specs = _specs(experts, mesh)
    parted = tuple(own.index(FSDP) if FSDP in own else None for own in specs)
    plan = _Plan(strategy, parted, mesh_axes=AXIS_NAMES)

    def on_device(x: Array, ids: Array, weights: Array, *leaves: Array) -> tuple[Array, Array]:
        x, weights, *own, ids = (varying(value, plan.mesh_axes) for value in (x, weights, *leaves, ids))
        y, extra = _routed(plan, x, weights, jax.tree.unflatten(tree, own), ids)
        return jax.lax.psum(y, TENSOR), extra

    tokens, missing = spec(("batch", None)), -len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    # Tokens that are missing to an even split visit nobody.
    x_padded, weights = (jnp.pad(values, ((0, missing), (0, 0))) for values in (x, weights))
    ids = jnp.pad(ids, ((0, missing), (0, 0)), constant_values=count)
    split = {"in_specs": (tokens, tokens, tokens, *specs), "out_specs": (tokens, PartitionSpec())}
    on_mesh = jax.jit(jax.shard_map(on_device, **split))  # outside of a jit JAX has no shard_map of a `custom_vjp`
    y, extra = on_mesh(x_padded, ids, weights, *leaves)
    return y[: len(x)].astype(x.dtype), extra


def _specs(experts: Experts, mesh: AbstractMesh) -> list[PartitionSpec]:
    """How each leaf of the operands lies on the mesh."""
    specs = []
    for name, operand, axes in zip(Experts._fields, experts, EXPERT_AXES, strict=True):
        name, base = f"{name} of the routed experts", operand.base if isinstance(operand, LowRank) else operand
        if isinstance(base, Quantized) and (ways := mesh.shape[TENSOR]) > 1:  # whole on each, it would count that often
            raise ValueError(f"{name} is quantised and cannot be split over tensor={ways}")
        for leaf, own in zip(jax.tree.leaves(operand), leaf_axes(operand, axes), strict=True):
            check_divides(name, leaf.shape, own, mesh)
            specs.append(spec(own))
    return specs
