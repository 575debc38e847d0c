"""One training step: micro-batches, gradients, the guard against bad steps, the update. Start at `make_step`.

The state is data: every leaf of it is in a checkpoint, and a step is a pure function of it and a batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import LowRank, Operand, Quantized
from dsmoe_jax.layers.router import Routing
from dsmoe_jax.model import REMAT, Hidden, ParamSpec, abstract, merge, shardings
from dsmoe_jax.sharding import constrain, sharding
from dsmoe_jax.xla_options import compiler_options

from .batch import Batch
from .loss import IGNORED, balance_loss, device_balance_loss, head_loss
from .optimizer import clip

_DTYPES: Final = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
WINDOW: Final = 128  # steps that a new one is compared with (OLMo-core's guard)
_KNOWN: Final = 64  # before that many, only what is not finite is bad
_SIGMAS: Final = 6.0
_NOTHING: Final[Mapping[str, Operand]] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step computes, apart from model and optimizer."""

    accumulation: int = 1  # micro-batches whose gradients are added up
    compute_dtype: str = "float32"  # or "bfloat16"; master weights and optimizer state are fp32 always
    remat: str = "none"  # a key of `dsmoe_jax.model.REMAT`
    z_loss: float = 0.0
    device_groups: int = 1  # of experts, for the device-level balance loss
    device_alpha: float = 0.0  # its weight; 0.05 in the paper's 145B
    count_padding: bool = True  # in the balance losses, as the original does; never in biases and metrics
    bias_update_rate: float = 0.0  # balancing by router biases (arXiv 2408.15664), not of v1; 0.001 there

    def __post_init__(self) -> None:
        """`ValueError` for a value that means nothing."""
        for name, table in (("compute_dtype", _DTYPES), ("remat", REMAT)):
            if (value := getattr(self, name)) not in table:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(table)}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, not {self.accumulation}")


class Trained(NamedTuple):
    """Which arrays are trained, and how they and what stays as it is make up the model's parameters."""

    specs: Mapping[str, ParamSpec]
    # Of (trained, frozen, dropout key or None); the key is asked for where there is `dropout`.
    complete: Callable[[Mapping[str, Array], Mapping[str, Operand], Any], Mapping[str, Operand]]
    dropout: float = 0.0

    @classmethod
    def whole(cls, config: ModelConfig) -> "Trained":
        """Every parameter."""
        return cls(abstract(config)[1], lambda trained, frozen, key: trained)


class Guard(NamedTuple):
    """What is known of the last steps: enough to tell that one is far from them."""

    losses: Float[Array, "window"]
    norms: Float[Array, "window"]
    seen: Int[Array, ""]  # finite steps in all
    skipped: Int[Array, ""]  # updates that were not made
    in_a_row: Int[Array, ""]

    @classmethod
    def empty(cls) -> "Guard":
        """Before the first step."""
        window = [jnp.zeros(WINDOW, jnp.float32) for _ in range(2)]
        return cls(*window, *(jnp.zeros((), jnp.int32) for _ in range(3)))


class TrainState(NamedTuple):
    """All that a run knows, but for its config."""

    step: Int[Array, ""]  # batches that were read
    params: dict[str, Array]  # fp32
    optimizer: Any
    router_bias: dict[str, Array]  # by layer; empty unless `bias_update_rate`
    guard: Guard


class Metrics(NamedTuple):
    """What a step says of itself; layers are the MoE layers in order."""

    loss: Float[Array, ""]  # the sum of the following
    cross_entropy: Float[Array, ""]
    balance: Float[Array, "layers"]
    device_balance: Float[Array, "layers"]
    z_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]  # before it was clipped
    learning_rate: Float[Array, ""]
    skipped: Bool[Array, ""]
    skipped_in_all: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    load: Float[Array, "layers E"]  # non-padding tokens routed to each expert
    entropy: Float[Array, "layers"]  # of the router's scores, mean over non-padding tokens, in nats
    overflow_passes: Float[Array, "layers"]


