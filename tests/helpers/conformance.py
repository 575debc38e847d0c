"""The routed experts on sorted rows: the cases and the checks that every backend has to pass, on any device.

Start at `GROUPS` and `KINDS`; outputs and gradients are compared with float64 NumPy, `twin`. The tests themselves stand
in `tests/test_expert_ffn.py` and `tests/gpu/test_expert_kernels.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.kernels.expert_ffn import expert_ffn
from dsmoe_jax.kernels.operand import Experts, Inputs
from tests.helpers import reference
from tests.helpers.trees import FROZEN, paths, trained

E, D, F = 4, 8, 12
DENSE = ("dense", "dense", "dense")
NOT_ADAPTERS = r"^(?!.*\.[ab]$)"

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
KINDS = {
    # each kind in another place:   gate                   up                     down                    frozen
    "quantised":                 (("int8",                "4-bit",               "double"),               FROZEN),
    "quantised, trained scales": (("double",              "int8",                "4-bit"),                "codes"),
    "low-rank":                  (("low-rank over dense", "low-rank over int8",  "low-rank over double"), FROZEN),
    "low-rank, trained base":    (("dense",               "low-rank over dense", "low-rank over dense"),  ""),
    "mixed":                     (("dense",               "double",              "low-rank over dense"),  FROZEN),
    "adapters alone":            (("low-rank over 4-bit", "dense",               "int8"),                 NOT_ADAPTERS),
}
# fmt: on


def out_and_grads(function: Any, inputs: Inputs, sizes: Any, cotangent: Any, frozen: str = "", **options: Any):
    """Output, and the gradients of all floats but those whose path has a match of `frozen`, by path."""
    leaves, tree = paths(inputs), jax.tree.structure(inputs)

    def of_trained(values: dict[str, Any]):
        rows, weights, experts = jax.tree.unflatten(tree, (leaves | values).values())
        return function(rows, *experts, sizes, weights=weights, **options)

    out, pull = jax.vjp(of_trained, trained(leaves, frozen))
    return out, pull(cotangent)[0]


@functools.cache
def jitted(function: Any, frozen: str = "", **options: Any):
    """`out_and_grads` as a program; group sizes are data, so one serves all of one shape."""
    return jax.jit(functools.partial(out_and_grads, function, frozen=frozen, **options))


@functools.cache
def arrays(
    R: int,
    dtype: Any = jnp.float32,
    kinds: tuple[str, str, str] = DENSE,
    experts: int = E,
    widths: tuple[int, int] = (D, F),
):
    """Inputs of the size that keeps results near 1, and an output gradient. Every fifth row counts for nothing."""
    rng, (D, F) = np.random.default_rng(R), widths
    weights = jnp.asarray(rng.uniform(0.2, 1, R) * (np.arange(R) % 5 != 3), jnp.float32)
    shapes = ((F, D), (F, D), (D, F))
    operands = (
        reference.random_operand(kind, (experts, *shape), rng, dtype) for kind, shape in zip(kinds, shapes, strict=True)
    )
    rows, cotangent = (jnp.asarray(rng.normal(size=(R, D)), dtype) for _ in range(2))
    return Inputs(rows, weights, Experts(*operands)), cotangent


def assert_near(got: Any, want: Any, relative: float, name: str = ""):
    want = np.asarray(want, np.float64)
    scale = np.abs(want).max(initial=0)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=relative * scale, err_msg=name)


def check_all(got: Any, want: Any, tolerance: float = FP32):
    """The output and every gradient against the twin's."""
    assert_near(got[0], want[0], tolerance, "out")
    for path, grad in got[1].items():
        assert_near(grad, want[1][path], tolerance, path)


def check_bf16(backend: str):
    """Near fp32, every gradient in its operand's dtype."""
    inputs, cotangent = arrays(24, jnp.bfloat16)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    out, grads = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    assert out.dtype == jnp.bfloat16
    assert {path: grad.dtype for path, grad in grads.items()} == {p: leaf.dtype for p, leaf in paths(inputs).items()}
    check_all((out, grads), twin(inputs, GROUPS["uneven"], cotangent), BF16)


def check_adapters_over_bf16(backend: str):
    """Rows in bf16, adapters and their gradients in fp32."""
    inputs, cotangent = arrays(24, jnp.bfloat16, ("low-rank over dense", "low-rank over 4-bit", "dense"))
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    out, grads = jitted(expert_ffn, FROZEN, backend=backend)(inputs, sizes, cotangent)

    assert out.dtype == grads["rows"].dtype == jnp.bfloat16
    assert {grads[path].dtype for path in ("gate.a", "gate.b", "up.a", "up.b")} == {jnp.dtype(jnp.float32)}
    check_all((out, grads), twin(inputs, GROUPS["uneven"], cotangent), BF16)


def twin(inputs: Inputs, sizes: list[int], cotangent: Any, activation: str = "silu"):
    """Output and all gradients, by path, in float64 NumPy."""
    rows, weights, experts = inputs
    exact = [np.asarray(rows, np.float64), np.asarray(weights, np.float64), *map(reference.dense, experts)]
    options = {"group_sizes": sizes, "activation": activation}
    grads = reference.expert_ffn_grads(*exact, **options, grad_out=np.asarray(cotangent, np.float64))
    named = {"rows": grads[0], "weights": grads[1]}
    for name, operand, grad in zip(Experts._fields, experts, grads[2:], strict=True):
        named |= reference.operand_grads(name, operand, grad)
    return reference.expert_ffn(*exact, **options), named
