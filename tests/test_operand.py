"""Operands of a linear map against values computed by hand, then against NumPy, one code at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels.operand import (
    EXPERT_AXES,
    Experts,
    GradMask,
    Inputs,
    LowRank,
    Quantized,
    dequantize_all,
    dot,
    leaf_axes,
    linear,
    shape,
)
from tests.helpers import reference
from tests.helpers.conformance import FP32, assert_near

E, O, I = 3, 6, 8  # noqa: E741
QUANTIZED = ("int8", "4-bit", "double")
KINDS = ("dense", *QUANTIZED, "low-rank over dense", "low-rank over int8", "low-rank over double")
COUNTING = tuple(float(n) for n in range(16))  # the identity codebook


every_kind = pytest.mark.parametrize("kind", KINDS)


def operand(kind: str, dtype: Any = jnp.float32) -> Any:
    return reference.random_operand(kind, (E, O, I), np.random.default_rng(0), dtype)


def of_expert(e: int, operand: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[e], operand)


# --- dequantization of one expert ---


def test_the_first_code_is_in_the_upper_half_of_the_byte():
    """As in bitsandbytes for NF4 and FP4."""
    codes = jnp.array([[0x1F, 0xA0], [0x23, 0xC4]], jnp.uint8)

    values = Quantized(codes, jnp.ones(1), tile=8, codebook=COUNTING).dequantize()

    assert values.tolist() == [[1, 15, 10, 0], [2, 3, 12, 4]]


def test_tiles_span_rows_and_the_last_may_be_short():
    codes = jnp.array([[0x11, 0x11], [0x11, 0x11]], jnp.uint8)

    values = Quantized(codes, jnp.array([2.0, 3.0, 5.0]), tile=3, codebook=COUNTING).dequantize()

    assert values.tolist() == [[2, 2, 2, 3], [3, 3, 5, 5]]


def test_int8_has_a_scale_per_output():
    codes = jnp.array([[-128, 127], [1, -2]], jnp.int8)

    values = Quantized(codes, jnp.array([[0.5], [4.0]]), tile=2).dequantize()

    assert values.tolist() == [[-64, 63.5], [4, -8]]


def test_a_long_codebook_has_a_byte_per_code():
    codebook = tuple(float(n * n) for n in range(256))

    values = Quantized(jnp.array([[0, 3, 255]], jnp.uint8), jnp.ones(1), tile=3, codebook=codebook).dequantize()

    assert values.tolist() == [[0, 9, 65025]]


def test_double_quantization_adds_the_offset():
    by_code = (0.0, 0.25, *[9.0] * 254)
    scales = Quantized(
        jnp.array([1, 0, 1], jnp.uint8), jnp.array([4.0, 8.0]), offset=jnp.array(0.5), tile=2, codebook=by_code
    )  # 0.25 · 4 + 0.5, 0 · 4 + 0.5, 0.25 · 8 + 0.5
    codes = jnp.array([[0x24, 0x68], [0x24, 0x60]], jnp.uint8)

    values = Quantized(codes, scales, tile=3, codebook=COUNTING).dequantize()

    assert values.tolist() == [[3, 6, 9, 4], [1, 2, 15, 0]]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_dequantization_equals_the_reference(kind: str):
    quantized = operand(kind)

    got = jax.vmap(Quantized.dequantize)(quantized)

    assert got.dtype == jnp.float32
    assert_near(got, reference.dequantize(quantized), 1e-6)


def test_bf16_scales_multiply_in_fp32():
    quantized = operand("int8")
    coarse = dataclasses.replace(quantized, scales=quantized.scales.astype(jnp.bfloat16))

    got = jax.vmap(Quantized.dequantize)(coarse)

    assert_near(got, reference.dequantize(coarse), 1e-6)


def test_dequantize_all_keeps_adapters_and_dense_operands():
    quantized, low_rank, dense = operand("4-bit"), operand("low-rank over int8"), operand("dense")

    gate, up, down = dequantize_all(Inputs(jnp.ones((1, I)), None, Experts(quantized, low_rank, dense))).experts

    assert_near(gate, reference.dense(quantized), 1e-6)
    assert isinstance(up, LowRank)
    assert_near(up.base, reference.dense(low_rank.base), 1e-6)
    assert_near(up.a, low_rank.a, 0)
    assert_near(down, dense, 0)


# --- the linear map ---


@every_kind
def test_a_linear_map_equals_the_dense_matmul(kind: str):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, I)), jnp.float32)
    experts = operand(kind)

    got = jax.jit(linear)(x, of_expert(1, experts))

    assert_near(got, np.asarray(x, np.float64) @ reference.dense(experts)[1].T, FP32)


def test_a_low_rank_product_is_never_materialized():
    expert = of_expert(0, operand("low-rank over dense"))

    program = jax.make_jaxpr(lambda expert: linear(jnp.ones((5, I)), expert))(expert)

    assert (O, I) not in {value.aval.shape for equation in program.eqns for value in equation.outvars}


def test_bf16_dots_accumulate_in_fp32_with_bf16_gradients():
    x, weight = jnp.ones((2, 1024), jnp.bfloat16), jnp.full((1, 1024), 1.0078125, jnp.bfloat16)

    y, pull = jax.vjp(dot, x, weight)
    grads = pull(jnp.ones((2, 1)))

    assert y.dtype == jnp.float32
    assert y.tolist() == [[1032], [1032]]
    assert {grad.dtype for grad in grads} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", ["dense", "int8", "low-rank over dense"])
def test_bf16_rows_have_no_fp32_matmul(kind: str):
    """An fp32 adapter or dequantized base would promote the whole product."""
    expert = of_expert(0, operand(kind))
    in_bf16 = jnp.ones((5, I), jnp.bfloat16)

    program = jax.make_jaxpr(jax.grad(lambda x: linear(x, expert).sum()))(in_bf16)

    products = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert len(products) >= 2
    assert {factor.aval.dtype for product in products for factor in product.invars} == {jnp.dtype(jnp.bfloat16)}


# --- shapes and axes ---


@every_kind
def test_shape_of_every_kind(kind: str):
    assert shape(operand(kind)) == (O, I)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("int8", {"tile": I - 1}, "6 x 8 codes in tiles of 7 do not fit 6 scales"),
        ("4-bit", {"scales": jnp.ones((E, 4))}, "6 x 8 codes in tiles of 10 do not fit 4 scales"),
        ("double", {"tile": 6}, "6 x 8 codes in tiles of 6 do not fit 5 scales"),
        ("low-rank over dense", {"a": jnp.ones((E, 3, I + 1))}, r"a \[r, in\] = \(3, 9\), .* do not fit \(6, 8\)"),
        ("low-rank over int8", {"b": jnp.ones((E, O - 1, 3))}, r"b \[out, r\] = \(5, 3\) do not fit \(6, 8\)"),
        ("low-rank over dense", {"b": jnp.ones((E, O, 4))}, r"a \[r, in\] = \(3, 8\), b \[out, r\] = \(6, 4\)"),
    ],
)
def test_mismatched_parts_are_rejected(kind: str, changed: dict[str, Any], message: str):
    broken = dataclasses.replace(operand(kind), **changed)

    with pytest.raises(ValueError, match=message):
        shape(broken)


@every_kind
def test_experts_lead_in_every_leaf_and_axes_are_named(kind: str):
    leaves = jax.tree.leaves(operand(kind))

    axes = leaf_axes(operand(kind), EXPERT_AXES[0])

    assert {leaf.shape[0] for leaf in leaves} == {E}
    assert [len(names) for names in axes] == [leaf.ndim for leaf in leaves]
    assert {names[0] for names in axes} == {"experts"}


def test_an_adapter_is_sharded_as_its_base():
    low_rank = leaf_axes(operand("low-rank over dense"), EXPERT_AXES[2])

    assert low_rank == [EXPERT_AXES[2], ("experts", None, "expert_ffn"), ("experts", "embed", None)]


# --- masks and trees ---


@pytest.mark.parametrize("weights", [None, jnp.ones(5)], ids=["no weights", "weights"])
def test_by_row_distinguishes_rows_from_operands(weights: Any):
    experts = Experts(operand("dense"), operand("4-bit"), operand("low-rank over dense"))

    by_row = Inputs(jnp.ones((5, I)), weights, experts).by_row()

    assert by_row == [True] * (1 if weights is None else 2) + [False] * (1 + 2 + 3)


def test_a_grad_mask_selects_and_fills_leaves():
    needs_grad = GradMask([True, False, True])

    assert needs_grad.select(["a", "b", "c"]) == ["a", "c"]
    assert needs_grad.fill([1, 3], ["a", "b", "c"]) == [1, "b", 3]


def test_operands_are_pytrees():
    low_rank = operand("low-rank over double")

    doubled = jax.tree.map(lambda leaf: None, low_rank)

    assert isinstance(doubled, LowRank)
    assert isinstance(doubled.base.scales, Quantized)
    assert doubled.base.tile == reference.TILE
