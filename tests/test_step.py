"""The training step compared with the original, and across meshes, micro-batches and remat policies.

Start at `test_ten_steps_of_adamw_follow_the_originals_curve`.
"""

import dataclasses
import functools
import itertools
import json
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import DeepSeekMoE, abstract, split
from dsmoe_jax.sharding import MeshConfig, make_mesh, place_batch
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.checks import check_choices
from dsmoe_jax.train.loss import shift_labels
from dsmoe_jax.train.optimizer import OptimizerConfig, make_optimizer
from dsmoe_jax.train.step import Metrics, StepConfig, TrainState, init_state, make_step, state_shardings
from tests.helpers import golden
from tests.helpers.hf_folder import tiny
from tests.helpers.meshes import MESHES

pytestmark = pytest.mark.heavy

CURVE = 1e-3  # relative, at every step
EQUAL = 1e-5  # absolute, of losses and gradients; losses are near 4


def batch_of(token_ids: Any, labels: Any | None = None) -> Batch:
    """Sequences of one document each, without padding."""
    ids = np.asarray(token_ids, np.int32)
    targets = np.asarray(shift_labels(jnp.asarray(ids if labels is None else labels, jnp.int32)))
    return Batch(ids, targets, np.ones_like(ids), np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))


def random_batch(config: ModelConfig, rows: int = 32, tokens: int = 12) -> Batch:
    return batch_of(np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens)))


@functools.lru_cache
def programs(fields: str, options: StepConfig, optimizer: OptimizerConfig, mesh: MeshConfig | None, steps: int) -> Any:
    """Mesh, shardings and compiled functions, cached: compilation dominates the time of these tests."""
    config = ModelConfig.from_dict(json.loads(fields))
    on = None if mesh is None else make_mesh(mesh)
    transformation, schedule = make_optimizer(optimizer, steps)
    places = state_shardings(config, transformation, options, on)
    start = jax.jit(lambda params: init_state(config, params, transformation, options), out_shardings=places)
    norm, graph = optimizer.max_grad_norm, abstract(config)[0]
    return on, places, start, make_step(config, graph, transformation, schedule, options, max_grad_norm=norm, mesh=on)


class Run:
    """A step, its state and its mesh."""

    def __init__(
        self,
        model: DeepSeekMoE,
        options: StepConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        mesh: MeshConfig | None = None,
        steps: int = 10,
    ):
        optimizer = optimizer or OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay_mask="all"
        )
        fields = json.dumps(model.config.to_dict(), sort_keys=True)
        self.mesh, places, start, self.step = programs(fields, options or StepConfig(), optimizer, mesh, steps)
        # A copy: the step donates the state, and the model is used again.
        params = {name: np.array(value) for name, value in split(model)[1].items()}
        self.state: TrainState = start(jax.device_put(params, places.params))

    def __call__(self, batch: Batch) -> Metrics:
        if self.mesh is None:
            self.state, metrics = self.step(self.state, batch)
            return metrics
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, Batch(*place_batch(self.mesh, *batch)))
            return metrics


# Parity


@pytest.mark.parametrize("case", ["a_baseline", pytest.param("i_mid", marks=pytest.mark.slow)])
def test_ten_steps_of_adamw_follow_the_originals_curve(case: str):
    tensors, want = golden.tensors(case), golden.expected(case)["adamw_curve"]
    hyper = want["hyper"]
    assert (hyper["decay"], hyper["schedule"], hyper["betas"]) == ("all parameters", "constant", [0.9, 0.95])
    optimizer = OptimizerConfig(
        learning_rate=hyper["lr"],
        schedule="constant",
        warmup_steps=0,
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        max_grad_norm=hyper["clip_global_norm"],
        weight_decay_mask="all",
    )
    run = Run(golden.model(case), optimizer=optimizer)
    batch = batch_of(tensors["in.train.input_ids"], tensors["in.train.labels"])

    got = [run(batch) for _ in want["ce"]]

    for name, values in (
        ("ce", [float(m.cross_entropy) for m in got]),
        ("aux_sum", [float(m.balance_loss.sum()) for m in got]),
        ("grad_norm_before_clip", [float(m.grad_norm) for m in got]),
    ):
        np.testing.assert_allclose(values, want[name], rtol=CURVE, err_msg=name)


