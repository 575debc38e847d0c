"""The grouped matmul: one suite over its three legs and every implementation, whatever the group sizes.

Start at `test_every_row_meets_its_own_expert`; results are compared with float64 NumPy, `TWINS`. Rows beyond the groups
hold NaN throughout. The kernels for NVIDIA are interpreted on CPU; `test_the_kernels_lower_for_cuda` translates them.
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
# Each number of rows is a program of its own to compile: the odd ones only in the dtype that users compute in.
CASES = [(groups, dtype) for groups in GROUPS for dtype in TOLERANCE if ROWS[groups] == 40 or dtype == "bfloat16"]


# One that cannot run here skips with its reason.
IMPLEMENTATION = {
    name: pytest.param(name, marks=pytest.mark.skipif(bool(reason := available(name)), reason=f"{name}: {reason}"))
    for name in IMPLEMENTATIONS
}
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATION.values())


def _experts(sizes: list[int]):
    """(expert, its rows) of each group."""
    ends = np.cumsum(sizes)
    return [(e, slice(end - size, end)) for e, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def gmm_twin(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    out = np.zeros((len(rows), weights.shape[1]))
    for e, mine in _experts(sizes):
        out[mine] = rows[mine] @ weights[e].T
    return out


def gmm_transposed_twin(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    return gmm_twin(rows, weights.swapaxes(1, 2), sizes)


def tgmm_twin(a: np.ndarray, b: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.stack([a[mine].T @ b[mine] for _, mine in _experts(sizes)])


TWINS = {gmm: gmm_twin, gmm_transposed: gmm_transposed_twin, tgmm: tgmm_twin}
every_leg = pytest.mark.parametrize("leg", TWINS, ids=lambda leg: leg.__name__)


@functools.cache
def operands(leg: Any, R: int, dtype: str, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng([R, seed])
    ins, outs, weights = ((R, K), (R, N), (E, N, K))
    shapes = {gmm: (ins, weights), gmm_transposed: (outs, weights), tgmm: (outs, ins)}[leg]
    first, second = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return first, second


def strays_are_nan(leg: Any, first: jax.Array, second: jax.Array, sizes: list[int]):
    """The operands with NaN in every row beyond the groups."""
    stray = (jnp.arange(len(first)) >= sum(sizes))[:, None]
    first = jnp.where(stray, jnp.nan, first)
    return first, jnp.where(stray, jnp.nan, second) if leg is tgmm else second


@functools.cache
def jitted(leg: Any, **options: Any):
    """Group sizes are data, so one program serves all patterns of one shape."""
    return jax.jit(lambda first, second, sizes: leg(first, second, sizes, **options))


def assert_near(got: Any, want: np.ndarray, relative: float):
    scale = np.abs(want).max(initial=0)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=relative * scale)


def twin_of(leg: Any, first: Any, second: Any, sizes: list[int]) -> np.ndarray:
    return TWINS[leg](np.asarray(first, np.float64), np.asarray(second, np.float64), sizes)


@every_implementation
@every_leg
@pytest.mark.parametrize(("groups", "dtype"), CASES)
def test_every_row_meets_its_own_expert(groups: str, dtype: str, leg: Any, implementation: str):
    sizes = GROUPS[groups]
    first, second = strays_are_nan(leg, *operands(leg, ROWS[groups], dtype), sizes)

    got = jitted(leg, implementation=implementation)(first, second, jnp.array(sizes, jnp.int32))

    assert got.dtype == ("float32" if leg is tgmm else dtype)
    assert_near(got, twin_of(leg, first, second, sizes), FP32 if leg is tgmm else TOLERANCE[dtype])
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

    assert got.shape == twin_of(leg, first, second, [0] * E).shape
    assert not np.any(got)


@every_implementation
@pytest.mark.parametrize("leg", [gmm, gmm_transposed], ids=lambda leg: leg.__name__)
def test_results_may_stay_in_fp32(leg: Any, implementation: str):
    sizes = GROUPS["uneven"]
    first, second = operands(leg, 40, "bfloat16")

    got = jitted(leg, implementation=implementation, out_dtype=jnp.float32)(first, second, jnp.array(sizes, jnp.int32))

    assert got.dtype == jnp.float32
    assert_near(got, twin_of(leg, first, second, sizes), FP32)


@every_implementation
@every_leg
@pytest.mark.parametrize("check_vma", [True, False], ids="check_vma={}".format)
def test_each_device_of_a_mesh_serves_its_own_rows(
    check_vma: bool, leg: Any, implementation: str, request: pytest.FixtureRequest
):
    """Rows and group sizes are split, and so are the weight gradients; weights are shared."""
    if implementation == "pallas" and check_vma:
        # Only interpreted; on a GPU the kernel is opaque, and it lowers (the test for CUDA below).
        reason = "jax's Pallas interpreter slices varying operands at indices that do not vary (0.10.1, 0.12.0)"
        request.applymarker(pytest.mark.xfail(raises=ValueError, strict=True, reason=reason))
    halves = [GROUPS["uneven"], GROUPS["rows beyond"]]
    parts = [strays_are_nan(leg, *operands(leg, 40, "float32", i), sizes) for i, sizes in enumerate(halves)]
    if leg is not tgmm:
        parts = [(first, parts[0][1]) for first, _ in parts]
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("x"), PartitionSpec()
    on_mesh = jax.shard_map(
        functools.partial(leg, implementation=implementation),
        mesh=mesh,
        in_specs=(split, split if leg is tgmm else whole, split),
        out_specs=split,
        check_vma=check_vma,
    )
    first = jnp.concatenate([first for first, _ in parts])
    second = jnp.concatenate([second for _, second in parts]) if leg is tgmm else parts[0][1]

    got = jax.jit(on_mesh)(first, second, jnp.array([*halves[0], *halves[1]], jnp.int32))

    wants = [twin_of(leg, *part, sizes) for part, sizes in zip(parts, halves, strict=True)]
    assert_near(got, np.concatenate(wants), FP32)


def lowered_for_cuda(leg: Any, dtype: str, R: int, axes: tuple[str, ...] = ()) -> Any:
    """The kernel at the sizes of DeepSeekMoE-16B, for GPUs that are not here: one, or two along each of `axes`."""
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
    """That the result runs, and fast, only a GPU can tell."""
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
    """The Triton programs that a lowered computation carries."""
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


def test_without_tokamax_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch):
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
def test_the_device_decides_what_can_run(
    platform: str, capability: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grouped_matmul.jax, "default_backend", lambda: platform)
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(grouped_matmul.jax, "local_devices", lambda: [device])

    assert available("pallas") == reason
    assert available("ragged") is None
