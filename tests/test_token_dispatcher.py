"""Token dispatch: every mesh, strategy and routing equals one device.

Start at `test_one_device_equals_the_reference`, then `test_every_mesh_equals_one_device`.
"""

import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsmoe_jax.kernels.operand import EXPERT_AXES, Experts, leaf_axes
from dsmoe_jax.layers import token_dispatcher
from dsmoe_jax.layers.token_dispatcher import STRATEGIES, DispatchConfig, Strategy, routed_experts
from dsmoe_jax.sharding import BATCH_AXES, make_mesh, sharding
from tests.helpers import reference
from tests.helpers.conformance import FP32, assert_near
from tests.helpers.meshes import MESHES, on_mesh
from tests.helpers.trees import FROZEN, paths, trained

M, K, E, D, F = 16, 3, 8, 8, 8
SHAPES = ((E, F, D), (E, F, D), (E, D, F))
Kinds = tuple[str, str, str]
DENSE: Kinds = ("dense", "dense", "dense")
LOW_RANK: Kinds = ("low-rank over dense", "low-rank over dense", "low-rank over dense")
QUANTIZED: Kinds = ("int8", "low-rank over 4-bit", "double")
FACTORS = (None, 0.5, 2.0)

BF16 = 2e-2  # of the largest value: eps is 0.0078, and states, results and gradients are rounded

# The experts of token m. A router repeats none for a token; dispatch allows it.
ROUTINGS = {
    "balanced": lambda m: [(3 * m + a) % E for a in range(K)],
    "skewed": lambda m: [0, 1, 2] if m % 2 == 0 else [(3 * m + a) % E for a in range(K)],
    "first three": lambda m: [0, 1, 2],  # all rows to one device with 4 experts
    "one expert": lambda m: [5, 5, 5],
    "half idle": lambda m: [(m + a) % 4 for a in range(K)],
}

# Each mesh with each strategy, every factor at least once, and the overflow passes, counted by hand: the most rows of
# any device (all_to_all: for any device) over rows per pass.
# fmt: off
OVERFLOW_PASSES = {
    # mesh                       strategy      factor    balanced  skewed  first three  one expert  half idle
    ("fsdp=8",                   "gather",     0.5):  (  0,        0,      0,           0,          0),
    ("fsdp=8",                   "all_to_all", None): (  0,        0,      0,           0,          0),
    ("expert=8",                 "gather",     0.5):  (  1,        3,      5,           15,         3),  # passes of 3
    ("expert=8",                 "all_to_all", 2.0):  (  0,        0,      0,           2,          0),  # of 2
    ("expert=4,fsdp=2",          "gather",     2.0):  (  0,        0,      1,           1,          0),  # of 12
    ("expert=4,fsdp=2",          "all_to_all", 0.5):  (  1,        3,      3,           5,          2),  # of 1
    ("expert=2,tensor=2,fsdp=2", "gather",     0.5):  (  1,        2,      3,           3,          3),  # of 6
    ("expert=2,tensor=2,fsdp=2", "all_to_all", 0.5):  (  2,        3,      3,           3,          3),  # of 3
    ("data=2,expert=4",          "gather",     None): (  0,        0,      0,           0,          0),  # of all
    ("data=2,expert=4",          "all_to_all", 2.0):  (  0,        1,      1,           1,          0),  # of 3
}
# fmt: on


class Inputs(NamedTuple):
    x: Any
    weights: Any
    experts: Any


class Result(NamedTuple):
    y: Any
    grads: dict[str, Any]  # by path: "x", "weights", "gate.a", …
    overflow_passes: Any


@functools.cache
def arrays(kinds: Kinds = DENSE, tokens: int = M, dtype: Any = jnp.float32) -> tuple[Inputs, jax.Array]:
    """Inputs scaled for results near 1, and a gradient of the output."""
    rng = np.random.default_rng(tokens)
    weights = jnp.asarray(rng.uniform(0.2, 1, (tokens, K)), jnp.float32)
    operands = (reference.random_operand(kind, shape, rng, dtype) for kind, shape in zip(kinds, SHAPES, strict=True))
    x, cotangent = (jnp.asarray(rng.normal(size=(tokens, D)), dtype) for _ in range(2))
    return Inputs(x, weights, Experts(*operands)), cotangent


