"""The routed experts on sorted rows: one suite over every backend, whatever the group sizes and the operands.

Start at `test_every_row_goes_through_its_own_expert`, then `test_every_kind_of_operand`; outputs and gradients are
compared with float64 NumPy, `twin`. Cases and checks stand in `tests/helpers/conformance.py`, for GPUs, too.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsmoe_jax.kernels import batched, grouped_matmul, tuning
from dsmoe_jax.kernels import expert_ffn as operation
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS
from dsmoe_jax.kernels.block_loop import block_rows
from dsmoe_jax.kernels.expert_ffn import BACKENDS, LEGS, Backend, Legs, choose_legs, expert_ffn
from dsmoe_jax.kernels.operand import Experts, Inputs
from tests.helpers import reference
from tests.helpers.conformance import (
    DENSE,
    FP32,
    GROUPS,
    KINDS,
    ROWS,
    D,
    E,
    F,
    arrays,
    assert_near,
    check_adapters_over_bf16,
    check_all,
    check_bf16,
    jitted,
    out_and_grads,
    twin,
)
from tests.helpers.trees import FROZEN, paths

every_backend = pytest.mark.parametrize("backend", BACKENDS)
# `grouped` multiplies as `ragged` does, by kernels with a suite of their own, here interpreted: slow.
every_fast_backend = pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "grouped"])
# Two have gradients of their own; the others leave them to JAX, whatever is trained, and need fewer cases.
LOOPS = ("block_loop", "batched")


# --- rows and their experts ---


@every_backend
@pytest.mark.parametrize("groups", GROUPS)
def test_every_row_goes_through_its_own_expert(groups: str, backend: str):
    if backend == "grouped" and ROWS[groups] != 24:
        pytest.skip("other sizes are for the suite of the grouped matmul")
    inputs, cotangent = arrays(ROWS[groups])
    sizes = jnp.array(GROUPS[groups], jnp.int32)

    out, grads = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    assert set(grads) == {"rows", "weights", "gate", "up", "down"}
    check_all((out, grads), twin(inputs, GROUPS[groups], cotangent))


def test_the_groups_cover_every_kind_of_block():
    assert {block_rows(R, E) for R in ROWS.values()} == {1, 8, 128}


@every_fast_backend
@pytest.mark.parametrize("groups", ["rows beyond", "no expert hit", "one row, rows beyond", "largest blocks"])
def test_rows_beyond_the_groups_give_zeros_and_get_zero_gradients(groups: str, backend: str):
    inputs, cotangent = arrays(ROWS[groups])
    sizes = jnp.array(GROUPS[groups], jnp.int32)
    used = sum(GROUPS[groups])

    out, grads = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    assert not np.any(out[used:])
    assert not np.any(grads["rows"][used:])
    assert not np.any(grads["weights"][used:])
    for e, size in enumerate(GROUPS[groups]):
        for name in Experts._fields:
            assert bool(np.any(grads[name][e])) == (size > 0), f"{name} of expert {e}"


@every_backend
def test_no_rows_at_all(backend: str):
    inputs, cotangent = arrays(0)

    out, grads = jitted(expert_ffn, backend=backend)(inputs, jnp.zeros(E, jnp.int32), cotangent)

    assert out.shape == (0, D)
    assert {path: grad.shape for path, grad in grads.items()} == {p: leaf.shape for p, leaf in paths(inputs).items()}
    assert not any(np.any(grad) for grad in grads.values())


@every_fast_backend
def test_a_single_expert(backend: str):
    inputs, cotangent = arrays(5, experts=1)

    got = jitted(expert_ffn, backend=backend)(inputs, jnp.array([4], jnp.int32), cotangent)

    check_all(got, twin(inputs, [4], cotangent))


@pytest.mark.parametrize("backend", LOOPS)
def test_one_expert_of_many_takes_all_rows(backend: str):
    inputs, cotangent = arrays(48, experts=16)
    sizes = [0] * 9 + [47] + [0] * 6
    passes = sizes[9] / batched.capacity(48, 16)

    got = jitted(expert_ffn, backend=backend)(inputs, jnp.array(sizes, jnp.int32), cotangent)

    assert passes > 5
    check_all(got, twin(inputs, sizes, cotangent))


@pytest.mark.parametrize("backend", [*LOOPS, "slots"])
def test_without_weights_every_row_counts_fully(backend: str):
    (rows, _, experts), _ = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jax.jit(functools.partial(expert_ffn, backend=backend))(rows, *experts, sizes)

    inputs = Inputs(rows, jnp.ones(24), experts)
    assert_near(got, twin(inputs, GROUPS["uneven"], jnp.zeros((24, D)))[0], FP32)


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_every_activation_of_the_table_is_its_formula(name: str):
    x = np.linspace(-6, 6, 101)

    got = jax.jit(ACTIVATION_FUNCTIONS[name])(jnp.asarray(x, jnp.float32))

    assert_near(got, reference.ACTIVATIONS[name](x), FP32)


@pytest.mark.parametrize(
    ("activation", "backend"),  # silu is the default; the others are aliases
    [("relu", backend) for backend in BACKENDS if backend != "grouped"]
    + [("gelu", "block_loop"), ("gelu_new", "batched")],
)
def test_other_activations_than_the_default_one(activation: str, backend: str):
    inputs, cotangent = arrays(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)

    got = jitted(expert_ffn, backend=backend, activation=activation)(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["one row each"], cotangent, activation))


# --- kinds of operands ---


CASES = [(kinds, backend) for kinds in KINDS for backend in LOOPS]
CASES += [(kinds, backend) for kinds in ("quantised", "low-rank", "mixed") for backend in ("ragged", "slots", "dense")]
CASES += [("mixed", "grouped")]


@pytest.mark.parametrize(("kinds", "backend"), CASES)
def test_every_kind_of_operand(kinds: str, backend: str):
    operands, frozen = KINDS[kinds]
    inputs, cotangent = arrays(24, kinds=operands)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(expert_ffn, frozen, backend=backend)(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["uneven"], cotangent))


@pytest.mark.parametrize(
    ("kinds", "backend"),
    [(kinds, "block_loop") for kinds in KINDS]
    + [("low-rank", backend) for backend in BACKENDS if backend != "block_loop"],
)
def test_a_backend_is_asked_only_for_what_is_trained(kinds: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    operands, frozen = KINDS[kinds]
    inputs, cotangent = arrays(24, kinds=operands)
    asked = spy(monkeypatch, backend)

    _, grads = jax.eval_shape(
        functools.partial(out_and_grads, expert_ffn, frozen=frozen, backend=backend),
        inputs, jnp.array(GROUPS["uneven"], jnp.int32), cotangent,
    )  # fmt: skip

    assert asked == {backend: set(grads)}


def spy(monkeypatch: pytest.MonkeyPatch, *backends: str) -> dict[str, set[str]]:
    """Of which leaves each of these backends is asked the gradient, filled in while a program is traced."""
    asked: dict[str, set[str]] = {}

    def listening(backend: str, backward: Any):
        def heard(inputs: Inputs, group_sizes: Any, activation: str, grad_out: Any, needs_grad: Any):
            assert backend not in asked, "asked twice"
            asked[backend] = set(needs_grad.select(list(paths(inputs))))
            return backward(inputs, group_sizes, activation, grad_out, needs_grad)

        return heard

    for backend in backends:
        forward, backward = BACKENDS[backend]
        monkeypatch.setitem(BACKENDS, backend, Backend(forward, listening(backend, backward)))
    return asked


@pytest.mark.parametrize("backend", LOOPS)
@pytest.mark.parametrize(
    ("kinds", "frozen", "sums"),
    [
        (DENSE, "", 3),
        (DENSE, "gate|up|down", 0),
        (DENSE, "gate|rows", 2),
        (("low-rank over dense",) * 3, "", 3),
        (("low-rank over dense",) * 3, "base", 0),
    ],
    ids=["all", "rows", "two weights", "all of low-rank", "adapters"],
)
def test_no_gradients_of_frozen_weights_are_summed(kinds: Any, frozen: str, sums: int, backend: str):
    """The sums over blocks or passes are what a loop carries; 48 rows, so that nothing else is as large as weights."""
    inputs, cotangent = arrays(48, kinds=kinds)
    program = functools.partial(out_and_grads, expert_ffn, frozen=frozen, backend=backend)

    traced = jax.make_jaxpr(program)(inputs, jnp.array([48, 0, 0, 0], jnp.int32), cotangent)

    carried = [value for value in carried_by_loops(traced.jaxpr) if value.shape in ((E, F, D), (E, D, F))]
    assert len(carried) == sums


def carried_by_loops(jaxpr: Any) -> Iterator[Any]:
    """The type of every value that comes out of a loop, however deep in other equations it stands."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield from (value.aval for value in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(parameter, "eqns"):
                yield from carried_by_loops(getattr(parameter, "jaxpr", parameter))


