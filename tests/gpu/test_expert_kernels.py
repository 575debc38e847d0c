"""The routed experts: the conformance suite of `tests/helpers/conformance.py` over every backend and every leg.

Start at `test_every_row_goes_through_its_own_expert`. The suite of the grouped matmul's kernels is collected here a
second time, as it stands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels.expert_ffn import LEGS, choose_legs, expert_ffn
from dsmoe_jax.kernels.operand import Experts
from tests.gpu.backends import EVERY, GROUPED, SERVING, skip_without
from tests.helpers.conformance import (
    BF16,
    FP32,
    GROUPS,
    KINDS,
    ROWS,
    D,
    E,
    arrays,
    check_adapters_over_bf16,
    check_all,
    check_bf16,
    jitted,
    twin,
)
from tests.helpers.trees import paths
from tests.test_grouped_matmul import (
    test_every_row_meets_its_own_expert as test_the_grouped_matmul_gives_every_row_its_own_expert,  # noqa: F401
)
from tests.test_grouped_matmul import (
    test_results_may_stay_in_fp32 as test_results_of_the_grouped_matmul_may_stay_in_fp32,  # noqa: F401
)

INTERPRETED = "on CPU the kernel is interpreted: minutes"

every_backend = pytest.mark.parametrize("backend", EVERY)


@every_backend
@pytest.mark.parametrize("groups", GROUPS)
def test_every_row_goes_through_its_own_expert(groups: str, backend: str):
    skip_without(backend)
    if backend in GROUPED and ROWS[groups] > 24 and jax.default_backend() == "cpu":
        pytest.skip(INTERPRETED)
    inputs, cotangent = arrays(ROWS[groups])
    sizes = jnp.array(GROUPS[groups], jnp.int32)
    used = sum(GROUPS[groups])

    out, grads = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    assert set(grads) == {"rows", "weights", "gate", "up", "down"}
    check_all((out, grads), twin(inputs, GROUPS[groups], cotangent))
    assert not any(np.any(by_row[used:]) for by_row in (out, grads["rows"], grads["weights"]))
    for e, size in enumerate(GROUPS[groups]):
        for name in Experts._fields:
            assert bool(np.any(grads[name][e])) == (size > 0), f"{name} of expert {e}"


@every_backend
def test_no_rows_at_all(backend: str):
    skip_without(backend)
    inputs, cotangent = arrays(0)

    out, grads = jitted(expert_ffn, backend=backend)(inputs, jnp.zeros(E, jnp.int32), cotangent)

    assert out.shape == (0, D)
    assert {path: grad.shape for path, grad in grads.items()} == {p: leaf.shape for p, leaf in paths(inputs).items()}
    assert not any(np.any(grad) for grad in grads.values())


CASES = [(kinds, "batched") for kinds in KINDS]
CASES += [(kinds, backend) for kinds in ("quantised", "low-rank", "mixed") for backend in ("slots", *GROUPED)]


@pytest.mark.parametrize(("kinds", "backend"), CASES)
def test_every_kind_of_operand(kinds: str, backend: str):
    skip_without(backend)
    operands, frozen = KINDS[kinds]
    inputs, cotangent = arrays(24, kinds=operands)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(expert_ffn, frozen, backend=backend)(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["uneven"], cotangent))


@every_backend
def test_bf16_stays_near_fp32(backend: str):
    skip_without(backend)
    check_bf16(backend)


@pytest.mark.parametrize("backend", SERVING)
def test_adapters_in_fp32_serve_rows_in_bf16(backend: str):
    skip_without(backend)
    check_adapters_over_bf16(backend)


# fmt: off
FULL = {
    #           rows  groups
    "many":    (640,  [130, 0, 64, 1, 255, 17, 100, 41]),
    "few":     (8,    [2, 0, 1, 0, 1, 0, 2, 0]),  # for `slots`: weight gradients of more would be summed in bf16
}
# fmt: on


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FP32), ("bfloat16", BF16)])
@pytest.mark.parametrize("backend", SERVING)
def test_widths_that_fill_the_tiles_of_tensor_cores(backend: str, dtype: str, tolerance: float):
    """The other tests' widths of 8 and 12 fit into one tile, most of it masked."""
    skip_without(backend)
    R, groups = FULL["few" if backend == "slots" else "many"]
    if backend in GROUPED and jax.default_backend() == "cpu":
        pytest.skip(INTERPRETED)
    inputs, cotangent = arrays(R, jnp.dtype(dtype), experts=8, widths=(256, 384))

    got = jitted(expert_ffn, backend=backend)(inputs, jnp.array(groups, jnp.int32), cotangent)

    check_all(got, twin(inputs, groups, cotangent), tolerance)


# --- legs ---


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FP32), ("bfloat16", BF16)])
def test_the_legs_that_the_table_gives_a_gpu(dtype: str, tolerance: float, rows: str):
    legs = LEGS["gpu", dtype, rows]
    groups = {"few": [2, 1, 0, 1], "many": GROUPS["uneven"]}[rows]
    R = sum(groups)
    inputs, cotangent = arrays(R, jnp.dtype(dtype))
    if jax.default_backend() == "gpu":
        assert choose_legs("gpu", dtype, R, E) == legs

    got = jitted(expert_ffn, backend=",".join(legs))(inputs, jnp.array(groups, jnp.int32), cotangent)

    check_all(got, twin(inputs, groups, cotangent), tolerance)


@pytest.mark.parametrize(
    "backend",
    [
        "slots,batched,grouped pallas",
        "grouped pallas,slots,batched",
        "batched,grouped pallas,slots",
        "grouped tokamax,grouped tokamax,grouped pallas",
        "grouped pallas,grouped pallas,grouped tokamax",
    ],
)
def test_legs_of_different_backends_fit_together(backend: str):
    skip_without(backend)
    inputs, cotangent = arrays(24)
    sizes = jnp.array(GROUPS["rows beyond"], jnp.int32)

    got = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["rows beyond"], cotangent))


@pytest.mark.parametrize("backend", SERVING)
def test_recomputing_in_the_backward_pass_changes_nothing(backend: str):
    skip_without(backend)
    inputs, cotangent = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(jax.checkpoint(functools.partial(expert_ffn, backend=backend)))(inputs, sizes, cotangent)

    check_all(got, twin(inputs, GROUPS["uneven"], cotangent))
