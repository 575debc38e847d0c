"""The training step: gradients of micro-batches, update. Start at `make_step`.

A step is a pure function of a batch and the state, which is what a checkpoint stores.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.layers.router import Routing
from dsmoe_jax.layers.weights import cast
from dsmoe_jax.model import DecoderOutput, ParamSpec, abstract, merge, shardings
from dsmoe_jax.sharding import constrain, current_mesh, sharding
from dsmoe_jax.xla_options import compiler_options

from . import accumulate
from .batch import Batch
from .checks import check_choices, check_minimum
from .guard import Guard
from .loss import IGNORED, balance_loss, chunked_cross_entropy, device_balance_loss
from .optimizer import clip_by_global_norm

_DTYPES: Final = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_NO_PARAMS: Final[Mapping[str, Operand]] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Precision, memory and auxiliary losses of the training step."""

    gradient_accumulation_steps: int = 1
    """Micro-batches per step; their gradients are summed."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of forward and backward; master weights and optimizer state are always fp32."""

    remat: Literal["none", "dots", "full"] = "none"
    """Rematerialization: `dots` saves matmul outputs, `full` recomputes whole layers."""

    scan_layers: bool = False
    """Run the MoE layers in a loop: compiles several times faster, but holds a copy of their weights and gradients."""

    z_loss: float = 0.0
    """Weight of the squared log-partition of the logits (PaLM, arXiv 2204.02311, section 5)."""

    device_balance_groups: int = 1
    """Groups of experts of the device-level balance loss (arXiv 2401.06066, eq. 15 to 17)."""

    device_balance_alpha: float = 0.0
    """Weight of the device-level balance loss; 0.05 for the paper's 145B."""

    count_padding: bool = True
    """Include padding tokens in the balance losses, as the original code does."""

    bias_update_rate: float = 0.0
    """Update rate of router biases for loss-free balancing (arXiv 2408.15664, 0.001 there); 0 disables them."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        check_choices(self, "step.")
        check_minimum(self, {"gradient_accumulation_steps": 1, "device_balance_groups": 1}, "step.")


class Trainable(NamedTuple):
    """The trainable parameters, and how they combine with the frozen ones."""

    specs: Mapping[str, ParamSpec]
    # Returns the model's parameters from (trainable, frozen, dropout key or None).
    merge_params: Callable[[Mapping[str, Array], Mapping[str, Operand], Any], Mapping[str, Operand]]
    dropout: float = 0.0  # rate that `merge_params` applies; above 0 it needs a key

    @classmethod
    def all_params(cls, config: ModelConfig) -> "Trainable":
        """Train every parameter of the model."""
        return cls(abstract(config)[1], lambda params, frozen, key: params)


class TrainState(NamedTuple):
    """The full training state; every leaf is in a checkpoint."""

    step: Int[Array, ""]  # batches consumed so far
    params: dict[str, Array]  # trainable parameters, fp32
    opt_state: Any  # of the optax optimizer
    router_bias: dict[str, Array]  # router biases by layer index; empty unless `bias_update_rate` is set
    guard: Guard


class Metrics(NamedTuple):
    """Metrics of one step; `layers` are the MoE layers in order."""

    loss: Float[Array, ""]  # sum of the cross-entropy, balance, device balance and z losses
    cross_entropy: Float[Array, ""]  # mean over the targets, in nats per token
    balance_loss: Float[Array, "layers"]
    device_balance_loss: Float[Array, "layers"]
    z_loss: Float[Array, ""]  # mean over the targets
    grad_norm: Float[Array, ""]  # global norm before clipping
    learning_rate: Float[Array, ""]
    skipped: Bool[Array, ""]  # whether the update was skipped
    total_skips: Int[Array, ""]
    consecutive_skips: Int[Array, ""]
    expert_load: Float[Array, "layers E"]  # valid tokens routed to each expert
    entropy: Float[Array, "layers"]  # entropy of the router scores, mean over valid tokens, in nats
    overflow_passes: Float[Array, "layers"]  # dispatch passes beyond the first


def init_state(
    config: ModelConfig, params: Mapping[str, Array], optimizer: optax.GradientTransformation, options: StepConfig
) -> TrainState:
    """Return the state before the first step from fp32 `params`; traceable."""
    moe = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)] if options.bias_update_rate else []
    bias = {str(i): jnp.zeros((config.n_routed_experts or 0,), jnp.float32) for i in moe}
    return TrainState(jnp.zeros((), jnp.int32), dict(params), optimizer.init(dict(params)), bias, Guard.empty())


def state_shardings(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    options: StepConfig,
    mesh: Mesh | None,
    trainable: Trainable | None = None,
) -> TrainState:
    """Return the sharding of every leaf: optimizer moments as their parameters, everything else replicated."""
    shardings(config, mesh)  # raises for axes that do not divide
    specs = (trainable or Trainable.all_params(config)).specs
    places = {name: sharding(name, spec.shape, spec.axes, mesh) for name, spec in specs.items()}
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    state = jax.eval_shape(lambda params: init_state(config, params, optimizer, options), params)
    replicated: Sharding = next(iter(places.values())) if mesh is None else NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> Sharding:
        name = str(getattr(path[-1], "key", ""))
        return places[name] if name in specs and specs[name].shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(place, state)


def make_step(
    config: ModelConfig,
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: StepConfig,
    *,
    max_grad_norm: float | None = 1.0,
    mesh: Mesh | None = None,
    seed: int = 0,
    trainable: Trainable | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compile the training step; call it under `jax.set_mesh(mesh)`.

    The step maps (state, batch, frozen parameters) to the new state and metrics, and donates the state. Cross-entropy
    is averaged over the targets of the batch, balance losses per micro-batch (weighted by valid tokens or sequences if
    padding does not count). `Guard` skips bad updates but not their batches.
    """
    trainable = trainable or Trainable.all_params(config)
    places = state_shardings(config, optimizer, options, mesh, trainable)

    def step(state: TrainState, batch: Batch, frozen: Mapping[str, Operand] = _NO_PARAMS) -> tuple[TrainState, Metrics]:
        grads, report = _gradients(config, graph, options, seed, trainable, state, batch, frozen)
        if mesh is not None:
            grads = jax.lax.with_sharding_constraint(grads, places.params)
        grads, norm = clip_by_global_norm(grads, max_grad_norm)
        good = state.guard.accepts(report.loss, norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)  # noqa: E731
        guard = state.guard.updated(report.loss, norm, good)
        metrics = report._replace(
            grad_norm=norm,
            learning_rate=jnp.asarray(schedule(state.step - state.guard.total_skips), jnp.float32),
            skipped=~good,
            total_skips=guard.total_skips,
            consecutive_skips=guard.consecutive_skips,
        )
        bias = keep(_updated_bias(state.router_bias, report.expert_load, options.bias_update_rate), state.router_bias)
        new = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), bias, guard)
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options=compiler_options(mesh))