def test_an_output_that_nobody_uses_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    (rows, _, experts), _ = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)
    asked = spy(monkeypatch, "block_loop")

    @jax.grad
    def grad(rows: Any):
        return rows.sum() + jax.lax.stop_gradient(expert_ffn(rows, *experts, sizes, backend="block_loop")).sum()

    assert np.all(grad(rows) == 1)
    assert not asked


# --- bfloat16 ---


@every_backend
def test_bf16_stays_near_fp32(backend: str):
    check_bf16(backend)


@pytest.mark.parametrize("backend", [*LOOPS, "ragged", "slots"])
def test_adapters_in_fp32_serve_rows_in_bf16(backend: str):
    check_adapters_over_bf16(backend)


@pytest.mark.parametrize("trained", [False, True], ids="trained={}".format)
def test_the_loop_never_holds_all_experts_widened(trained: bool):
    """XLA moves a plain cast of loop constants out of the loop: an fp32 copy of all experts."""
    experts, width, hidden = 64, 256, 128
    shapes = ((24, width), (experts, hidden, width), (experts, hidden, width), (experts, width, hidden))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    in_fp32 = sum(4 * array.size for array in operands[1:])
    forward = functools.partial(expert_ffn, backend="block_loop")
    of_rows = jax.grad(lambda *arrays: forward(*arrays).astype(jnp.float32).sum())

    program = jax.jit(of_rows if trained else forward).lower(*operands, jax.ShapeDtypeStruct((experts,), jnp.int32))

    memory = program.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < in_fp32 / 20