def ids_of(routing: str, tokens: int = M) -> jax.Array:
    return jnp.asarray([ROUTINGS[routing](m) for m in range(tokens)], jnp.int32)


def routed(inputs: Inputs, ids: Any, config: DispatchConfig = DispatchConfig()) -> tuple[Any, Any]:  # noqa: B008 (immutable)
    x, weights, experts = inputs
    return routed_experts(x, ids, weights, experts, activation="silu", config=config)


def out_and_grads(config: DispatchConfig, frozen: str, inputs: Inputs, ids: Any, cotangent: Any) -> Result:
    """The output, and the gradients of all float leaves whose path does not match `frozen`."""
    leaves, tree = paths(inputs), jax.tree.structure(inputs)

    def of_trained(values: dict[str, Any]):
        return routed(jax.tree.unflatten(tree, (leaves | values).values()), ids, config)

    y, pull, overflow_passes = jax.vjp(of_trained, trained(leaves, frozen), has_aux=True)
    return Result(y, pull(cotangent)[0], overflow_passes)


@functools.cache
def program(mesh: str | None, config: DispatchConfig, frozen: str):
    """`out_and_grads`, compiled once per shape: routings are data."""
    return jax.jit(functools.partial(out_and_grads, config, frozen))


def placed(inputs: Inputs, mesh: str) -> Inputs:
    """Shard the operands as in a model."""
    leaves, tree = jax.tree.flatten(inputs.experts)
    axes = itertools.chain(*map(leaf_axes, inputs.experts, EXPERT_AXES))
    places = (
        sharding("", leaf.shape, logical, make_mesh(MESHES[mesh])) for leaf, logical in zip(leaves, axes, strict=True)
    )
    return inputs._replace(experts=jax.tree.unflatten(tree, map(jax.device_put, leaves, places)))


def run(mesh: str | None, config: DispatchConfig, ids: Any, inputs: Inputs, cotangent: Any, frozen: str = "") -> Result:
    with on_mesh(mesh):
        return program(mesh, config, frozen)(inputs if mesh is None else placed(inputs, mesh), ids, cotangent)


def check_all(got: Result, want: Result, tolerance: float = FP32, name: str = "") -> None:
    """The output and every gradient."""
    assert_near(got.y, want.y, tolerance, f"{name}: y")
    assert got.grads.keys() <= want.grads.keys()
    for path, grad in got.grads.items():
        assert_near(grad, want.grads[path], tolerance, f"{name}: {path}")


def check_equals_one_device(
    mesh: str, config: DispatchConfig, routing: str, kinds: Kinds = DENSE, tokens: int = M, frozen: str = ""
) -> int:
    """Compare outputs and all gradients; return the number of overflow passes."""
    inputs, cotangent = arrays(kinds, tokens)
    ids = ids_of(routing, tokens)

    got = run(mesh, config, ids, inputs, cotangent, frozen)

    want = run(None, DispatchConfig(), ids, inputs, cotangent, frozen)
    assert want.overflow_passes == 0
    assert got.grads.keys() == want.grads.keys()
    check_all(got, want, name=routing)
    return int(got.overflow_passes)


def expected(inputs: Inputs, ids: np.ndarray, cotangent: Any) -> Result:
    """Float64 NumPy, one token and one expert at a time."""
    x, weights, cotangent = (np.asarray(value, np.float64) for value in (*inputs[:2], cotangent))
    dense = [reference.dense(operand) for operand in inputs.experts]
    y, (d_x, d_weights, *d_dense) = np.zeros(x.shape), map(np.zeros_like, (x, weights, *dense))
    for m, a in np.ndindex(ids.shape):
        e = ids[m, a]
        row = [x[m : m + 1], weights[m, a : a + 1], *(w[e : e + 1] for w in dense)]
        y[m] += reference.expert_ffn(*row, group_sizes=[1], activation="silu")[0]
        of_x, of_weight, *of_dense = reference.expert_ffn_grads(
            *row, group_sizes=[1], activation="silu", grad_out=cotangent[m : m + 1]
        )
        d_x[m] += of_x[0]
        d_weights[m, a] = of_weight[0]
        for d, of_one in zip(d_dense, of_dense, strict=True):
            d[e] += of_one[0]
    grads = {"x": d_x, "weights": d_weights}
    for name, operand, grad in zip(Experts._fields, inputs.experts, d_dense, strict=True):
        grads |= reference.operand_grads(name, operand, grad)
    return Result(y, grads, 0)