def init_state(
    config: ModelConfig, params: Mapping[str, Array], optimizer: optax.GradientTransformation, options: StepConfig
) -> TrainState:
    """The state before the first step; traceable, `params` in fp32."""
    moe = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)] if options.bias_update_rate else []
    bias = {str(i): jnp.zeros((config.n_routed_experts or 0,), jnp.float32) for i in moe}
    return TrainState(jnp.zeros((), jnp.int32), dict(params), optimizer.init(dict(params)), bias, Guard.empty())


def state_shardings(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    options: StepConfig,
    mesh: Mesh | None,
    trained: Trained | None = None,
) -> TrainState:
    """Where every leaf of the state lies: what has a parameter's name and shape beside it, the rest everywhere.

    `trained` is by default the whole model.
    """
    shardings(config, mesh)  # refuses what does not divide
    specs = abstract(config)[1] if trained is None else trained.specs
    places = {name: sharding(name, spec.shape, spec.axes, mesh) for name, spec in specs.items()}
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    state = jax.eval_shape(lambda params: init_state(config, params, optimizer, options), params)
    everywhere: Sharding = next(iter(places.values())) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> Sharding:
        name = str(getattr(path[-1], "key", ""))
        return places[name] if name in specs and specs[name].shape == leaf.shape else everywhere

    return jax.tree_util.tree_map_with_path(place, state)


