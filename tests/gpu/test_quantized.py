"""Quantized weights on a GPU: int8, int4 and NF4 equal their dequantized values.

Start at `test_a_linear_map_equals_the_dequantized_matmul`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels.expert_ffn import expert_ffn
from dsmoe_jax.kernels.operand import Experts, Inputs, Quantized, linear
from dsmoe_jax.model import assemble, split
from dsmoe_jax.quantize import SCHEMES, quantize, quantize_matrix, quantize_params
from tests.gpu.backends import SERVING, skip_without
from tests.helpers import golden, reference
from tests.helpers.conformance import BF16, GROUPS, D, E, F, arrays, assert_near, check_all, expected, jitted

O, I = 130, 128  # noqa: E741  # 260 tiles of 64, so the scales have two tiles, the last one short

FP32 = 1e-5  # of the largest value: sums of 128 products, in another order
SAME_CODES = 0.999  # of all; the others lie between two codes, and a division is rounded differently
SAME_SCALES = 1e-6  # relative

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@functools.cache
def weights(*shape: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@every_scheme
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FP32), ("bfloat16", BF16)])
def test_a_linear_map_equals_the_dequantized_matmul(dtype: str, tolerance: float, scheme: str):
    quantized = quantize(weights(2, O, I), scheme)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, I)), dtype)

    got = jax.jit(linear)(x, jax.tree.map(lambda leaf: leaf[1], quantized))

    assert got.dtype == jnp.float32
    assert_near(got, np.asarray(x, np.float64) @ reference.dense(quantized)[1].T, tolerance)


@every_scheme
def test_codes_and_scales_equal_those_of_the_cpu(scheme: str, cpu: Any):
    encode = functools.partial(quantize_matrix, scheme=SCHEMES[scheme], double=False)

    here, there = (encode(jax.device_put(weights(O, I), place)) for place in (jax.devices()[0], cpu))

    assert np.mean(np.asarray(here.codes) == np.asarray(there.codes)) >= SAME_CODES
    np.testing.assert_allclose(here.scales, there.scales, rtol=SAME_SCALES)


@every_scheme
@pytest.mark.parametrize("backend", SERVING)
def test_experts_equal_their_dequantized_values(backend: str, scheme: str):
    skip_without(backend)
    (rows, row_weights, _), cotangent = arrays(24)
    experts = Experts(*(quantize(20 * weights(E, *shape), scheme) for shape in ((F, D), (F, D), (D, F))))
    inputs = Inputs(rows, row_weights, experts)

    got = jitted(expert_ffn, "scales|offset", backend=backend)(inputs, jnp.array(GROUPS["uneven"]), cotangent)

    assert set(got[1]) == {"rows", "weights"}
    check_all(got, expected(inputs, GROUPS["uneven"], cotangent))


@every_scheme
def test_a_model_equals_its_dequantized_weights(scheme: str):
    model, ids = golden.model("a_baseline"), golden.tensors("a_baseline")["in.input_ids"]
    quantized = quantize_params(split(model)[1], scheme)
    dense = {name: dequantized(value) if isinstance(value, Quantized) else value for name, value in quantized.items()}

    got, want = (assemble(model.config, params)(ids).logits for params in (quantized, dense))

    np.testing.assert_allclose(got, want, rtol=0, atol=golden.LOGITS)


def dequantized(operand: Quantized) -> jax.Array:
    """NumPy, one code at a time; a matrix or a stack."""
    stacked = operand.codes.ndim == 3
    values = reference.dense(operand if stacked else jax.tree.map(lambda leaf: leaf[None], operand))
    return jnp.asarray(values if stacked else values[0], jnp.float32)
