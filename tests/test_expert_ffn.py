"""The routed experts on sorted rows: one conformance suite over backends, group sizes and operands.

Start at `test_every_group_size`, then `test_every_kind_of_operand`; outputs and gradients are compared with float64
NumPy, `expected`. Cases and checks are shared with the GPU suite in `tests/helpers/conformance.py`.
"""

import functools
import itertools
import logging
import math
import re
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
from dsmoe_jax.kernels.block_loop import block_rows, ladder
from dsmoe_jax.kernels.expert_ffn import BACKENDS, LEGS, Backend, Legs, choose_legs, expert_ffn
from dsmoe_jax.kernels.operand import Experts, Inputs
from dsmoe_jax.quantize import quantize
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
    check_checkpoint,
    check_groups,
    check_kinds,
    check_legs,
    check_no_rows,
    expected,
    jitted,
    out_and_grads,
)
from tests.helpers.trees import FROZEN, paths

every_backend = pytest.mark.parametrize("backend", BACKENDS)
# The kernels of `grouped` are interpreted here, which is slow; see test_grouped_matmul.py.
every_fast_backend = pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "grouped"])
# These have explicit backward passes; the others are differentiated by JAX and need fewer cases.
LOOPS = ("block_loop", "batched")


# --- group sizes ---


@every_backend
@pytest.mark.parametrize(
    "groups", [pytest.param(one, marks=[pytest.mark.slow] * (one == "largest blocks")) for one in GROUPS]
)
def test_every_group_size(groups: str, backend: str):
    if backend == "grouped" and ROWS[groups] != 24:
        pytest.skip("the suite of the grouped matmul covers other sizes")
    check_groups(groups, backend)


def test_the_groups_cover_every_kind_of_block():
    assert {block_rows(R, E) for R in ROWS.values()} == {1, 8, 128}


def test_blocks_have_the_smallest_size_that_fits():
    assert ladder(3072, 64) == (16, 32, 48, 64, 128)
    assert ladder(6, 64) == (1,)


@every_backend
def test_no_rows_at_all(backend: str):
    check_no_rows(backend)


@every_fast_backend
def test_a_single_expert(backend: str):
    inputs, cotangent = arrays(5, experts=1)

    got = jitted(expert_ffn, backend=backend)(inputs, jnp.array([4], jnp.int32), cotangent)

    check_all(got, expected(inputs, [4], cotangent))


@pytest.mark.parametrize("backend", LOOPS)
def test_one_expert_of_many_takes_all_rows(backend: str):
    inputs, cotangent = arrays(48, experts=16)
    sizes = [0] * 9 + [47] + [0] * 6
    passes = sizes[9] / batched.capacity(48, 16)

    got = jitted(expert_ffn, backend=backend)(inputs, jnp.array(sizes, jnp.int32), cotangent)

    assert passes > 5
    check_all(got, expected(inputs, sizes, cotangent))


@pytest.mark.parametrize("backend", LOOPS)
def test_weights_default_to_one(backend: str):
    (rows, _, experts), _ = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jax.jit(functools.partial(expert_ffn, backend=backend))(rows, *experts, sizes)

    inputs = Inputs(rows, jnp.ones(24), experts)
    assert_near(got, expected(inputs, GROUPS["uneven"], jnp.zeros((24, D)))[0], FP32)


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_every_activation_matches_its_formula(name: str):
    x = np.linspace(-6, 6, 101)

    got = jax.jit(ACTIVATION_FUNCTIONS[name])(jnp.asarray(x, jnp.float32))

    assert_near(got, reference.ACTIVATIONS[name](x), FP32)


@pytest.mark.parametrize(
    ("activation", "backend"),  # silu is the default; the others are aliases
    [("relu", backend) for backend in BACKENDS if backend != "grouped"]
    + [("gelu", "block_loop"), ("gelu_new", "batched")],
)
def test_every_backend_applies_the_activation(activation: str, backend: str):
    inputs, cotangent = arrays(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)

    got = jitted(expert_ffn, backend=backend, activation=activation)(inputs, sizes, cotangent)

    check_all(got, expected(inputs, GROUPS["one row each"], cotangent, activation))


# --- kinds of operands ---


# Of each kind and of each backend one case is not slow.
QUICK = [*zip(KINDS, itertools.cycle(LOOPS), strict=False), ("low-rank", "ragged"), ("quantized", "dense")]
CASES = [(kinds, backend) for kinds in KINDS for backend in LOOPS]
CASES += [(kinds, backend) for kinds in ("quantized", "low-rank", "mixed") for backend in ("ragged", "dense")]
CASES += [("mixed", "grouped")]


@pytest.mark.parametrize(
    ("kinds", "backend"), [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES]
)
def test_every_kind_of_operand(kinds: str, backend: str):
    check_kinds(kinds, backend)