def make_step(
    config: ModelConfig,
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: StepConfig,
    *,
    clip_norm: float | None = 1.0,
    mesh: Mesh | None = None,
    seed: int = 0,
    trained: Trained | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled step, a function of (state, batch, frozen parameters); call it under `jax.set_mesh(mesh)`.

    It takes the state's memory for the new one. What is frozen stays as it is stored; there is nothing where the whole
    model is `trained`, the default.

    The mean cross-entropy is over all targets of the batch, whatever the number of micro-batches; balance losses are
    each micro-batch's own, averaged (by valid tokens or sequences where padding does not count). An update is skipped
    where loss or gradient norm is not finite, or above the mean of the last 128 steps by more than 6 standard
    deviations; the batch has then been read all the same.
    """
    trained = Trained.whole(config) if trained is None else trained
    places = state_shardings(config, optimizer, options, mesh, trained)

    def step(state: TrainState, batch: Batch, frozen: Mapping[str, Operand] = _NOTHING) -> tuple[TrainState, Metrics]:
        grads, report = _gradients(config, graph, options, seed, trained, state, batch, frozen)
        if mesh is not None:
            grads = jax.lax.with_sharding_constraint(grads, places.params)
        grads, norm = clip(grads, clip_norm)
        good = _is_good(state.guard, report.loss, norm)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
        guard = _seen(state.guard, report.loss, norm, good)
        metrics = report._replace(
            gradient_norm=norm,
            learning_rate=jnp.asarray(schedule(_updates(state)), jnp.float32),
            skipped=~good,
            skipped_in_all=guard.skipped,
            skipped_in_a_row=guard.in_a_row,
        )
        bias = keep(_moved(state.router_bias, report.load, options.bias_update_rate), state.router_bias)
        new = TrainState(state.step + 1, keep(params, state.params), keep(moments, state.optimizer), bias, guard)
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options=compiler_options(mesh))


def evaluate_step(
    config: ModelConfig, graph: Any, options: StepConfig, trained: Trained | None = None
) -> Callable[..., tuple[Array, Array]]:
    """A compiled function of (trained, router_bias, batch, frozen): the sum of the cross-entropies, how many."""
    trained = Trained.whole(config) if trained is None else trained

    def evaluate(
        params: dict[str, Array],
        router_bias: dict[str, Array],
        batch: Batch,
        frozen: Mapping[str, Operand] = _NOTHING,
    ) -> tuple[Array, Array]:
        hidden, head = _hidden(graph, trained.complete(params, frozen, None), router_bias, batch, options, None)
        return head_loss(hidden.states, head, batch.labels).cross_entropy, (batch.labels != IGNORED).sum()

    return jax.jit(evaluate)


# --- gradients ---


def _gradients(
    config: ModelConfig,
    graph: Any,
    options: StepConfig,
    seed: int,
    trained: Trained,
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Operand],
) -> tuple[dict[str, Array], Metrics]:
    """The sum of the micro-batches' gradients, and what they report together."""
    parts = options.accumulation
    targets = jnp.maximum((batch.labels != IGNORED).sum(), 1)
    valid = batch.segment_ids > 0
    tokens = jnp.maximum(valid.sum(), 1)
    sequences = jnp.maximum(valid.any(axis=1).sum(), 1)
    drops = config.attention_dropout or trained.dropout
    key = jax.random.fold_in(jax.random.key(seed), state.step) if drops else None

    def loss_of(params: dict[str, Array], micro: Batch, index: Array | int) -> tuple[Array, Metrics]:
        dropout_key = None if key is None else jax.random.fold_in(key, index)
        whole = trained.complete(params, frozen, dropout_key)
        hidden, head = _hidden(graph, whole, state.router_bias, micro, options, dropout_key)
        sums = head_loss(hidden.states, head, micro.labels, z_loss=options.z_loss)
        valid = micro.segment_ids > 0
        counted = None if options.count_padding else valid
        # A micro-batch's share of the means over the whole batch.
        by_token = 1 / parts if counted is None else valid.sum() / tokens
        by_sequence = 1 / parts if counted is None else valid.any(axis=1).sum() / sequences
        balance = balance_loss(config, hidden.routing, counted) if config.aux_loss_alpha else {}
        device = (
            device_balance_loss(hidden.routing, options.device_groups, options.device_alpha, counted)
            if options.device_alpha
            else {}
        )
        balance = {i: one * (by_sequence if config.seq_aux else by_token) for i, one in balance.items()}
        device = {i: one * by_token for i, one in device.items()}
        loss = sums.total / targets + sum((*balance.values(), *device.values()))
        return loss, _report(config, hidden.routing, loss, sums, targets, balance, device, valid, tokens)

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        (_, report), grads = differentiate(state.params, batch, 0)
        return grads, report

    def add(total: Any, micro: tuple[Array, Batch]) -> tuple[Any, None]:
        index, part = micro
        part = Batch(*(constrain(x, ("batch", None)) for x in part))
        (_, report), grads = differentiate(state.params, part, index)
        return jax.tree.map(jnp.add, total, (grads, report)), None

    micros = Batch(*(_split(x, parts) for x in batch))
    first = jax.eval_shape(lambda: differentiate(state.params, Batch(*(x[0] for x in micros)), 0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (first[1], first[0][1]))
    (grads, report), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), micros))
    return grads, report


def _split(x: Array, parts: int) -> Array:
    """[B, …] as `parts` micro-batches; each takes every parts-th row, so that no row changes its device."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _hidden(
    graph: Any,
    params: Mapping[str, Operand],
    router_bias: dict[str, Array],
    batch: Batch,
    options: StepConfig,
    dropout_key: Any,
) -> tuple[Hidden, Any]:
    """The states before the head, and the head's weight, in the dtype of computation."""
    dtype = _DTYPES[options.compute_dtype]
    # The router is fp32 whatever the rest is.
    cast = {name: value if ".router." in name else _cast(value, dtype) for name, value in params.items()}
    model = merge(graph, cast)
    hidden = model.hidden(
        batch.token_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        router_bias={int(layer): bias for layer, bias in router_bias.items()},
        dropout_key=dropout_key,
        remat=options.remat,
    )
    return hidden, cast.get("head.weight", cast["embed"])


def _cast(value: Operand, dtype: Any) -> Operand:
    """Dense weights in another dtype; codes, scales and low-rank factors as they are: kernels cast what they read."""
    match value:
        case LowRank(base, a, b):
            return LowRank(_cast(base, dtype), a, b)
        case Quantized():
            return value
        case _:
            return value.astype(dtype)