# --- inside other transformations ---


@pytest.mark.parametrize("backend", [*LOOPS, "ragged"])
def test_recomputing_in_the_backward_pass_changes_nothing(backend: str):
    inputs, cotangent = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(jax.checkpoint(functools.partial(expert_ffn, backend=backend)))(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["uneven"], cotangent))


def test_recomputing_leaves_frozen_operands_alone(monkeypatch: pytest.MonkeyPatch):
    inputs, cotangent = arrays(24, kinds=("low-rank over dense",) * 3)
    asked = spy(monkeypatch, "block_loop")
    recomputed = jax.checkpoint(functools.partial(expert_ffn, backend="block_loop"))

    _, grads = jax.eval_shape(
        functools.partial(out_and_grads, recomputed, frozen=FROZEN),
        inputs, jnp.array(GROUPS["uneven"], jnp.int32), cotangent,
    )  # fmt: skip

    assert asked == {"block_loop": set(grads)}


# jax's interpreter of Pallas kernels does not track what varies over a mesh, so not for `grouped`:
ON_A_MESH = [("dense", True, backend) for backend in BACKENDS if backend != "grouped"]
ON_A_MESH += [("dense", False, backend) for backend in (*LOOPS, "grouped")]
ON_A_MESH += [("low-rank over dense", True, backend) for backend in LOOPS]


@pytest.mark.parametrize(("kind", "check_vma", "backend"), ON_A_MESH)
def test_each_device_of_a_mesh_serves_its_own_rows(kind: str, check_vma: bool, backend: str):
    """Rows are split, weights are not: their gradients are sums over the devices."""
    inputs, cotangent = arrays(48, kinds=(kind, kind, kind))
    halves = ((slice(0, 24), GROUPS["uneven"]), (slice(24, 48), GROUPS["rows beyond"]))
    sizes = jnp.array([size for _, sizes in halves for size in sizes], jnp.int32)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("x"), PartitionSpec()

    def per_device(rows: Any, experts: Experts, sizes: Any, weights: Any):
        return expert_ffn(rows, *experts, sizes, weights=weights, backend=backend)

    def on_mesh(rows: Any, gate: Any, up: Any, down: Any, sizes: Any, weights: Any):
        return jax.shard_map(
            per_device, mesh=mesh, in_specs=(split, whole, split, split), out_specs=split, check_vma=check_vma
        )(rows, Experts(gate, up, down), sizes, weights)

    out, grads = jax.jit(functools.partial(out_and_grads, on_mesh, frozen="base"))(inputs, sizes, cotangent)

    outs, parts = zip(
        *(twin(inputs.map_rows(lambda x, half=half: x[half]), sizes, cotangent[half]) for half, sizes in halves),
        strict=True,
    )
    assert_near(out, np.concatenate(outs), FP32, "out")
    for path, grad in grads.items():
        pieces = [part[path] for part in parts]
        assert_near(grad, np.concatenate(pieces) if path in ("rows", "weights") else sum(pieces), FP32, path)


