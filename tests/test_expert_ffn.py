"""The routed experts on sorted rows: one suite over every backend, whatever the group sizes.

Start at `test_every_row_goes_through_its_own_expert`; outputs and gradients are compared with float64 NumPy, `twin`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS
from dsmoe_jax.kernels.block_loop import block_rows
from dsmoe_jax.kernels.expert_ffn import BACKENDS, expert_ffn
from tests.helpers import reference

E, D, F = 4, 8, 12
NAMES = ("rows", "gate", "up", "down")

FP32 = 1e-5  # of the largest value: sums of some ten products, in another order
BF16 = 2e-2  # of the largest value: eps is 0.0078, and hidden rows and results are rounded, weight gradients too

# fmt: off
GROUPS = {
    # with 24 rows, blocks of 8:
    "uneven":              [5, 11, 2, 6],
    "whole blocks":        [8, 8, 8, 0],
    "empty in the middle": [9, 0, 0, 15],
    "empty at the start":  [0, 0, 10, 14],
    "empty at the end":    [13, 11, 0, 0],
    "all on one":          [0, 24, 0, 0],
    "rows beyond":         [3, 9, 0, 1],
    "no expert hit":       [0, 0, 0, 0],
    # with 6 rows, one at a time:
    "one row each":        [2, 1, 0, 3],
    "one row, rows beyond": [0, 1, 0, 0],
    # with 540 rows, the largest blocks, of 128:
    "largest blocks":      [260, 0, 129, 140],
}
ROWS = {name: 24 for name in GROUPS} | {
    "one row each": 6, "one row, rows beyond": 6, "largest blocks": 540,
}
# fmt: on

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@functools.cache
def jitted(function: Any, **options: Any):
    """Output and all gradients; group sizes are data, so one program serves all of one shape."""

    @jax.jit
    def run(arrays, group_sizes, cotangent):
        out, pull = jax.vjp(lambda *arrays: function(*arrays, group_sizes, **options), *arrays)
        return out, pull(cotangent)

    return run


@functools.cache
def inputs(R: int, dtype: Any = jnp.float32):
    """Rows, the three weights and an output gradient, of the size that keeps results near 1."""
    rng = np.random.default_rng(R)
    shapes = {"rows": (R, D), "gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
    arrays = tuple(
        jnp.asarray(rng.normal(size=shape) / (1 if name == "rows" else shape[-1] ** 0.5), dtype)
        for name, shape in shapes.items()
    )
    return arrays, jnp.asarray(rng.normal(size=(R, D)), dtype)


def assert_near(got: Any, want: Any, relative: float, name: str = ""):
    want = np.asarray(want, np.float64)
    scale = np.abs(want).max(initial=0)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=relative * scale, err_msg=name)


def check_all(got: Any, want: Any, tolerance: float = FP32):
    """Output and gradients against the twin's."""
    for name, ours, theirs in zip(("out", *NAMES), (got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert_near(ours, theirs, tolerance, name)


def twin(arrays: Any, sizes: list[int], cotangent: Any, activation: str = "silu"):
    """Output and all gradients in float64 NumPy."""
    arrays = [np.asarray(array, np.float64) for array in arrays]
    options = {"group_sizes": sizes, "activation": activation}
    grads = reference.expert_ffn_grads(*arrays, **options, grad_out=np.asarray(cotangent, np.float64))
    return reference.expert_ffn(*arrays, **options), grads


@every_backend
@pytest.mark.parametrize("groups", GROUPS)
def test_every_row_goes_through_its_own_expert(groups: str, backend: str):
    arrays, cotangent = inputs(ROWS[groups])
    sizes = jnp.array(GROUPS[groups], jnp.int32)

    got = jitted(expert_ffn, backend=backend)(arrays, sizes, cotangent)

    check_all(got, twin(arrays, GROUPS[groups], cotangent))


def test_the_groups_cover_every_kind_of_block():
    assert {block_rows(R, E) for R in ROWS.values()} == {1, 8, 128}


@every_backend
@pytest.mark.parametrize("groups", ["rows beyond", "no expert hit", "one row, rows beyond", "largest blocks"])
def test_rows_beyond_the_groups_give_zeros_and_get_zero_gradients(groups: str, backend: str):
    arrays, cotangent = inputs(ROWS[groups])
    sizes = jnp.array(GROUPS[groups], jnp.int32)
    used = sum(GROUPS[groups])

    out, grads = jitted(expert_ffn, backend=backend)(arrays, sizes, cotangent)

    assert not np.any(out[used:])
    assert not np.any(grads[0][used:])
    for e, size in enumerate(GROUPS[groups]):
        for name, grad in zip(NAMES[1:], grads[1:], strict=True):
            assert bool(np.any(grad[e])) == (size > 0), f"{name} of expert {e}"


@every_backend
def test_bf16_stays_near_fp32(backend: str):
    arrays, cotangent = inputs(24, jnp.bfloat16)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    out, grads = jitted(expert_ffn, backend=backend)(arrays, sizes, cotangent)

    assert {array.dtype for array in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    check_all((out, grads), twin(arrays, GROUPS["uneven"], cotangent), BF16)


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_every_activation_of_the_table_is_its_formula(name: str):
    x = np.linspace(-6, 6, 101)

    got = jax.jit(ACTIVATION_FUNCTIONS[name])(jnp.asarray(x, jnp.float32))

    assert_near(got, reference.ACTIVATIONS[name](x), FP32)


@every_backend
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new"])  # silu is the default; the others are aliases
def test_other_activations_than_the_default_one(activation: str, backend: str):
    arrays, cotangent = inputs(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)

    got = jitted(expert_ffn, backend=backend, activation=activation)(arrays, sizes, cotangent)

    check_all(got, twin(arrays, GROUPS["one row each"], cotangent, activation))


@every_backend
def test_recomputing_in_the_backward_pass_changes_nothing(backend: str):
    arrays, cotangent = inputs(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(jax.checkpoint(functools.partial(expert_ffn, backend=backend)))(arrays, sizes, cotangent)

    check_all(got, twin(arrays, GROUPS["uneven"], cotangent))


@every_backend
@pytest.mark.parametrize("check_vma", [True, False], ids="check_vma={}".format)
def test_each_device_of_a_mesh_serves_its_own_rows(check_vma: bool, backend: str):
    """Rows are split, weights are not: their gradients are sums over the devices."""
    if check_vma and backend == "grouped":
        pytest.skip("jax's interpreter of Pallas kernels does not track what varies over a mesh")
    arrays, cotangent = inputs(48)
    halves = [GROUPS["uneven"], GROUPS["rows beyond"]]
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("x"), PartitionSpec()
    on_mesh = jax.shard_map(
        functools.partial(expert_ffn, backend=backend),
        mesh=mesh,
        in_specs=(split, whole, whole, whole, split),
        out_specs=split,
        check_vma=check_vma,
    )

    out, grads = jitted(on_mesh)(arrays, jnp.array([*halves[0], *halves[1]], jnp.int32), cotangent)

    wants = [
        twin((arrays[0][i : i + 24], *arrays[1:]), sizes, cotangent[i : i + 24])
        for i, sizes in zip((0, 24), halves, strict=True)
    ]
    assert_near(out, np.concatenate([out for out, _ in wants]), FP32, "out")
    assert_near(grads[0], np.concatenate([grads[0] for _, grads in wants]), FP32, "rows")
    for i in (1, 2, 3):
        assert_near(grads[i], sum(grads[i] for _, grads in wants), FP32, NAMES[i])


def test_an_unknown_backend_is_refused_by_name():
    (rows, gate, up, down), _ = inputs(6)
    sizes = jnp.array(GROUPS["one row each"], jnp.int32)

    with pytest.raises(ValueError, match="'cutlass' does not exist, only block_loop"):
        expert_ffn(rows, gate, up, down, sizes, backend="cutlass")