def make_eval_step(
    config: ModelConfig, graph: Any, options: StepConfig, trainable: Trainable | None = None
) -> Callable[..., tuple[Array, Array]]:
    """Compile the evaluation step, which returns summed cross-entropy and number of targets."""
    trainable = trainable or Trainable.all_params(config)

    def evaluate(params: Any, router_bias: Any, batch: Batch, frozen: Any = _NO_PARAMS) -> tuple[Array, Array]:
        hidden, head = _hidden(graph, trainable.merge_params(params, frozen, None), router_bias, batch, options, None)
        sums = chunked_cross_entropy(hidden.last_hidden_state, head, batch.labels)
        return sums.cross_entropy, (batch.labels != IGNORED).sum()

    return jax.jit(evaluate)


# --- gradients ---


def _gradients(
    config: ModelConfig,
    graph: Any,
    options: StepConfig,
    seed: int,
    trainable: Trainable,
    state: TrainState,
    batch: Batch,
    frozen: Mapping[str, Operand],
) -> tuple[dict[str, Array], Metrics]:
    """Return the sum of the micro-batches' gradients and metrics."""
    parts = options.gradient_accumulation_steps
    targets = jnp.maximum((batch.labels != IGNORED).sum(), 1)
    valid = batch.segment_ids > 0
    tokens = jnp.maximum(valid.sum(), 1)
    sequences = jnp.maximum(valid.any(axis=1).sum(), 1)
    drops = config.attention_dropout or trainable.dropout
    in_order = not frozen and (parts > 1 or current_mesh() is not None)
    key = jax.random.fold_in(jax.random.key(seed), state.step) if drops else None

    def loss_of(params: dict[str, Array], totals: Any, micro: Batch, index: Array | int) -> tuple[Array, Metrics]:
        dropout_key = None if key is None else jax.random.fold_in(key, index)
        merged = trainable.merge_params(params, frozen, dropout_key)
        enter = functools.partial(accumulate.enter, sums=totals) if in_order else None
        hidden, head = _hidden(graph, merged, state.router_bias, micro, options, dropout_key, enter)
        sums = chunked_cross_entropy(hidden.last_hidden_state, head, micro.labels, z_loss=options.z_loss)
        valid = micro.segment_ids > 0
        counted = None if options.count_padding else valid
        # Weights of the micro-batch in the means over the batch.
        by_token = 1 / parts if counted is None else valid.sum() / tokens
        by_sequence = 1 / parts if counted is None else valid.any(axis=1).sum() / sequences
        balance = balance_loss(config, hidden.routing, counted) if config.aux_loss_alpha else {}
        groups, alpha = options.device_balance_groups, options.device_balance_alpha
        device = device_balance_loss(hidden.routing, groups, alpha, counted) if alpha else {}
        balance = {i: one * (by_sequence if config.seq_aux else by_token) for i, one in balance.items()}
        device = {i: one * by_token for i, one in device.items()}
        loss = sums.total / targets + sum((*balance.values(), *device.values()))
        return loss, _report(config, hidden.routing, loss, sums, targets, balance, device, valid, tokens)

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        (_, report), grads = differentiate(state.params, None, batch, 0)
        return grads, report

    def add(total: Any, micro: tuple[Array, Batch]) -> tuple[Any, None]:
        (sums, reports), (index, part) = total, micro
        part = Batch(*(constrain(x, ("batch", None)) for x in part))
        params = accumulate.row_major(state.params)
        if in_order:
            (_, report), sums = jax.value_and_grad(loss_of, argnums=1, has_aux=True)(params, sums, part, index)
        else:
            (_, report), grads = differentiate(params, None, part, index)
            sums = jax.tree.map(jnp.add, sums, grads)
        return (sums, jax.tree.map(jnp.add, reports, report)), None

    micros = Batch(*(_split(x, parts) for x in batch))
    first = jax.eval_shape(lambda: loss_of(state.params, None, Batch(*(x[0] for x in micros)), 0)[1])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state.params, first))
    (grads, report), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), micros))
    return grads, report


