"""One row times a quantized weight on CPU: values, gradients, and what XLA fuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels.operand import dot, linear
from dsmoe_jax.quantize import quantize

WIDTHS = {"whole tiles": 192, "tiles that span rows": 96}


@pytest.mark.parametrize(
    ("scheme", "tolerance", "into"),
    [
        pytest.param(
            *(scheme, tolerance, into),
            id=f"{scheme}-{width}",
            marks=[pytest.mark.slow] * (scheme != "nf4" and width == "tiles that span rows"),
        )
        for scheme, tolerance in (("int8", 1e-6), ("int4", 1e-4), ("nf4", 2e-3))
        for width, into in WIDTHS.items()
    ],
)
def test_a_row_equals_the_dequantized_product(scheme: str, tolerance: float, into: int):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, into)), jnp.float32)
    weight = quantize(jnp.asarray(rng.normal(size=(40, into)), jnp.float32), scheme)

    got, gradient = jax.value_and_grad(lambda x: jnp.square(linear(x, weight)).sum())(x)
    expected, exact = jax.value_and_grad(lambda x: jnp.square(dot(x, weight.dequantize())).sum())(x)

    np.testing.assert_allclose(got, expected, rtol=tolerance)
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=tolerance * float(jnp.abs(exact).max()))


every_scheme = pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])


@every_scheme
def test_zeros_give_zeros_and_nan_propagates(scheme: str):
    weight, zeros = quantize(jnp.ones((4, 128)), scheme), jnp.zeros((1, 128))

    np.testing.assert_array_equal(linear(zeros, weight), np.zeros((1, 4)))
    assert np.isnan(linear(zeros.at[0, 5].set(jnp.nan), weight)).all()


@every_scheme
def test_the_computation_of_the_row_is_not_fused(scheme: str):
    """It would be repeated for every output."""
    weight = quantize(jnp.ones((48, 128)), scheme)
    row = lambda x, mean, weight: linear((x - mean).reshape(1, 1, 128), weight)  # noqa: E731

    text = jax.jit(row).lower(jnp.ones((2, 64)), jnp.ones((2, 64)), weight).compile().as_text()

    assert text is not None
    kernels = re.findall(r"^%\S* \(.*?^\}", text, re.MULTILINE | re.DOTALL)
    readers = [kernel for kernel in kernels if "8[48," in kernel.partition(" -> ")[0]]
    assert readers
    assert not any("subtract(" in kernel for kernel in readers)