# Invariance


def one_step(options: StepConfig, mesh: MeshConfig | None = None, **changes: Any) -> tuple[Metrics, dict[str, Any]]:
    """Metrics of one step, and its gradients from AdamW's first moments."""
    return _one_step(options, mesh, tuple(changes.items()))


@functools.lru_cache
def _one_step(options: StepConfig, mesh: MeshConfig | None, changes: tuple[tuple[str, Any], ...]):
    config = tiny(**dict(changes))
    run = Run(DeepSeekMoE.init(config), options, mesh=mesh)
    metrics = run(random_batch(config))
    return metrics, {name: np.asarray(value) for name, value in run.state.opt_state[0].mu.items()}


def check_equal(got: tuple[Metrics, dict], want: tuple[Metrics, dict]) -> None:
    for name in ("loss", "cross_entropy", "balance_loss", "expert_load", "entropy", "grad_norm"):
        np.testing.assert_allclose(getattr(got[0], name), getattr(want[0], name), rtol=EQUAL, atol=EQUAL, err_msg=name)
    for name, moment in want[1].items():
        np.testing.assert_allclose(got[1][name], moment, rtol=0, atol=EQUAL, err_msg=name)


PLAIN = StepConfig()
POLICIES = ("none", "dots", "full")
PARTS = (1, 2, 4)

# Each pair of a mesh, a number of micro-batches and a remat policy is in one row; one row is not slow: test_sharding.py
# compares losses and gradients on the meshes.
QUICK = ("expert=4,fsdp=2", 2)
PAIRWISE = [
    pytest.param(mesh, parts, POLICIES[(i + j) % 3], marks=[pytest.mark.slow] * ((mesh, parts) != QUICK))
    for i, mesh in enumerate(MESHES)
    for j, parts in enumerate(PARTS)
]


@pytest.mark.parametrize(("mesh", "accumulation", "remat"), PAIRWISE)
def test_a_step_is_the_same_over_meshes_micro_batches_and_remat(mesh: str, accumulation: int, remat: Any):
    got = one_step(StepConfig(gradient_accumulation_steps=accumulation, remat=remat), MESHES[mesh])

    check_equal(got, one_step(PLAIN))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation", "remat"), list(itertools.product(MESHES, PARTS, POLICIES)))
def test_a_step_is_the_same_in_every_combination(mesh: str, accumulation: int, remat: Any):
    got = one_step(StepConfig(gradient_accumulation_steps=accumulation, remat=remat), MESHES[mesh])

    check_equal(got, one_step(PLAIN))


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (None, {}),
        pytest.param(None, {"bias_update_rate": 0.1, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param("fsdp=8", {"gradient_accumulation_steps": 2, "remat": "full"}, marks=pytest.mark.slow),
    ],
)
def test_a_step_with_layers_in_a_loop_is_the_same(mesh: str | None, options: dict[str, Any]):
    got = one_step(StepConfig(scan_layers=True, **options), None if mesh is None else MESHES[mesh])

    check_equal(got, one_step(StepConfig(**options) if mesh is None else PLAIN))


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_micro_batches_of_unequal_targets_weigh_by_them(accumulation: int):
    config = tiny()
    batch = random_batch(config)
    labels = batch.labels.copy()
    labels[::2, 3:] = -100
    batch = batch._replace(labels=labels)

    whole, parts = (
        Run(DeepSeekMoE.init(config), StepConfig(gradient_accumulation_steps=n))(batch) for n in (1, accumulation)
    )

    np.testing.assert_allclose(parts.cross_entropy, whole.cross_entropy, rtol=EQUAL)
    np.testing.assert_allclose(parts.grad_norm, whole.grad_norm, rtol=EQUAL)


def test_bfloat16_computes_near_float32_on_fp32_weights():
    config = tiny()
    runs = [Run(DeepSeekMoE.init(config), StepConfig(compute_dtype=dtype)) for dtype in ("float32", "bfloat16")]

    full, half = (run(random_batch(config)) for run in runs)

    assert abs(float(full.loss) - float(half.loss)) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(runs[1].state.params)} == {jnp.dtype(jnp.float32)}