def _report(
    config: ModelConfig,
    routing: Mapping[int, Routing],
    loss: Array,
    sums: Any,
    targets: Array,
    balance: dict[int, Array],
    device: dict[int, Array],
    valid: Bool[Array, "B T"],
    tokens: Array,
) -> Metrics:
    """A micro-batch's share of the step's report: all of it may be added up. `tokens` are valid in the whole batch."""
    routed, zero = routing.values(), jnp.zeros((), jnp.float32)
    report = Metrics(
        loss=loss,
        cross_entropy=sums.cross_entropy / targets,
        balance=_stack([balance.get(i, zero) for i in routing]),
        device_balance=_stack([device.get(i, zero) for i in routing]),
        z_loss=(sums.total - sums.cross_entropy) / targets,
        gradient_norm=zero,
        learning_rate=zero,
        skipped=jnp.zeros((), bool),
        skipped_in_all=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        load=_stack([_load(one, valid) for one in routed], config.n_routed_experts or 0),
        entropy=_stack([_entropy(one.scores, valid) / tokens for one in routed]),
        overflow_passes=_stack([one.overflow_passes for one in routed]),
    )
    return jax.lax.stop_gradient(report)


def _stack(layers: Sequence[Any], *shape: int) -> Array:
    """The layers' values in one array, also where there is no layer."""
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in layers]) if layers else jnp.zeros((0, *shape))


def _load(routed: Routing, valid: Bool[Array, "B T"]) -> Float[Array, "E"]:
    experts = jnp.arange(routed.scores.shape[-1])
    ids = jnp.where(valid[:, :, None], routed.ids, -1)  # padding loads no expert
    return (ids.reshape(-1, 1) == experts[None, :]).sum(axis=0, dtype=jnp.float32)


def _entropy(scores: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The sum over valid tokens."""
    entropy = -(scores * jnp.log(jnp.maximum(scores, 1e-30))).sum(axis=-1)
    return jnp.where(valid, entropy, 0).sum()


# --- the guard ---


def _is_good(guard: Guard, loss: Array, norm: Array) -> Bool[Array, ""]:
    """Whether an update is made: both finite and, once enough is known, not far above what they were."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    filled = jnp.minimum(guard.seen, WINDOW)
    known = jnp.arange(WINDOW) < filled
    for value, window in ((loss, guard.losses), (norm, guard.norms)):
        mean = jnp.where(known, window, 0).sum() / jnp.maximum(filled, 1)
        deviation = jnp.sqrt(jnp.where(known, jnp.square(window - mean), 0).sum() / jnp.maximum(filled, 1))
        good &= (guard.seen < _KNOWN) | (value <= mean + _SIGMAS * deviation)
    return good


def _seen(guard: Guard, loss: Array, norm: Array, good: Array) -> Guard:
    """The guard after this step; a finite outlier enters the window, else a new level could never be learnt."""
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    here = (jnp.arange(WINDOW) == guard.seen % WINDOW) & finite
    skipped = (~good).astype(jnp.int32)
    return Guard(
        jnp.where(here, loss, guard.losses),
        jnp.where(here, norm, guard.norms),
        guard.seen + finite.astype(jnp.int32),
        guard.skipped + skipped,
        (guard.in_a_row + 1) * skipped,
    )


def _updates(state: TrainState) -> Int[Array, ""]:
    """Updates that were made: what the schedule goes by."""
    return state.step - state.guard.skipped


def _moved(bias: dict[str, Array], load: Float[Array, "layers E"], rate: float) -> dict[str, Array]:
    """Biases a step nearer to equal load: up where an expert had fewer tokens than the mean, down where more."""
    layers = sorted(bias, key=int)
    return {i: bias[i] + rate * jnp.sign(load[n].mean() - load[n]) for n, i in enumerate(layers)}
