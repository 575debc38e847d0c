"""The routed experts over meshes: whatever the mesh, the strategy and the routing, the numbers of one device.

Start at `test_one_device_equals_the_twin`, then `test_every_mesh_equals_one_device`. After the results come what moves
between devices, what is kept for the backward pass, and what is refused.
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
from dsmoe_jax.layers.dispatch import STRATEGIES, DispatchConfig, routed_experts
from dsmoe_jax.sharding import BATCH_AXES, make_mesh, sharding
from tests.helpers import reference
from tests.helpers.meshes import MESHES, on_mesh
from tests.helpers.trees import FROZEN, paths, trained

M, A, E, D, F = 16, 3, 8, 8, 8
SHAPES = ((E, F, D), (E, F, D), (E, D, F))
Kinds = tuple[str, str, str]
DENSE: Kinds = ("dense", "dense", "dense")
LOW_RANK: Kinds = ("low-rank over dense", "low-rank over dense", "low-rank over dense")
QUANTIZED: Kinds = ("int8", "low-rank over 4-bit", "double")
FACTORS = (None, 0.5, 2.0)

FP32 = 1e-5  # of the largest value: sums of some ten products, in another order
BF16 = 2e-2  # of the largest value: eps is 0.0078, and states, results and gradients are rounded

# The experts of token m. A router repeats none for a token; rows would not mind.
ROUTINGS = {
    "balanced": lambda m: [(3 * m + a) % E for a in range(A)],
    "skewed": lambda m: [0, 1, 2] if m % 2 == 0 else [(3 * m + a) % E for a in range(A)],
    "first three": lambda m: [0, 1, 2],  # all rows to one device, where 4 experts share it
    "one expert": lambda m: [5, 5, 5],
    "half idle": lambda m: [(m + a) % 4 for a in range(A)],
}

# Each mesh with each strategy once, between them with every factor, and the passes after the first that it takes,
# counted by hand: the most rows that any device serves (all_to_all: for any one device), over those of a pass.
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


class Answer(NamedTuple):
    y: Any
    grads: dict[str, Any]  # by path: "x", "weights", "gate.a", …
    overflow_passes: Any


@functools.cache
def arrays(kinds: Kinds = DENSE, tokens: int = M, dtype: Any = jnp.float32) -> tuple[Inputs, jax.Array]:
    """Inputs of the size that keeps results near 1, and a gradient of the output."""
    rng = np.random.default_rng(tokens)
    weights = jnp.asarray(rng.uniform(0.2, 1, (tokens, A)), jnp.float32)
    operands = (reference.random_operand(kind, shape, rng, dtype) for kind, shape in zip(kinds, SHAPES, strict=True))
    x, cotangent = (jnp.asarray(rng.normal(size=(tokens, D)), dtype) for _ in range(2))
    return Inputs(x, weights, Experts(*operands)), cotangent


def ids_of(routing: str, tokens: int = M) -> jax.Array:
    return jnp.asarray([ROUTINGS[routing](m) for m in range(tokens)], jnp.int32)


def routed(inputs: Inputs, ids: Any, options: DispatchConfig = DispatchConfig()) -> tuple[Any, Any]:
    x, weights, experts = inputs
    return routed_experts(x, ids, weights, experts, activation="silu", config=options)


def out_and_grads(options: DispatchConfig, frozen: str, inputs: Inputs, ids: Any, cotangent: Any) -> Answer:
    """The output, and the gradients of all floats but those whose path has a match of `frozen`."""
    leaves, tree = paths(inputs), jax.tree.structure(inputs)

    def of_trained(values: dict[str, Any]):
        return routed(jax.tree.unflatten(tree, (leaves | values).values()), ids, options)

    y, pull, overflow_passes = jax.vjp(of_trained, trained(leaves, frozen), has_aux=True)
    return Answer(y, pull(cotangent)[0], overflow_passes)


@functools.cache
def program(mesh: str | None, options: DispatchConfig, frozen: str):
    """`out_and_grads`, compiled once for each shape: routings are data."""
    return jax.jit(functools.partial(out_and_grads, options, frozen))


def placed(inputs: Inputs, mesh: str) -> Inputs:
    """The same with the operands where a model keeps them."""
    leaves, tree = jax.tree.flatten(inputs.experts)
    axes = itertools.chain(*map(leaf_axes, inputs.experts, EXPERT_AXES))
    places = (sharding("", leaf.shape, own, make_mesh(MESHES[mesh])) for leaf, own in zip(leaves, axes, strict=True))
    return inputs._replace(experts=jax.tree.unflatten(tree, map(jax.device_put, leaves, places)))


def answer(mesh: str | None, options: DispatchConfig, ids: Any, inputs: Inputs, cotangent: Any, frozen: str = "") -> Answer:
    with on_mesh(mesh):
        return program(mesh, options, frozen)(inputs if mesh is None else placed(inputs, mesh), ids, cotangent)


def assert_near(got: Any, want: Any, relative: float, name: str = "") -> None:
    want = np.asarray(want, np.float64)
    scale = np.abs(want).max(initial=0)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=relative * scale, err_msg=name)


def check_all(got: Answer, want: Answer, tolerance: float = FP32, name: str = "") -> None:
    """The output and every gradient."""
    assert_near(got.y, want.y, tolerance, f"{name}: y")
    assert got.grads.keys() <= want.grads.keys()
    for path, grad in got.grads.items():
        assert_near(grad, want.grads[path], tolerance, f"{name}: {path}")


def check_equals_one_device(
    mesh: str, options: DispatchConfig, routing: str, kinds: Kinds = DENSE, tokens: int = M, frozen: str = ""
) -> int:
    """Compares outputs and all gradients; returns the number of overflow passes."""
    inputs, cotangent = arrays(kinds, tokens)
    ids = ids_of(routing, tokens)

    got = answer(mesh, options, ids, inputs, cotangent, frozen)

    want = answer(None, DispatchConfig(), ids, inputs, cotangent, frozen)
    assert want.overflow_passes == 0
    assert got.grads.keys() == want.grads.keys()
    check_all(got, want, name=routing)
    return int(got.overflow_passes)


def twin(inputs: Inputs, ids: np.ndarray, cotangent: Any) -> Answer:
    """In float64 NumPy, one token and one choice at a time."""
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
    return Answer(y, grads, 0)


# --- results ---


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_device_equals_the_twin(routing: str):
    inputs, cotangent = arrays()
    ids = ids_of(routing)

    got = answer(None, DispatchConfig(), ids, inputs, cotangent)

    assert got.grads.keys() == {"x", "weights", "gate", "up", "down"}
    check_all(got, twin(inputs, np.asarray(ids), cotangent))


@pytest.mark.parametrize(("mesh", "strategy", "factor"), OVERFLOW_PASSES)
def test_every_mesh_equals_one_device(mesh: str, strategy: str, factor: float | None):
    options = DispatchConfig(strategy, factor)

    overflow_passes = [check_equals_one_device(mesh, options, routing) for routing in ROUTINGS]

    assert overflow_passes == list(OVERFLOW_PASSES[mesh, strategy, factor])


def test_each_mesh_meets_each_strategy_and_every_factor_comes_up():
    assert {(mesh, strategy) for mesh, strategy, _ in OVERFLOW_PASSES} == set(itertools.product(MESHES, STRATEGIES))
    assert {factor for _, _, factor in OVERFLOW_PASSES} == set(FACTORS)


@pytest.mark.slow
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_factor_on_every_mesh_equals_one_device(mesh: str, strategy: str, factor: float | None):
    overflow_passes = [check_equals_one_device(mesh, DispatchConfig(strategy, factor), routing) for routing in ROUTINGS]

    if factor != 0.5:
        assert overflow_passes[0] == 0  # balanced


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_row_is_dropped_when_a_pass_takes_one(strategy: str):
    """Expert e answers the e-th unit vector to whatever is all ones: outputs count visits, exactly."""
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
        visits, overflow_passes = count(ids)

    np.testing.assert_array_equal(visits, [np.bincount(of_token, minlength=E) for of_token in np.asarray(ids)])
    # The first two experts' device serves 11 of the 24 rows of its group, and 4 of 6 from one device.
    assert overflow_passes == {"gather": 10, "all_to_all": 3}[strategy]


@pytest.mark.parametrize(
    ("mesh", "strategy", "tokens"),
    [
        ("expert=4,fsdp=2", "gather", 5),
        ("expert=4,fsdp=2", "all_to_all", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(MESHES, STRATEGIES, (1, 5, 11))
            if case not in {("expert=4,fsdp=2", "gather", 5), ("expert=4,fsdp=2", "all_to_all", 1)}
        ),
    ],
)
def test_tokens_that_do_not_divide_equal_one_device(mesh: str, strategy: str, tokens: int):
    check_equals_one_device(mesh, DispatchConfig(strategy, 0.5), "skewed", tokens=tokens)


@pytest.mark.parametrize(
    ("mesh", "strategy", "kinds"),
    [
        ("expert=4,fsdp=2", "gather", LOW_RANK),
        ("expert=2,tensor=2,fsdp=2", "all_to_all", LOW_RANK),
        ("expert=4,fsdp=2", "all_to_all", QUANTIZED),
        pytest.param("expert=4,fsdp=2", "all_to_all", LOW_RANK, marks=pytest.mark.slow),
        pytest.param("expert=2,tensor=2,fsdp=2", "gather", LOW_RANK, marks=pytest.mark.slow),
        pytest.param("expert=4,fsdp=2", "gather", QUANTIZED, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_adapters_over_a_frozen_base_equal_one_device(mesh: str, strategy: str, kinds: Kinds):
    inputs, cotangent = arrays(kinds)
    check_equals_one_device(mesh, DispatchConfig(strategy, 0.5), "skewed", kinds, frozen=FROZEN)

    got = answer(mesh, DispatchConfig(strategy, 0.5), ids_of("skewed"), inputs, cotangent, FROZEN)

    names = [name for name, kind in zip(Experts._fields, kinds, strict=True) if kind.startswith("low-rank")]
    assert got.grads.keys() == {"x", "weights", *(f"{name}.{part}" for name in names for part in "ab")}
    check_all(got, twin(inputs, np.asarray(ids_of("skewed")), cotangent))


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        ("expert=2,tensor=2,fsdp=2", "all_to_all"),
        pytest.param("expert=4,fsdp=2", "gather", marks=pytest.mark.slow),
    ],
)
def test_bf16_is_near_the_twin(mesh: str, strategy: str):
    inputs, cotangent = arrays(dtype=jnp.bfloat16)
    ids = ids_of("skewed")

    got = answer(mesh, DispatchConfig(strategy, 0.5), ids, inputs, cotangent)

    assert got.y.dtype == got.grads["x"].dtype == got.grads["gate"].dtype == jnp.bfloat16
    assert got.grads["weights"].dtype == jnp.float32
    check_all(got, twin(inputs, np.asarray(ids), cotangent), BF16)


def test_a_mesh_serves_what_is_not_jitted():
    inputs, cotangent = arrays()
    ids = ids_of("skewed")

    with on_mesh("expert=4,fsdp=2"):
        y, overflow_passes = routed(placed(inputs, "expert=4,fsdp=2"), ids, DispatchConfig("gather", 0.5))

    assert_near(y, answer(None, DispatchConfig(), ids, inputs, cotangent).y, FP32)
    assert overflow_passes == 3  # 11 rows, 3 in a pass


@pytest.mark.parametrize(("factor", "loops"), [(0.5, True), (float("inf"), False)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_infinite_factor_is_one_pass_without_a_loop(strategy: str, factor: float, loops: bool):
    inputs, _ = arrays()

    with on_mesh("expert=8"):
        program = jax.make_jaxpr(lambda: routed(inputs, ids_of("balanced"), DispatchConfig(strategy, factor)))()

    assert ("pmax" in str(program)) == loops  # of the number of passes


# --- what is kept, and what moves ---

POLICIES = {
    "no checkpoint": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=4,fsdp=2"])
def test_completed_weights_are_not_kept_for_the_backward_pass(mesh: str, policy: str):
    inputs, _ = arrays()
    function = lambda inputs: routed(inputs, ids_of("skewed"), DispatchConfig("gather", 0.5))[0]  # noqa: E731
    if (keep := POLICIES[policy]) is not None:
        function = jax.checkpoint(function, policy=keep)

    with on_mesh(mesh):
        kept = jax.tree.leaves(jax.eval_shape(lambda inputs: jax.vjp(function, inputs)[1], placed(inputs, mesh)))

    # Sizes are those of all devices together: completed weights would have `fsdp` times the numbers that are stored.
    sizes = sorted(leaf.size for leaf in kept if leaf.size)
    assert sizes[-3:] == [E * F * D] * 3
    assert sum(sizes) <= 3 * E * F * D + M * D + 2 * M * A + 2


@pytest.mark.parametrize(
    "policy", ["nothing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("everything", "dots"))]
)
def test_a_checkpointed_layer_has_the_same_gradients(policy: str):
    inputs, cotangent = arrays()
    ids = ids_of("skewed")

    def loss(inputs: Inputs, options: DispatchConfig):
        function = jax.checkpoint(lambda inputs: routed(inputs, ids, options)[0], policy=POLICIES[policy])
        return (function(inputs) * cotangent).sum()

    with on_mesh("expert=4,fsdp=2"):
        got = jax.jit(jax.grad(loss), static_argnums=1)(placed(inputs, "expert=4,fsdp=2"), DispatchConfig("gather", 0.5))

    want = answer(None, DispatchConfig(), ids, inputs, cotangent)
    for path, grad in paths(got).items():
        assert_near(grad, want.grads[path], FP32, path)


def test_weights_are_gathered_again_and_their_gradients_reduce_scattered():
    inputs, cotangent = arrays()
    with on_mesh("fsdp=8"):  # gathers along fsdp are then all there are
        args = placed(inputs, "fsdp=8"), ids_of("skewed"), cotangent
        lowered = program("fsdp=8", DispatchConfig(), "").lower(*args)

    text = lowered.as_text()
    forward, backward = text.split("optimization_barrier", maxsplit=1)
    operands = len(Experts._fields)
    assert forward.count('"stablehlo.all_gather"') == backward.count('"stablehlo.all_gather"') == operands
    assert backward.count('"stablehlo.reduce_scatter"') == operands
    assert "reduce_scatter" not in forward


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="on CPU, older compilers drop barriers before they merge")
def test_the_compiler_does_not_merge_the_gathers_of_both_directions():
    inputs, cotangent = arrays()

    with on_mesh("fsdp=8"):
        args = placed(inputs, "fsdp=8"), ids_of("skewed"), cotangent
        compiled = program("fsdp=8", DispatchConfig(), "").lower(*args).compile()

    assert len(re.findall(r" all-gather(-start)?\(", compiled.as_text() or "")) == 2 * len(Experts._fields)


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=4,fsdp=2", "expert=2,tensor=2,fsdp=2"])
def test_gradients_lie_where_their_weights_do(mesh: str):
    strategy, factor = next(options for of_mesh, *options in OVERFLOW_PASSES if of_mesh == mesh)  # compiled already
    inputs, cotangent = arrays()

    got = answer(mesh, DispatchConfig(strategy, factor), ids_of("skewed"), inputs, cotangent)

    for name, operand in zip(Experts._fields, placed(inputs, mesh).experts, strict=True):
        assert got.grads[name].sharding.is_equivalent_to(operand.sharding, operand.ndim), name


COLLECTIVES = r"all_gather|all_to_all|reduce_scatter|all_reduce|collective_permute"


def lowered(function: Any, *args: Any) -> str:
    return jax.jit(function).lower(*args).as_text()


def test_without_a_mesh_nothing_moves():
    inputs, cotangent = arrays()

    text = program(None, DispatchConfig("all_to_all", 0.5), "").lower(inputs, ids_of("skewed"), cotangent).as_text()

    assert not re.search(COLLECTIVES, text)


def test_on_somebody_elses_mesh_nothing_moves():
    inputs, _ = arrays()

    with jax.set_mesh(jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))):
        text = lowered(lambda: routed(inputs, ids_of("skewed"), DispatchConfig("all_to_all", 0.5)))

    assert not re.search(COLLECTIVES, text)


def test_inside_somebody_elses_shard_map_every_device_is_on_its_own():
    inputs, cotangent = arrays()
    ids, tokens = ids_of("skewed"), PartitionSpec(BATCH_AXES)

    @functools.partial(jax.shard_map, in_specs=(tokens, tokens, PartitionSpec(), tokens), out_specs=tokens)
    def own(x: Any, weights: Any, experts: Experts, ids: Any):
        return routed(Inputs(x, weights, experts), ids, DispatchConfig("all_to_all", 0.5))[0]

    def loss(inputs: Inputs, ids: Any):
        y = own(*inputs, ids)
        return (y * cotangent).sum(), y

    with on_mesh("expert=4,fsdp=2"):
        grads, y = jax.jit(jax.grad(loss, has_aux=True))(inputs, ids)
        text = lowered(own, *inputs, ids)

    assert not re.search(COLLECTIVES, text)
    check_all(Answer(y, paths(grads), 0), answer(None, DispatchConfig(), ids, inputs, cotangent))


# --- bad input ---


def refused(mesh: str | None, options: DispatchConfig, experts: Any = None, kinds: Kinds = DENSE) -> str:
    """The one line that a user gets."""
    inputs, _ = arrays(kinds)
    inputs = inputs if experts is None else inputs._replace(experts=experts)
    with on_mesh(mesh), pytest.raises(ValueError, match=r"\w") as error:
        jax.eval_shape(lambda inputs: routed(inputs, ids_of("balanced"), options), inputs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mesh", [None, "expert=8"])
def test_a_strategy_that_does_not_exist_is_refused_with_those_that_do(mesh: str | None):
    said = refused(mesh, DispatchConfig("scatter"))

    assert said == "dispatch strategy 'scatter' does not exist, only gather, all_to_all"


@pytest.mark.parametrize("mesh", [None, "expert=8"])
@pytest.mark.parametrize("factor", [0, 0.0, -1.5, float("nan"), float("-inf")])
def test_a_buffer_factor_that_is_not_positive_is_refused(mesh: str | None, factor: float):
    assert refused(mesh, DispatchConfig(None, factor)) == f"buffer_factor must be positive, not {factor}"


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_experts_that_do_not_divide_are_refused(strategy: str | None):
    experts = Experts(*(operand[:6] for operand in arrays()[0].experts))

    said = refused("expert=4,fsdp=2", DispatchConfig(strategy), experts)

    assert said == "gate of the routed experts: experts of size 6 does not divide over expert=4"


def test_a_width_that_does_not_divide_is_refused():
    gate, up, down = arrays()[0].experts

    said = refused("expert=2,tensor=2,fsdp=2", DispatchConfig(), Experts(gate[:, :7], up[:, :7], down[:, :, :7]))

    assert said == "gate of the routed experts: expert_ffn of size 7 does not divide over tensor=2"


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (("int8", "int8", "int8"), "gate"),
        (("dense", "dense", "4-bit"), "down"),
        (("dense", "low-rank over double", "dense"), "up"),
    ],
    ids=["gate", "down", "up"],
)
def test_quantised_operands_are_refused_over_tensor(kinds: Kinds, name: str):
    """Each device of the axis would have them whole, and its part of the sum would be all of it."""
    said = refused("expert=2,tensor=2,fsdp=2", DispatchConfig(), kinds=kinds)

    assert said == f"{name} of the routed experts is quantised and cannot be split over tensor=2"