# Packing


def test_packed_documents_have_the_loss_of_separate_ones():
    config = tiny(aux_loss_alpha=0.0)
    rng = np.random.default_rng(0)
    lengths = (5, 7, 4)
    documents = [rng.integers(0, config.vocab_size, length, dtype=np.int32) for length in lengths]
    alone = np.zeros((3, 16), np.int32)
    labels = np.full((3, 16), -100, np.int32)
    for row, document in enumerate(documents):
        alone[row, : len(document)] = document
        labels[row, : len(document) - 1] = document[1:]
    packed_labels = np.concatenate([labels[row, :length] for row, length in enumerate(lengths)])
    one = Batch(
        np.concatenate(documents)[None],
        packed_labels[None],
        np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None],
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])[None],
    )
    packed = padded(one, 0, rows=2)  # the shape of the others: one step is compiled
    unpacked = batch_of(alone)._replace(labels=labels)

    results = []
    for batch in (packed, unpacked):
        run = Run(DeepSeekMoE.init(config))
        results.append((run(batch), {n: np.asarray(v) for n, v in run.state.opt_state[0].mu.items()}))

    np.testing.assert_allclose(results[0][0].loss, results[1][0].loss, atol=1e-6)
    for name, moment in results[1][1].items():
        np.testing.assert_allclose(results[0][1][name], moment, atol=1e-6, err_msg=name)


# Balance losses


def router_gradients(options: StepConfig, **changes: Any) -> dict[str, float]:
    """Gradient norms of a balance loss by parameter."""
    _, with_loss = one_step(options, **changes)
    _, without = one_step(StepConfig(), aux_loss_alpha=0.0)
    return {name: float(np.abs(with_loss[name] - without[name]).max()) for name in without}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (StepConfig(), {"aux_loss_alpha": 1.0, "seq_aux": True}),
        pytest.param(StepConfig(), {"aux_loss_alpha": 1.0, "seq_aux": False}, marks=pytest.mark.slow),
        (StepConfig(device_balance_groups=2, device_balance_alpha=1.0), {"aux_loss_alpha": 0.0}),
    ],
    ids=["by sequence", "by batch", "by device"],
)
def test_the_gradient_of_every_balance_loss_reaches_the_router(options: StepConfig, changes: dict[str, Any]):
    moved = router_gradients(options, **changes)

    assert moved["layers.1.moe.router.weight"] > 1e-5


def test_a_balance_loss_that_is_off_changes_nothing():
    moved = router_gradients(StepConfig(device_balance_groups=2), aux_loss_alpha=0.0)

    assert set(moved.values()) == {0.0}


def test_a_config_without_an_alpha_has_the_originals():
    fields = tiny().to_dict()
    del fields["aux_loss_alpha"]

    metrics, _ = one_step(StepConfig(), aux_loss_alpha=ModelConfig.from_dict(fields).aux_loss_alpha)

    assert ModelConfig.from_dict(fields).aux_loss_alpha == 0.001
    assert float(metrics.balance_loss.sum()) > 1e-4


def test_router_biases_move_toward_equal_load():
    config = tiny()
    run = Run(DeepSeekMoE.init(config), StepConfig(bias_update_rate=0.01))

    metrics = run(random_batch(config))

    load = np.asarray(metrics.expert_load[0])
    np.testing.assert_allclose(run.state.router_bias["1"], 0.01 * np.sign(load.mean() - load), atol=1e-7)


def padded(batch: Batch, tokens: int, rows: int = 0) -> Batch:
    """The batch with `tokens` of padding after each sequence, and `rows` sequences of padding."""
    blanks = Batch(*(np.full((rows, batch.token_ids.shape[1]), fill, np.int32) for fill in (3, -100, 0, 0)))
    fields = []
    for one, blank, fill in zip(batch, blanks, (3, -100, 0, 0), strict=True):
        mixed = np.concatenate([one[:1], blank, one[1:]])
        fields.append(np.pad(mixed, ((0, 0), (0, tokens)), constant_values=fill).astype(np.int32))
    return Batch(*fields)


