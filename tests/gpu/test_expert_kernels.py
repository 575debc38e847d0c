"""The routed experts: the conformance suite of `tests/helpers/conformance.py` over every backend and every leg.

Start at `test_every_group_size`. The tests of the grouped matmul's kernels are collected here a second time.
"""

import jax
import jax.numpy as jnp
import pytest

from dsmoe_jax.kernels.expert_ffn import LEGS, choose_legs, expert_ffn
from tests.gpu.backends import EVERY, GROUPED, SERVING, skip_without
from tests.helpers.conformance import (
    BF16,
    FP32,
    GROUPS,
    KINDS,
    ROWS,
    E,
    arrays,
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
)
from tests.test_grouped_matmul import (
    test_every_group_size as test_grouped_matmul_every_row,  # noqa: F401
)
from tests.test_grouped_matmul import (
    test_results_in_fp32 as test_grouped_matmul_fp32_results,  # noqa: F401
)

INTERPRETED = "on CPU the kernel is interpreted: minutes"

every_backend = pytest.mark.parametrize("backend", EVERY)


@every_backend
@pytest.mark.parametrize("groups", GROUPS)
def test_every_group_size(groups: str, backend: str):
    skip_without(backend)
    if backend in GROUPED and ROWS[groups] > 24 and jax.default_backend() == "cpu":
        pytest.skip(INTERPRETED)
    check_groups(groups, backend)


@every_backend
def test_no_rows_at_all(backend: str):
    skip_without(backend)
    check_no_rows(backend)


CASES = [(kinds, "batched") for kinds in KINDS]
CASES += [(kinds, backend) for kinds in ("quantized", "low-rank", "mixed") for backend in GROUPED]


@pytest.mark.parametrize(("kinds", "backend"), CASES)
def test_every_kind_of_operand(kinds: str, backend: str):
    skip_without(backend)
    check_kinds(kinds, backend)


@every_backend
def test_bf16_is_near_fp32(backend: str):
    skip_without(backend)
    check_bf16(backend)


@pytest.mark.parametrize("backend", SERVING)
def test_fp32_adapters_with_bf16_rows(backend: str):
    skip_without(backend)
    check_adapters_over_bf16(backend)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FP32), ("bfloat16", BF16)])
@pytest.mark.parametrize("backend", SERVING)
def test_widths_that_fill_tensor_core_tiles(backend: str, dtype: str, tolerance: float):
    """The widths of the other tests, 8 and 12, fit into one tile, mostly masked."""
    skip_without(backend)
    groups = [130, 0, 64, 1, 255, 17, 100, 41]
    if backend in GROUPED and jax.default_backend() == "cpu":
        pytest.skip(INTERPRETED)
    inputs, cotangent = arrays(640, jnp.dtype(dtype), experts=8, widths=(256, 384))

    got = jitted(expert_ffn, backend=backend)(inputs, jnp.array(groups, jnp.int32), cotangent)

    check_all(got, expected(inputs, groups, cotangent), tolerance)


# --- legs ---


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FP32), ("bfloat16", BF16)])
@pytest.mark.parametrize("groups", [[2, 1, 0, 1], GROUPS["uneven"]], ids=["few rows", "many rows"])
def test_the_default_legs_of_a_gpu(groups: list[int], dtype: str, tolerance: float):
    legs, R = LEGS["gpu", dtype], sum(groups)
    inputs, cotangent = arrays(R, jnp.dtype(dtype))
    if jax.default_backend() == "gpu":
        assert choose_legs("gpu", dtype, R, E) == legs

    got = jitted(expert_ffn, backend=",".join(legs))(inputs, jnp.array(groups, jnp.int32), cotangent)

    check_all(got, expected(inputs, groups, cotangent), tolerance)


@pytest.mark.parametrize(
    "backend",
    [
        "grouped pallas,batched,grouped pallas",
        "batched,grouped pallas,batched",
        "grouped tokamax,grouped tokamax,grouped pallas",
        "grouped pallas,grouped pallas,grouped tokamax",
    ],
)
def test_legs_of_different_backends_combine(backend: str):
    skip_without(backend)
    check_legs(backend)


@pytest.mark.parametrize("backend", SERVING)
def test_checkpoint_does_not_change_the_gradients(backend: str):
    skip_without(backend)
    check_checkpoint(backend)