# --- the choice of backends ---


@pytest.mark.parametrize("backend", ["block_loop,dense,batched", "slots,ragged,block_loop", "batched,block_loop,slots"])
def test_legs_of_different_backends_fit_together(backend: str):
    inputs, cotangent = arrays(24)
    sizes = jnp.array(GROUPS["rows beyond"], jnp.int32)

    got = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["rows beyond"], cotangent))


def test_each_leg_asks_its_own_backend(monkeypatch: pytest.MonkeyPatch):
    inputs, cotangent = arrays(24)
    asked = spy(monkeypatch, *BACKENDS)
    program = functools.partial(out_and_grads, expert_ffn, backend="slots,dense,batched")

    jax.eval_shape(program, inputs, jnp.array(GROUPS["uneven"], jnp.int32), cotangent)

    assert asked == {"dense": {"rows", "weights"}, "batched": {"gate", "up", "down"}}


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch):
    """As in a process that has chosen nothing yet, without the environment variable."""
    monkeypatch.delenv(operation.VARIABLE, raising=False)
    for remembered in (operation._or_fallback, operation._log_once):
        remembered.cache_clear()
    yield
    for remembered in (operation._or_fallback, operation._log_once):
        remembered.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_the_argument_goes_before_the_environment_and_that_before_the_table(monkeypatch: pytest.MonkeyPatch):
    by_table = choose_legs("cpu", jnp.float32, 24, E)
    monkeypatch.setenv(operation.VARIABLE, "slots,dense,batched")
    by_environment = choose_legs("cpu", jnp.float32, 24, E)
    by_argument = choose_legs("cpu", jnp.float32, 24, E, "ragged")
    monkeypatch.setenv(operation.VARIABLE, "")
    by_table_again = choose_legs("cpu", jnp.float32, 24, E)

    assert by_table == by_table_again == LEGS["cpu", "float32", "many"]
    assert by_environment == Legs("slots", "dense", "batched")
    assert by_argument == Legs("ragged", "ragged", "ragged")


@pytest.mark.usefixtures("fresh_choice")
def test_the_table_is_read_by_device_dtype_and_rows_for_each_expert(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(operation, "LEGS", {key: Legs("batched", "dense", "slots") for key in LEGS} | {
        ("gpu", "bfloat16", "few"): Legs("slots", "slots", "slots"),
    })  # fmt: skip

    assert choose_legs("gpu", jnp.bfloat16, 4, 4) == Legs("slots", "slots", "slots")
    for other in (("gpu", jnp.bfloat16, 5, 4), ("gpu", jnp.float32, 4, 4), ("tpu", jnp.bfloat16, 4, 4)):
        assert choose_legs(*other) == Legs("batched", "dense", "slots")


@pytest.mark.usefixtures("fresh_choice")
def test_what_is_tuned_for_a_card_goes_before_the_table_leg_by_leg(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "kind", lambda: "a card")
    tuned = {("a card", "bfloat16", "many"): {"rows": "ragged"}}
    monkeypatch.setattr(tuning, "legs", lambda *key: tuned.get(key, {}))

    assert choose_legs("gpu", jnp.bfloat16, 24, E) == LEGS["gpu", "bfloat16", "many"]._replace(rows="ragged")
    assert choose_legs("gpu", jnp.bfloat16, 2, E) == LEGS["gpu", "bfloat16", "few"]
    assert choose_legs("cpu", jnp.bfloat16, 24, E) == LEGS["cpu", "bfloat16", "many"]
    assert choose_legs("gpu", jnp.bfloat16, 24, E, "dense") == Legs("dense", "dense", "dense")


def test_the_table_has_a_row_for_every_case_and_names_what_exists():
    assert set(LEGS) == {
        (device, dtype, rows)
        for device in ("cpu", "gpu", "tpu")
        for dtype in ("float32", "bfloat16")
        for rows in ("few", "many")
    }
    assert {name for legs in LEGS.values() for name in legs} <= set(BACKENDS)


@pytest.mark.usefixtures("fresh_choice")
def test_a_choice_is_said_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="dsmoe_jax")

    for _ in range(2):
        choose_legs("cpu", jnp.float32, 24, E, "batched,dense,slots")
        choose_legs("cpu", jnp.float32, 24, E)

    assert [record.getMessage() for record in caplog.records] == [
        "expert_ffn (as asked): forward batched, gradient of rows dense, of weights slots",
        "expert_ffn (cpu, float32, many rows): forward block_loop, gradient of rows block_loop, of weights block_loop",
    ]