UNCOUNTED = StepConfig(count_padding=False, bias_update_rate=0.01, device_balance_groups=2, device_balance_alpha=0.1)


@pytest.mark.parametrize(
    ("seq_aux", "accumulation", "mesh"),
    [
        (True, 2, "expert=4,fsdp=2"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 1, None), (False, 2, None))),
    ],
)
def test_padding_changes_no_metric_and_no_router_bias(seq_aux: bool, accumulation: int, mesh: str | None):
    config = tiny(aux_loss_alpha=0.1, seq_aux=seq_aux)
    options = dataclasses.replace(UNCOUNTED, gradient_accumulation_steps=accumulation)
    # Micro-batches are strided: 16 rows of padding leave the same sequences in each.
    short = random_batch(config, rows=16)
    runs = [Run(DeepSeekMoE.init(config), options, mesh=MESHES[mesh] if mesh else None) for _ in range(2)]

    alone, among_padding = runs[0](short), runs[1](padded(short, 7, rows=16))

    assert float(alone.expert_load.sum()) == 16 * 12 * 2 * len(alone.expert_load)
    for name in ("loss", "balance_loss", "device_balance_loss", "expert_load", "entropy", "grad_norm"):
        np.testing.assert_allclose(
            getattr(among_padding, name), getattr(alone, name), rtol=1e-5, atol=1e-6, err_msg=name
        )
    for layer, bias in runs[0].state.router_bias.items():
        assert np.abs(bias).max() > 0
        np.testing.assert_array_equal(runs[1].state.router_bias[layer], bias)


def test_padding_that_counts_in_the_loss_loads_no_expert():
    config = tiny()
    batch = random_batch(config)
    runs = [Run(DeepSeekMoE.init(config), StepConfig(bias_update_rate=0.01)) for _ in range(2)]

    alone, among_padding = runs[0](batch), runs[1](padded(batch, 20))

    assert float(among_padding.balance_loss.sum()) != pytest.approx(float(alone.balance_loss.sum()), rel=1e-4)
    np.testing.assert_array_equal(among_padding.expert_load, alone.expert_load)
    np.testing.assert_allclose(among_padding.entropy, alone.entropy, rtol=1e-5)
    np.testing.assert_array_equal(runs[1].state.router_bias["1"], runs[0].state.router_bias["1"])