@pytest.mark.parametrize(
    ("kinds", "backend"),
    [(kinds, "block_loop") for kinds in KINDS]
    + [("low-rank", backend) for backend in BACKENDS if backend != "block_loop"],
)
def test_frozen_leaves_get_no_gradient(kinds: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    operands, frozen = KINDS[kinds]
    inputs, cotangent = arrays(24, kinds=operands)
    calls = spy(monkeypatch, backend)

    _, grads = jax.eval_shape(
        functools.partial(out_and_grads, expert_ffn, frozen=frozen, backend=backend),
        inputs, jnp.array(GROUPS["uneven"], jnp.int32), cotangent,
    )  # fmt: skip

    assert calls == {backend: set(grads)}


def spy(monkeypatch: pytest.MonkeyPatch, *backends: str) -> dict[str, set[str]]:
    """Record, while a program is traced, the leaves whose gradients each backend computes."""
    calls: dict[str, set[str]] = {}

    def recorded(backend: str, backward: Any):
        def wrapper(inputs: Inputs, group_sizes: Any, activation: str, grad_out: Any, needs_grad: Any):
            assert backend not in calls, "called twice"
            calls[backend] = set(needs_grad.select(list(paths(inputs))))
            return backward(inputs, group_sizes, activation, grad_out, needs_grad)

        return wrapper

    for backend in backends:
        forward, backward = BACKENDS[backend]
        monkeypatch.setitem(BACKENDS, backend, Backend(forward, recorded(backend, backward)))
    return calls


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
def test_frozen_weight_gradients_are_not_accumulated(kinds: Any, frozen: str, sums: int, backend: str):
    """Loops carry sums over blocks or passes; with 48 rows nothing else has the shape of a weight."""
    inputs, cotangent = arrays(48, kinds=kinds)
    program = functools.partial(out_and_grads, expert_ffn, frozen=frozen, backend=backend)

    traced = jax.make_jaxpr(program)(inputs, jnp.array([48, 0, 0, 0], jnp.int32), cotangent)

    carried = [value for value in carried_by_loops(traced.jaxpr) if value.shape in ((E, F, D), (E, D, F))]
    assert len(carried) == sums


def carried_by_loops(jaxpr: Any) -> Iterator[Any]:
    """The type of every loop result, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield from (value.aval for value in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(parameter, "eqns"):
                yield from carried_by_loops(getattr(parameter, "jaxpr", parameter))


def test_an_unused_output_has_no_backward_pass(monkeypatch: pytest.MonkeyPatch):
    (rows, _, experts), _ = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)
    calls = spy(monkeypatch, "block_loop")

    @jax.grad
    def grad(rows: Any):
        return rows.sum() + jax.lax.stop_gradient(expert_ffn(rows, *experts, sizes, backend="block_loop")).sum()

    assert np.all(grad(rows) == 1)
    assert not calls


# --- bfloat16 ---


@pytest.mark.parametrize("backend", [pytest.param(b, marks=[pytest.mark.slow] * (b == "grouped")) for b in BACKENDS])
def test_bf16_is_near_fp32(backend: str):
    check_bf16(backend)


@pytest.mark.parametrize("backend", [*LOOPS, "ragged"])
def test_fp32_adapters_with_bf16_rows(backend: str):
    check_adapters_over_bf16(backend)


@pytest.mark.parametrize("trained", [False, True], ids="trained={}".format)
def test_the_loop_never_converts_all_experts_to_fp32(trained: bool):
    """XLA would hoist a plain cast out of the loop: an fp32 copy of all experts."""
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


@pytest.mark.parametrize("scheme", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
@pytest.mark.parametrize("backend", ["batched", "ragged"])
def test_no_dequantized_experts_enter_a_loop(backend: str, scheme: str):
    E, D, F, R = 4, 256, 192, 16
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(E, *shape)).astype(np.float32) for shape in [(F, D), (F, D), (D, F)]]
    experts = Experts(*(quantize(weight, scheme) for weight in weights))

    def gradients(experts: Experts, batches: jax.Array) -> jax.Array:
        loss = lambda rows: expert_ffn(rows, *experts, jnp.full(E, R // E), backend=backend).sum()  # noqa: E731
        return jax.lax.map(jax.grad(loss), batches)

    program = str(jax.jit(gradients).lower(experts, jnp.ones((3, R, D))).compile().as_text())

    loops = [line.partition(" while(")[0] for line in program.splitlines() if " while(" in line]
    values = [math.prod(map(int, shape.split(","))) for line in loops for shape in re.findall(r"f32\[([\d,]+)\]", line)]
    assert loops
    assert max(values) < E * D * F / 2


@pytest.mark.parametrize("backend", [*LOOPS, "ragged"])
def test_checkpoint_does_not_change_the_gradients(backend: str):
    check_checkpoint(backend)


def test_checkpoint_keeps_frozen_leaves_free_of_gradients(monkeypatch: pytest.MonkeyPatch):
    inputs, cotangent = arrays(24, kinds=("low-rank over dense",) * 3)
    calls = spy(monkeypatch, "block_loop")
    recomputed = jax.checkpoint(functools.partial(expert_ffn, backend="block_loop"))

    _, grads = jax.eval_shape(
        functools.partial(out_and_grads, recomputed, frozen=FROZEN),
        inputs, jnp.array(GROUPS["uneven"], jnp.int32), cotangent,
    )  # fmt: skip

    assert calls == {"block_loop": set(grads)}


# The Pallas interpreter does not track varying axes, so `grouped` runs without check_vma:
ON_A_MESH = [("dense", True, backend) for backend in BACKENDS if backend != "grouped"]
ON_A_MESH += [("dense", False, backend) for backend in LOOPS]
ON_A_MESH += [pytest.param("dense", False, "grouped", marks=pytest.mark.slow)]
ON_A_MESH += [("low-rank over dense", True, backend) for backend in LOOPS]


@pytest.mark.parametrize(("kind", "check_vma", "backend"), ON_A_MESH)
def test_a_shard_map_over_rows(kind: str, check_vma: bool, backend: str):
    """Rows are sharded, weights replicated: their gradients are summed over devices."""
    inputs, cotangent = arrays(48, kinds=(kind, kind, kind))
    halves = ((slice(0, 24), GROUPS["uneven"]), (slice(24, 48), GROUPS["rows beyond"]))
    sizes = jnp.array([size for _, sizes in halves for size in sizes], jnp.int32)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    sharded, replicated = PartitionSpec("x"), PartitionSpec()

    def per_device(rows: Any, experts: Experts, sizes: Any, weights: Any):
        return expert_ffn(rows, *experts, sizes, weights=weights, backend=backend)

    def on_mesh(rows: Any, gate: Any, up: Any, down: Any, sizes: Any, weights: Any):
        return jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(sharded, replicated, sharded, sharded),
            out_specs=sharded,
            check_vma=check_vma,
        )(rows, Experts(gate, up, down), sizes, weights)

    out, grads = jax.jit(functools.partial(out_and_grads, on_mesh, frozen="base"))(inputs, sizes, cotangent)

    outs, parts = zip(
        *(expected(inputs.map_rows(lambda x, half=half: x[half]), sizes, cotangent[half]) for half, sizes in halves),
        strict=True,
    )
    assert_near(out, np.concatenate(outs), FP32, "out")
    for path, grad in grads.items():
        pieces = [part[path] for part in parts]
        assert_near(grad, np.concatenate(pieces) if path in ("rows", "weights") else sum(pieces), FP32, path)


# --- the choice of backends ---


@pytest.mark.parametrize("backend", ["block_loop,dense,batched", "ragged,batched,block_loop"])
def test_legs_of_different_backends_combine(backend: str):
    check_legs(backend)


def test_each_leg_runs_its_own_backend(monkeypatch: pytest.MonkeyPatch):
    inputs, cotangent = arrays(24)
    calls = spy(monkeypatch, *BACKENDS)
    program = functools.partial(out_and_grads, expert_ffn, backend="ragged,dense,batched")

    jax.eval_shape(program, inputs, jnp.array(GROUPS["uneven"], jnp.int32), cotangent)

    assert calls == {"dense": {"rows", "weights"}, "batched": {"gate", "up", "down"}}


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch):
    """Clear cached choices and the environment variable."""
    monkeypatch.delenv(operation.VARIABLE, raising=False)
    for cached in (operation._or_fallback, operation._log_once):
        cached.cache_clear()
    yield
    for cached in (operation._or_fallback, operation._log_once):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_precedence_is_argument_environment_table(monkeypatch: pytest.MonkeyPatch):
    by_table = choose_legs("cpu", jnp.float32, 24, E)
    monkeypatch.setenv(operation.VARIABLE, "ragged,dense,batched")
    by_environment = choose_legs("cpu", jnp.float32, 24, E)
    by_argument = choose_legs("cpu", jnp.float32, 24, E, "ragged")
    monkeypatch.setenv(operation.VARIABLE, "")
    by_table_again = choose_legs("cpu", jnp.float32, 24, E)

    assert by_table == by_table_again == LEGS["cpu", "float32"]
    assert by_environment == Legs("ragged", "dense", "batched")
    assert by_argument == Legs("ragged", "ragged", "ragged")


@pytest.mark.usefixtures("fresh_choice")
def test_tuned_legs_override_the_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "kind", lambda: "a card")
    tuned = {("a card", "bfloat16", "many"): {"dgrad": "ragged"}}
    monkeypatch.setattr(tuning, "legs", lambda *key: tuned.get(key, {}))

    assert choose_legs("gpu", jnp.bfloat16, 24, E) == LEGS["gpu", "bfloat16"]._replace(dgrad="ragged")
    assert choose_legs("gpu", jnp.bfloat16, 2, E) == LEGS["gpu", "bfloat16"]
    assert choose_legs("cpu", jnp.bfloat16, 24, E) == LEGS["cpu", "bfloat16"]
    assert choose_legs("gpu", jnp.bfloat16, 24, E, "dense") == Legs("dense", "dense", "dense")


def test_the_table_covers_every_platform_and_dtype():
    assert set(LEGS) == set(itertools.product(("cpu", "gpu", "tpu"), ("float32", "bfloat16")))
    assert {name for legs in LEGS.values() for name in legs} <= set(BACKENDS)


@pytest.mark.usefixtures("fresh_choice")
def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="dsmoe_jax")

    for _ in range(2):
        choose_legs("cpu", jnp.float32, 24, E, "batched,dense,ragged")
        choose_legs("cpu", jnp.float32, 24, E)

    assert [record.getMessage() for record in caplog.records] == [
        "expert_ffn backend (as requested): fwd batched, dgrad dense, wgrad ragged",
        "expert_ffn backend (cpu, float32): fwd block_loop, dgrad block_loop, wgrad block_loop",
    ]


@pytest.mark.usefixtures("fresh_choice")
def test_an_unavailable_kernel_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grouped_matmul, "available", lambda name: f"no {name} here")

    with pytest.warns(UserWarning, match="'grouped' cannot run here .*pallas: no pallas here.*: using batched"):
        legs = choose_legs("gpu", jnp.bfloat16, 24, E, "dense,grouped,grouped")

    assert legs == Legs("dense", "batched", "batched")
    assert choose_legs("gpu", jnp.bfloat16, 24, E, "grouped") == Legs(
        "batched", "batched", "batched"
    )  # no second warning


# --- errors ---


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cutlass", "must be one of block_loop, .*got 'cutlass'"),
        ("dense,cutlass,dense", "must be one of block_loop, .*got 'cutlass'"),
        ("dense,batched", "must be one name or fwd,dgrad,wgrad, got 'dense,batched'"),
        ("dense,dense,dense,dense", "must be one name or fwd,dgrad,wgrad"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_an_unknown_backend_is_rejected(by: str, backend: str, message: str, monkeypatch: pytest.MonkeyPatch):
    (rows, _, experts), _ = arrays(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)
    monkeypatch.setenv(operation.VARIABLE, backend if by == "environment" else "dense")

    with pytest.raises(ValueError, match=message):
        expert_ffn(rows, *experts, sizes, backend=backend if by == "argument" else None)


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape)


# fmt: off
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "too many rows":    ({"group_sizes": jnp.array([3, 2, 0, 2])},  "at most 6 rows, got 7, min 0"),
    "a negative size":  ({"group_sizes": jnp.array([3, -2, 0, 2])}, "at most 6 rows, got 3, min -2"),
    "too few sizes":    ({"group_sizes": jnp.array([3, 2, 1])},     r"numbers of experts: \[3, 4\]"),
    "too many weights": ({"weights": zeros(7)},                     r"weights must have shape \(6,\), got \(7,\)"),
    "other experts":    ({"up": zeros(E + 1, F, D)},                r"numbers of experts: \[4, 5\]"),
    "narrow rows":      ({"rows": zeros(6, D - 1)},                 r"gate .* \(12, 7\) .*width 7, got \(12, 8\)"),
    "narrow up":        ({"up": zeros(E, F - 2, D)},                r"up .* \(12, 8\) .*width 8, got \(10, 8\)"),
    "transposed down":  ({"down": zeros(E, F, D)},                  r"down .* \(8, 12\) .*width 8, got \(12, 8\)"),
}
# fmt: on


@pytest.mark.parametrize("wrong", INVALID)
def test_mismatched_shapes_are_rejected(wrong: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    changed, message = INVALID[wrong]
    (rows, weights, experts), _ = arrays(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)
    right: dict[str, Any] = {"rows": rows, "weights": weights, "group_sizes": sizes, **experts._asdict()}

    with pytest.raises(ValueError, match=message):
        expert_ffn(**right | changed)


@pytest.mark.parametrize("kind", ["int8", "4-bit", "double", "low-rank over dense", "low-rank over double"])
def test_mismatched_widths_of_any_operand_are_rejected(kind: str):
    (rows, _, experts), _ = arrays(6, kinds=(kind, kind, kind))
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)

    with pytest.raises(ValueError, match=r"down .* must be \(8, 12\) .*width 8, got \(12, 8\)"):
        expert_ffn(rows, experts.gate, experts.up, experts.gate, sizes)