# --- results ---


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_device_equals_the_reference(routing: str):
    inputs, cotangent = arrays()
    ids = ids_of(routing)

    got = run(None, DispatchConfig(), ids, inputs, cotangent)

    assert got.grads.keys() == {"x", "weights", "gate", "up", "down"}
    check_all(got, expected(inputs, np.asarray(ids), cotangent))


@pytest.mark.parametrize(
    ("mesh", "strategy", "factor"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (n % 3 == 0 or n in (2, 5)))
        for n, case in enumerate(OVERFLOW_PASSES)
    ],
)
def test_every_mesh_equals_one_device(mesh: str, strategy: Strategy, factor: float | None):
    config = DispatchConfig(strategy, factor)

    overflow_passes = [check_equals_one_device(mesh, config, routing) for routing in ROUTINGS]

    assert overflow_passes == list(OVERFLOW_PASSES[mesh, strategy, factor])


def test_the_cases_cover_every_strategy_and_factor():
    assert {(mesh, strategy) for mesh, strategy, _ in OVERFLOW_PASSES} == set(itertools.product(MESHES, STRATEGIES))
    assert {factor for _, _, factor in OVERFLOW_PASSES} == set(FACTORS)


@pytest.mark.slow
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_factor_on_every_mesh_equals_one_device(mesh: str, strategy: Strategy, factor: float | None):
    overflow_passes = [check_equals_one_device(mesh, DispatchConfig(strategy, factor), routing) for routing in ROUTINGS]

    if factor != 0.5:
        assert overflow_passes[0] == 0  # balanced


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_row_is_dropped_with_one_row_per_pass(strategy: Strategy):
    """Expert e maps ones to the e-th unit vector, so outputs count the uses of each expert."""
    gate = up = jnp.full((E, F, D), 1 / D)
    down = jnp.zeros((E, D, F)).at[jnp.arange(E), jnp.arange(E)].set(1 / F)
    ids = ids_of("skewed")
    count = jax.jit(
        lambda ids: routed_experts(
            jnp.ones((M, D)), ids, jnp.ones(ids.shape), Experts(gate, up, down),
            activation="relu", config=DispatchConfig(strategy, 1e-9),
        )
    )  # fmt: skip

    with on_mesh("expert=4,fsdp=2"):
        uses, overflow_passes = count(ids)

    np.testing.assert_array_equal(uses, [np.bincount(of_token, minlength=E) for of_token in np.asarray(ids)])
    # The device of the first two experts has 11 of the 24 rows of its group, and 4 of 6 from one device.
    assert overflow_passes == {"gather": 10, "all_to_all": 3}[strategy]


@pytest.mark.parametrize(
    ("mesh", "strategy", "tokens"),
    [
        ("expert=4,fsdp=2", "all_to_all", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(MESHES, STRATEGIES, (1, 5, 11))
            if case != ("expert=4,fsdp=2", "all_to_all", 1)
        ),
    ],
)
def test_uneven_token_counts_equal_one_device(mesh: str, strategy: Strategy, tokens: int):
    check_equals_one_device(mesh, DispatchConfig(strategy, 0.5), "skewed", tokens=tokens)


