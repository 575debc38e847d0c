"""The grouped matmul: one suite over its three legs, every implementation and group sizes.

Start at `test_every_group_size`; results are compared with float64 NumPy, `REFERENCES`. Rows beyond the groups are NaN
throughout. The Pallas kernels are interpreted on CPU; `test_the_kernels_lower_for_cuda` lowers them.
"""

import functools
import sys
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir
from jax.sharding import AxisType, PartitionSpec

from dsmoe_jax.kernels import grouped_matmul
from dsmoe_jax.kernels.grouped_matmul import IMPLEMENTATIONS, available, gmm, gmm_transposed, tgmm
from tests.helpers.conformance import assert_near

E, N, K = 4, 136, 72  # no tile divides them

FP32 = 1e-5  # of the largest value: sums of a hundred products, in another order
BF16 = 5e-3  # of the largest value: one rounding of the result, half an eps of 0.0078
TOLERANCE = {"float32": FP32, "bfloat16": BF16}

# fmt: off
GROUPS = {
    # with 40 rows, blocks of 16:
    "uneven":                [5, 19, 2, 14],
    "whole blocks":          [16, 16, 8, 0],
    "one row more or less":  [15, 17, 1, 7],
    "empty in the middle":   [21, 0, 0, 19],
    "empty at the start":    [0, 0, 22, 18],
    "empty at the end":      [33, 7, 0, 0],
    "all on one":            [0, 40, 0, 0],
    "rows beyond":           [3, 17, 0, 9],
    "rows beyond, full block": [0, 16, 0, 0],
    "no expert hit":         [0, 0, 0, 0],
    # with 5 rows, fewer than a block:
    "few rows":              [1, 0, 3, 0],
    # with 300 rows, blocks of 64; with 1100, of 128:
    "middle blocks":         [100, 0, 127, 60],
    "largest blocks":        [129, 700, 0, 256],
}
ROWS = {name: 40 for name in GROUPS} | {"few rows": 5, "middle blocks": 300, "largest blocks": 1100}
# fmt: on
# Each number of rows compiles a program: the larger ones only in bf16.
CASES = [
    pytest.param(groups, dtype, marks=[pytest.mark.slow] * (groups == "middle blocks"))
    for groups in GROUPS
    for dtype in TOLERANCE
    if ROWS[groups] == 40 or dtype == "bfloat16"
]


# Unavailable ones skip with the reason.
IMPLEMENTATION = {
    name: pytest.param(name, marks=pytest.mark.skipif(bool(reason := available(name)), reason=f"{name}: {reason}"))
    for name in IMPLEMENTATIONS
}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATION.values())