@pytest.mark.parametrize("blank", ["half", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_micro_batch_of_padding_alone_counts_for_nothing(blank: str):
    config = tiny(aux_loss_alpha=0.1, seq_aux=blank == "half")
    batch = random_batch(config, rows=4)
    # Every second row is padding: one of the two micro-batches has no token.
    rows = [np.stack([one, np.full_like(one, fill)], axis=1) for one, fill in zip(batch, (3, -100, 0, 0), strict=True)]
    spread = Batch(*(one.reshape(8, -1) for one in rows))

    alone = Run(DeepSeekMoE.init(config), UNCOUNTED)(batch)
    shared = Run(DeepSeekMoE.init(config), dataclasses.replace(UNCOUNTED, gradient_accumulation_steps=2))(spread)

    for name in ("loss", "balance_loss", "device_balance_loss", "expert_load", "entropy", "grad_norm"):
        np.testing.assert_allclose(getattr(shared, name), getattr(alone, name), rtol=1e-5, atol=1e-6, err_msg=name)


def test_router_biases_even_the_load_out():
    config = tiny(aux_loss_alpha=0.0, num_experts_per_tok=1)
    run = Run(DeepSeekMoE.init(config), StepConfig(bias_update_rate=0.003))
    batch = random_batch(config, rows=32)

    loads = [np.asarray(run(batch).expert_load[0]) for _ in range(30)]

    assert loads[-1].max() < 0.8 * loads[0].max()


# Guard


def test_a_non_finite_step_is_skipped_and_counted():
    config = tiny()
    run = Run(DeepSeekMoE.init(config))
    batch = random_batch(config)
    run(batch)
    before = jax.tree.map(np.asarray, run.state)
    broken = {**run.state.params, "norm.weight": run.state.params["norm.weight"] * np.float32(np.nan)}
    run.state = run.state._replace(params=broken)

    metrics = run(batch)

    assert bool(metrics.skipped)
    assert int(run.state.step) == int(before.step) + 1
    assert int(run.state.guard.total_skips) == int(run.state.guard.consecutive_skips) == 1
    for name, value in before.params.items():
        if name != "norm.weight":
            np.testing.assert_array_equal(run.state.params[name], value)
    for got, want in zip(jax.tree.leaves(run.state.opt_state), jax.tree.leaves(before.opt_state), strict=True):
        np.testing.assert_array_equal(got, want)


# Optimizer


@pytest.mark.parametrize(
    ("schedule", "at", "rate"),
    [
        ("paper", 0, 0.1), ("paper", 4, 0.5), ("paper", 9, 1.0), ("paper", 79, 1.0), ("paper", 80, 0.316),
        ("paper", 90, 0.316**2), ("cosine", 9, 1.0), ("cosine", 55, 0.55), ("cosine", 100, 0.1), ("constant", 99, 1.0),
    ],
)  # fmt: skip
def test_learning_rates_are_those_of_the_schedule(schedule: Any, at: int, rate: float):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10)

    got = np.asarray(make_optimizer(config, 100)[1](at))

    assert float(got) == pytest.approx(2.0 * rate, rel=1e-5)


def test_decay_falls_on_matrices_alone_or_on_all():
    config = tiny()
    zero: Any = {name: np.zeros(spec.shape, np.float32) for name, spec in abstract(config)[1].items()}
    one = {name: np.ones_like(value) for name, value in zero.items()}

    moved = {}
    updates: Any
    for decay in ("matrices", "all"):
        optimizer, _ = make_optimizer(OptimizerConfig(schedule="constant", warmup_steps=0, weight_decay_mask=decay), 10)
        updates, _ = optimizer.update(zero, optimizer.init(one), one)
        moved[decay] = {name for name, update in updates.items() if np.abs(update).max() > 0}

    assert moved["all"] == set(one)
    assert moved["matrices"] == {name for name, value in one.items() if value.ndim > 1}


@pytest.mark.parametrize("moments", [pytest.param("bfloat16", marks=pytest.mark.slow), "factored"])
def test_small_moments_take_less_memory_and_learn(moments: Any):
    config = tiny()
    optimizer = OptimizerConfig(schedule="constant", warmup_steps=0, moments=moments)
    run, full = (
        Run(DeepSeekMoE.init(config), optimizer=dataclasses.replace(optimizer, moments=m)) for m in (moments, "float32")
    )
    batch = random_batch(config)

    losses = [float(run(batch).loss) for _ in range(10)]

    size = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # noqa: E731
    assert size(run.state.opt_state) < 0.8 * size(full.state.opt_state)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: OptimizerConfig(max_grad_norm=0.0), "optimizer.max_grad_norm must be positive or None, got 0.0"),
        (
            lambda: StepConfig(gradient_accumulation_steps=0),
            "step.gradient_accumulation_steps must be at least 1, got 0",
        ),
    ],
)
def test_invalid_values_are_refused(make: Any, named: str):
    with pytest.raises(ValueError, match=named):
        make()


@dataclasses.dataclass
class Choices:
    """The configs themselves are type-checked in tests before they check their values."""

    remat: Literal["none", "full"] = "none"
    quantize: Literal["int8"] | None = None
    trackers: tuple[Literal["console", "jsonl"], ...] = ()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"remat": "all"}, "step.remat must be one of none, full, got 'all'"),
        ({"quantize": "int3"}, "step.quantize must be one of int8, got 'int3'"),
        ({"trackers": ("jsonl", "csv")}, "step.trackers must be one of console, jsonl, got 'csv'"),
    ],
)
def test_values_outside_a_literal_are_refused(values: dict[str, Any], line: str):
    check_choices(Choices(), "step.")

    with pytest.raises(ValueError, match=f"^{line}$"):
        check_choices(Choices(**values), "step.")