@pytest.mark.parametrize(
    ("mesh", "strategy", "kinds"),
    [
        ("expert=2,tensor=2,fsdp=2", "all_to_all", LOW_RANK),
        pytest.param("expert=4,fsdp=2", "gather", LOW_RANK, marks=pytest.mark.slow),
        pytest.param("expert=4,fsdp=2", "all_to_all", QUANTIZED, marks=pytest.mark.slow),
        pytest.param("expert=4,fsdp=2", "all_to_all", LOW_RANK, marks=pytest.mark.slow),
        pytest.param("expert=2,tensor=2,fsdp=2", "gather", LOW_RANK, marks=pytest.mark.slow),
        pytest.param("expert=4,fsdp=2", "gather", QUANTIZED, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_adapters_over_a_frozen_base_equal_one_device(mesh: str, strategy: Strategy, kinds: Kinds):
    inputs, cotangent = arrays(kinds)
    check_equals_one_device(mesh, DispatchConfig(strategy, 0.5), "skewed", kinds, frozen=FROZEN)

    got = run(mesh, DispatchConfig(strategy, 0.5), ids_of("skewed"), inputs, cotangent, FROZEN)

    names = [name for name, kind in zip(Experts._fields, kinds, strict=True) if kind.startswith("low-rank")]
    assert got.grads.keys() == {"x", "weights", *(f"{name}.{part}" for name in names for part in "ab")}
    check_all(got, expected(inputs, np.asarray(ids_of("skewed")), cotangent))


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        ("expert=2,tensor=2,fsdp=2", "all_to_all"),
        pytest.param("expert=4,fsdp=2", "gather", marks=pytest.mark.slow),
    ],
)
def test_bf16_is_near_the_reference(mesh: str, strategy: Strategy):
    inputs, cotangent = arrays(dtype=jnp.bfloat16)
    ids = ids_of("skewed")

    got = run(mesh, DispatchConfig(strategy, 0.5), ids, inputs, cotangent)

    assert got.y.dtype == got.grads["x"].dtype == got.grads["gate"].dtype == jnp.bfloat16
    assert got.grads["weights"].dtype == jnp.float32
    check_all(got, expected(inputs, np.asarray(ids), cotangent), BF16)


def test_a_mesh_works_without_jit():
    inputs, cotangent = arrays()
    ids = ids_of("skewed")

    with on_mesh("expert=4,fsdp=2"):
        y, overflow_passes = routed(placed(inputs, "expert=4,fsdp=2"), ids, DispatchConfig("gather", 0.5))

    assert_near(y, run(None, DispatchConfig(), ids, inputs, cotangent).y, FP32)
    assert overflow_passes == 3  # 11 rows, 3 per pass


@pytest.mark.parametrize(("factor", "loops"), [(0.5, True), (float("inf"), False)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_infinite_factor_needs_no_loop(strategy: Strategy, factor: float, loops: bool):
    inputs, _ = arrays()

    with on_mesh("expert=8"):
        program = jax.make_jaxpr(lambda: routed(inputs, ids_of("balanced"), DispatchConfig(strategy, factor)))()

    assert ("pmax" in str(program)) == loops  # of the number of passes


# --- memory and communication ---

POLICIES = {
    "no checkpoint": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=4,fsdp=2"])
def test_gathered_weights_are_not_saved_for_the_backward_pass(mesh: str, policy: str):
    inputs, _ = arrays()
    function = lambda inputs: routed(inputs, ids_of("skewed"), DispatchConfig("gather", 0.5))[0]  # noqa: E731
    if (saveable := POLICIES[policy]) is not None:
        function = jax.checkpoint(function, policy=saveable)

    with on_mesh(mesh):
        saved = jax.tree.leaves(jax.eval_shape(lambda inputs: jax.vjp(function, inputs)[1], placed(inputs, mesh)))

    # Global sizes: gathered weights would be `fsdp` times as large as the stored ones.
    sizes = sorted(leaf.size for leaf in saved if leaf.size)
    assert sizes[-3:] == [E * F * D] * 3
    assert sum(sizes) <= 3 * E * F * D + M * D + 2 * M * K + 2


@pytest.mark.parametrize(
    "policy", ["nothing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("everything", "dots"))]
)
def test_a_checkpointed_layer_has_the_same_gradients(policy: str):
    inputs, cotangent = arrays()
    ids = ids_of("skewed")

    def loss(inputs: Inputs, config: DispatchConfig):
        function = jax.checkpoint(lambda inputs: routed(inputs, ids, config)[0], policy=POLICIES[policy])
        return (function(inputs) * cotangent).sum()

    with on_mesh("expert=4,fsdp=2"):
        got = jax.jit(jax.grad(loss), static_argnums=1)(
            placed(inputs, "expert=4,fsdp=2"), DispatchConfig("gather", 0.5)
        )

    want = run(None, DispatchConfig(), ids, inputs, cotangent)
    for path, grad in paths(got).items():
        assert_near(grad, want.grads[path], FP32, path)


def test_backward_gathers_again_and_reduce_scatters():
    inputs, cotangent = arrays()
    with on_mesh("fsdp=8"):  # then all gathers are over fsdp
        args = placed(inputs, "fsdp=8"), ids_of("skewed"), cotangent
        lowered = program("fsdp=8", DispatchConfig(), "").lower(*args)

    text = lowered.as_text()
    forward, backward = text.split("optimization_barrier", maxsplit=1)
    operands = len(Experts._fields)
    assert forward.count('"stablehlo.all_gather"') == backward.count('"stablehlo.all_gather"') == operands
    assert backward.count('"stablehlo.reduce_scatter"') == operands
    assert "reduce_scatter" not in forward


def test_large_experts_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch):
    """Four parts of two experts, which some rows overflow; a layer has 4 KiB of weights."""
    inputs, cotangent = arrays()
    ids, mesh, config = ids_of("skewed"), "fsdp=8", DispatchConfig("gather", None, "batched")
    monkeypatch.setattr(token_dispatcher, "_PART_BYTES", 3 * 4 * F * D * 2)

    with on_mesh(mesh):
        compute = jax.jit(functools.partial(out_and_grads, config, "")).lower(placed(inputs, mesh), ids, cotangent)
        got = compute.compile()(placed(inputs, mesh), ids, cotangent)

    check_all(got, run(None, DispatchConfig(), ids, inputs, cotangent))
    text = compute.as_text()
    assert text.count('"stablehlo.all_gather"') == 2 * 4 * 3
    assert text.count('"stablehlo.reduce_scatter"') == 4 * 3


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="on CPU, older compilers drop barriers before they merge")
def test_xla_does_not_merge_forward_and_backward_gathers():
    inputs, cotangent = arrays()

    with on_mesh("fsdp=8"):
        args = placed(inputs, "fsdp=8"), ids_of("skewed"), cotangent
        compiled = program("fsdp=8", DispatchConfig(), "").lower(*args).compile()

    assert len(re.findall(r" all-gather(-start)?\(", compiled.as_text() or "")) == 2 * len(Experts._fields)


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=4,fsdp=2", "expert=2,tensor=2,fsdp=2"])
def test_gradients_are_sharded_as_their_weights(mesh: str):
    strategy, factor = next(options for of_mesh, *options in OVERFLOW_PASSES if of_mesh == mesh)  # already compiled
    inputs, cotangent = arrays()

    got = run(mesh, DispatchConfig(strategy, factor), ids_of("skewed"), inputs, cotangent)

    for name, operand in zip(Experts._fields, placed(inputs, mesh).experts, strict=True):
        assert got.grads[name].sharding.is_equivalent_to(operand.sharding, operand.ndim), name


COLLECTIVES = r"all_gather|all_to_all|reduce_scatter|all_reduce|collective_permute"


def lowered(function: Any, *args: Any) -> str:
    return jax.jit(function).lower(*args).as_text()


def test_without_a_mesh_nothing_is_communicated():
    inputs, cotangent = arrays()

    text = program(None, DispatchConfig("all_to_all", 0.5), "").lower(inputs, ids_of("skewed"), cotangent).as_text()

    assert not re.search(COLLECTIVES, text)


def test_on_a_foreign_mesh_nothing_is_communicated():
    inputs, _ = arrays()

    with jax.set_mesh(jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))):
        text = lowered(lambda: routed(inputs, ids_of("skewed"), DispatchConfig("all_to_all", 0.5)))

    assert not re.search(COLLECTIVES, text)


def test_inside_a_shard_map_each_device_computes_alone():
    inputs, cotangent = arrays()
    ids, tokens = ids_of("skewed"), PartitionSpec(BATCH_AXES)

    @functools.partial(jax.shard_map, in_specs=(tokens, tokens, PartitionSpec(), tokens), out_specs=tokens)
    def per_device(x: Any, weights: Any, experts: Experts, ids: Any):
        return routed(Inputs(x, weights, experts), ids, DispatchConfig("all_to_all", 0.5))[0]

    def loss(inputs: Inputs, ids: Any):
        y = per_device(*inputs, ids)
        return (y * cotangent).sum(), y

    with on_mesh("expert=4,fsdp=2"):
        grads, y = jax.jit(jax.grad(loss, has_aux=True))(inputs, ids)
        text = lowered(per_device, *inputs, ids)

    assert not re.search(COLLECTIVES, text)
    check_all(Result(y, paths(grads), 0), run(None, DispatchConfig(), ids, inputs, cotangent))