@pytest.mark.usefixtures("fresh_choice")
def test_kernels_that_cannot_run_here_give_way_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grouped_matmul, "available", lambda name: f"no luck with {name}")

    with pytest.warns(UserWarning, match="'grouped' cannot run here .*pallas: no luck with pallas.*: batched instead"):
        legs = choose_legs("gpu", jnp.bfloat16, 24, E, "slots,grouped,grouped")

    assert legs == Legs("slots", "batched", "batched")
    assert choose_legs("gpu", jnp.bfloat16, 24, E, "grouped") == Legs("batched", "batched", "batched")  # and warns no more


# --- what is refused ---


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cutlass", "'cutlass' does not exist, only block_loop"),
        ("dense,cutlass,dense", "'cutlass' does not exist, only block_loop"),
        ("dense,batched", "'dense,batched' must be one name, or three: forward,rows,weights"),
        ("dense,dense,dense,dense", "must be one name, or three"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_an_unknown_backend_is_refused_by_name(by: str, backend: str, message: str, monkeypatch: pytest.MonkeyPatch):
    (rows, _, experts), _ = arrays(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)
    monkeypatch.setenv(operation.VARIABLE, backend if by == "environment" else "dense")

    with pytest.raises(ValueError, match=message):
        expert_ffn(rows, *experts, sizes, backend=backend if by == "argument" else None)


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape)


# fmt: off
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many rows":    ({"group_sizes": jnp.array([3, 2, 0, 2])},  r"sum to 7 \(least 0\), there are 6 rows"),
    "a negative size":  ({"group_sizes": jnp.array([3, -2, 0, 2])}, r"sum to 3 \(least -2\), there are 6 rows"),
    "too few sizes":    ({"group_sizes": jnp.array([3, 2, 1])},     r"number of experts: \[3, 4\]"),
    "too many weights": ({"weights": zeros(7)},                     r"weights have shape \(7,\), there are 6 rows"),
    "other experts":    ({"up": zeros(E + 1, F, D)},                r"number of experts: \[4, 5\]"),
    "narrow rows":      ({"rows": zeros(6, D - 1)},                 r"gate .* is \(12, 8\), .*width 7 need \(12, 7\)"),
    "narrow up":        ({"up": zeros(E, F - 2, D)},                r"up .* is \(10, 8\), .*width 8 need \(12, 8\)"),
    "down turned":      ({"down": zeros(E, F, D)},                  r"down .* is \(12, 8\), .*width 8 need \(8, 12\)"),
}
# fmt: on


@pytest.mark.parametrize("wrong", REFUSED)
def test_inputs_that_do_not_fit_are_refused_with_numbers(wrong: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without
    changed, message = REFUSED[wrong]
    (rows, weights, experts), _ = arrays(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)
    right: dict[str, Any] = {"rows": rows, "weights": weights, "group_sizes": sizes, **experts._asdict()}

    with pytest.raises(ValueError, match=message):
        expert_ffn(**right | changed)


@pytest.mark.parametrize("kind", ["int8", "4-bit", "double", "low-rank over dense", "low-rank over double"])
def test_operands_of_any_kind_must_be_as_wide_as_the_rows(kind: str):
    (rows, _, experts), _ = arrays(6, kinds=(kind, kind, kind))
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)

    with pytest.raises(ValueError, match=r"down .* is \(12, 8\), rows of width 8 need \(8, 12\)"):
        expert_ffn(rows, experts.gate, experts.up, experts.gate, sizes)