def _experts(sizes: list[int]):
    """(expert, its rows) of each group."""
    ends = np.cumsum(sizes)
    return [(e, slice(end - size, end)) for e, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def gmm_reference(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    out = np.zeros((len(rows), weights.shape[1]))
    for e, rows_of_e in _experts(sizes):
        out[rows_of_e] = rows[rows_of_e] @ weights[e].T
    return out


def gmm_transposed_reference(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    return gmm_reference(rows, weights.swapaxes(1, 2), sizes)


def tgmm_reference(a: np.ndarray, b: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.stack([a[used].T @ b[used] for _, used in _experts(sizes)])


REFERENCES = {gmm: gmm_reference, gmm_transposed: gmm_transposed_reference, tgmm: tgmm_reference}
every_leg = pytest.mark.parametrize("leg", REFERENCES, ids=lambda leg: leg.__name__)


@functools.cache
def operands(leg: Any, R: int, dtype: str, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng([R, seed])
    ins, outs, weights = ((R, K), (R, N), (E, N, K))
    shapes = {gmm: (ins, weights), gmm_transposed: (outs, weights), tgmm: (outs, ins)}[leg]
    first, second = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return first, second


def with_nan_beyond(leg: Any, first: jax.Array, second: jax.Array, sizes: list[int]):
    """The operands with NaN in every row beyond the groups."""
    unused = (jnp.arange(len(first)) >= sum(sizes))[:, None]
    first = jnp.where(unused, jnp.nan, first)
    return first, jnp.where(unused, jnp.nan, second) if leg is tgmm else second


@functools.cache
def jitted(leg: Any, **options: Any):
    """Compiled once per shape: group sizes are data."""
    return jax.jit(lambda first, second, sizes: leg(first, second, sizes, **options))


def expected(leg: Any, first: Any, second: Any, sizes: list[int]) -> np.ndarray:
    return REFERENCES[leg](np.asarray(first, np.float64), np.asarray(second, np.float64), sizes)


@every_implementation
@every_leg
@pytest.mark.parametrize(("groups", "dtype"), CASES)
def test_every_group_size(groups: str, dtype: str, leg: Any, implementation: str):
    sizes = GROUPS[groups]
    first, second = with_nan_beyond(leg, *operands(leg, ROWS[groups], dtype), sizes)

    got = jitted(leg, implementation=implementation)(first, second, jnp.array(sizes, jnp.int32))

    assert got.dtype == ("float32" if leg is tgmm else dtype)
    assert_near(got, expected(leg, first, second, sizes), FP32 if leg is tgmm else TOLERANCE[dtype])
    if leg is tgmm:
        assert [bool(np.any(weight)) for weight in got] == [size > 0 for size in sizes]
    else:
        assert not np.any(got[sum(sizes) :])


def test_the_groups_cover_every_tile():
    pallas_matmul = pytest.importorskip("dsmoe_jax.kernels.pallas_matmul", exc_type=ImportError)

    used = {pallas_matmul.tile_for(R, E) for R in ROWS.values()}

    assert used == {tile for _, tile in pallas_matmul._TILES}


@every_implementation
@every_leg
def test_no_rows_at_all(leg: Any, implementation: str):
    first, second = operands(leg, 0, "float32")

    got = jitted(leg, implementation=implementation)(first, second, jnp.zeros(E, jnp.int32))

    assert got.shape == expected(leg, first, second, [0] * E).shape
    assert not np.any(got)


@every_implementation
@pytest.mark.parametrize("leg", [gmm, gmm_transposed], ids=lambda leg: leg.__name__)
def test_results_in_fp32(leg: Any, implementation: str):
    sizes = GROUPS["uneven"]
    first, second = operands(leg, 40, "bfloat16")

    got = jitted(leg, implementation=implementation, out_dtype=jnp.float32)(first, second, jnp.array(sizes, jnp.int32))

    assert got.dtype == jnp.float32
    assert_near(got, expected(leg, first, second, sizes), FP32)


@every_implementation
@every_leg
@pytest.mark.parametrize("check_vma", [True, False], ids="check_vma={}".format)
def test_a_shard_map_over_rows(check_vma: bool, leg: Any, implementation: str, request: pytest.FixtureRequest):
    """Rows, group sizes and weight gradients are sharded; weights are replicated."""
    if implementation == "pallas" and check_vma:
        # Only when interpreted; on a GPU the kernel is opaque and lowers (see below).
        reason = "jax's Pallas interpreter slices varying operands at indices that do not vary (0.10.1, 0.12.0)"
        request.applymarker(pytest.mark.xfail(raises=ValueError, strict=True, reason=reason))
    halves = [GROUPS["uneven"], GROUPS["rows beyond"]]
    parts = [with_nan_beyond(leg, *operands(leg, 40, "float32", i), sizes) for i, sizes in enumerate(halves)]
    if leg is not tgmm:
        parts = [(first, parts[0][1]) for first, _ in parts]
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    sharded, replicated = PartitionSpec("x"), PartitionSpec()
    on_mesh = jax.shard_map(
        functools.partial(leg, implementation=implementation),
        mesh=mesh,
        in_specs=(sharded, sharded if leg is tgmm else replicated, sharded),
        out_specs=sharded,
        check_vma=check_vma,
    )
    first = jnp.concatenate([first for first, _ in parts])
    second = jnp.concatenate([second for _, second in parts]) if leg is tgmm else parts[0][1]

    got = jax.jit(on_mesh)(first, second, jnp.array([*halves[0], *halves[1]], jnp.int32))

    wants = [expected(leg, *part, sizes) for part, sizes in zip(parts, halves, strict=True)]
    assert_near(got, np.concatenate(wants), FP32)


def lowered_for_cuda(leg: Any, dtype: str, R: int, axes: tuple[str, ...] = ()) -> Any:
    """The kernel at the sizes of DeepSeekMoE-16B, for one abstract GPU, or two along each of `axes`."""
    pallas_matmul = pytest.importorskip("dsmoe_jax.kernels.pallas_matmul", exc_type=ImportError)
    ins, outs, weights, sizes = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((R, 2048), dtype),
            ((R, 1408), dtype),
            ((64, 1408, 2048), dtype),
            ((64 * 2 ** len(axes),), "int32"),
        )
    )
    options = {"out_dtype": jnp.float32 if leg is tgmm else dtype, "interpret": False}
    if leg is tgmm:
        kernel, arguments = functools.partial(pallas_matmul.tgmm, **options), (outs, ins, sizes)
    else:
        kernel = functools.partial(pallas_matmul.gmm, transposed=leg is gmm_transposed, **options)
        arguments = (outs if leg is gmm_transposed else ins, weights, sizes)
    target = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    auto = (AxisType.Auto,) * len(axes)
    mesh = jax.sharding.AbstractMesh((2,) * len(axes), axes, axis_types=auto, abstract_device=target)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        if axes:
            split = PartitionSpec(axes)
            in_specs = (split, split if leg is tgmm else PartitionSpec(), split)
            kernel = jax.shard_map(kernel, in_specs=in_specs, out_specs=split)
        return jax.jit(kernel).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")


@pytest.mark.parametrize("R", [24576, 4096, 48], ids="R={}".format)
@pytest.mark.parametrize("dtype", TOLERANCE)
@every_leg
def test_the_kernels_lower_for_cuda(leg: Any, dtype: str, R: int):
    dialect = pytest.importorskip("jaxlib.triton.dialect", exc_type=ImportError)

    lowered = lowered_for_cuda(leg, dtype, R)

    (program,) = triton_programs(lowered)
    with ir.Context() as context:
        dialect.register_dialect(context)
        assert ir.Module.parse(program).operation.verify()


@every_leg
def test_the_kernels_lower_for_cuda_on_a_mesh(leg: Any):
    assert len(triton_programs(lowered_for_cuda(leg, "bfloat16", 4096, axes=("x",)))) == 1


def triton_programs(module: Any) -> list[bytes]:
    """The Triton programs of a lowered computation."""
    found = []

    def visit(operation: Any):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            found.append(operation.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def test_an_unknown_implementation_is_rejected():
    first, second = operands(gmm, 5, "float32")

    with pytest.raises(ValueError, match="must be one of pallas, tokamax, ragged, got 'cutlass'"):
        gmm(first, second, jnp.zeros(E, jnp.int32), implementation="cutlass")


def test_operands_of_two_dtypes_are_rejected():
    first, second = operands(gmm, 5, "float32")

    with pytest.raises(ValueError, match="one dtype, got bfloat16 and float32"):
        gmm(first.astype(jnp.bfloat16), second, jnp.zeros(E, jnp.int32), implementation="ragged")


def test_a_missing_tokamax_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    first, second = operands(gmm, 5, "float32")

    with pytest.raises(ValueError, match=r"'tokamax' cannot run here: .*dsmoe_jax\[tokamax\]"):
        gmm(first, second, jnp.zeros(E, jnp.int32), implementation="tokamax")


@pytest.mark.parametrize(
    ("platform", "capability", "reason"),
    [
        ("gpu", "9.0", None),
        ("gpu", "7.5", "it needs an NVIDIA GPU of compute capability 8 (Ampere) or newer, this one has 7.5"),
        ("tpu", "", "it has no kernel for 'tpu', only for cpu and gpu"),
    ],
)
def test_availability_depends_on_the_device(
    platform: str, capability: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grouped_matmul.jax, "default_backend", lambda: platform)
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(grouped_matmul.jax, "local_devices", lambda: [device])

    assert available("pallas") == reason
    assert available("ragged") is None