def _split(x: Array, parts: int) -> Array:
    """Split [B, …] into `parts` micro-batches."""
    # Strided, so that no sequence changes its device.
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _hidden(
    graph: Any,
    params: Mapping[str, Operand],
    router_bias: dict[str, Array],
    batch: Batch,
    options: StepConfig,
    dropout_key: Any,
    enter: Callable[..., Any] | None = None,
) -> tuple[DecoderOutput, Any]:
    """Return hidden states and head weight in the compute dtype."""
    dtype = _DTYPES[options.compute_dtype]
    inner = {name: value for name, value in params.items() if name.startswith("layers.")}  # cast by block
    outer = {name: value for name, value in params.items() if name not in inner}
    own, head = ({name: outer[name] for name in outer if name.startswith("head.") == of} for of in (False, True))
    if enter is not None:
        _, own = enter(None, own)
    own = {name: cast(value, dtype) for name, value in own.items()}
    model = merge(graph, inner | own | head)
    hidden = model.hidden(
        batch.token_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        router_bias={int(layer): bias for layer, bias in router_bias.items()},
        dropout_key=dropout_key,
        remat=options.remat,
        compute_dtype=dtype,
        enter=enter,
        scan_layers=options.scan_layers,
    )
    if enter is not None and head:
        states, head = enter(hidden.last_hidden_state, head)
        hidden = hidden._replace(last_hidden_state=states)
    if not head:
        return hidden, own["embed"]
    weight: Any = cast(head["head.weight"], dtype)
    return hidden, constrain(weight, ("vocab", "embed"))  # sharded after the cast, else XLA gathers it in fp32


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
    """Return a micro-batch's summable share of the metrics."""
    routed, zero = routing.values(), jnp.zeros((), jnp.float32)
    report = Metrics(
        loss=loss,
        cross_entropy=sums.cross_entropy / targets,
        balance_loss=_stack([balance.get(i, zero) for i in routing]),
        device_balance_loss=_stack([device.get(i, zero) for i in routing]),
        z_loss=(sums.total - sums.cross_entropy) / targets,
        grad_norm=zero,
        learning_rate=zero,
        skipped=jnp.zeros((), bool),
        total_skips=jnp.zeros((), jnp.int32),
        consecutive_skips=jnp.zeros((), jnp.int32),
        expert_load=_stack([_load(one, valid) for one in routed], config.n_routed_experts or 0),
        entropy=_stack([_entropy(one.scores, valid) / tokens for one in routed]),
        overflow_passes=_stack([one.overflow_passes for one in routed]),
    )
    return jax.lax.stop_gradient(report)


def _stack(layers: Sequence[Any], *shape: int) -> Array:
    """Stack the layers' values, also of no layers."""
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in layers]) if layers else jnp.zeros((0, *shape))


def _load(routed: Routing, valid: Bool[Array, "B T"]) -> Float[Array, "E"]:
    """Count the valid tokens of each expert."""
    experts = jnp.arange(routed.scores.shape[-1])
    ids = jnp.where(valid[:, :, None], routed.ids, -1)  # padding is not routed
    return (ids.reshape(-1, 1) == experts[None, :]).sum(axis=0, dtype=jnp.float32)


def _entropy(scores: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Return the entropy of the router scores, summed over valid tokens."""
    entropy = -(scores * jnp.log(jnp.maximum(scores, 1e-30))).sum(axis=-1)
    return jnp.where(valid, entropy, 0).sum()


def _updated_bias(bias: dict[str, Array], load: Float[Array, "layers E"], rate: float) -> dict[str, Array]:
    """Move router biases toward equal expert load (arXiv 2408.15664)."""
    layers = sorted(bias, key=int)
    return {i: bias[i] + rate * jnp.sign(load[n].mean() - load[n]) for n, i in enumerate(layers)}
