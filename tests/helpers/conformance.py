"""The routed experts on sorted rows: cases and checks of the conformance suite, for any device.

Start at `GROUPS` and `KINDS`; outputs and gradients are compared with float64 NumPy, `expected`. The tests are in
`tests/test_expert_ffn.py` and `tests/gpu/test_expert_kernels.py`.
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

FP32 = 1e-5  # of the largest value: sums of about ten products in another order
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
    # with 1040 rows, a block of each size from 32 to 256:
    "largest blocks":      [572, 128, 94, 2],
}
ROWS = {name: 24 for name in GROUPS} | {
    "one row each": 6, "one row, rows beyond": 6, "largest blocks": 1040,
}
KINDS = {
    # a different kind per operand:   gate                   up                     down                    frozen
    "quantized":                 (("int8",                "4-bit",               "double"),               FROZEN),
    "quantized, trained scales": (("double",              "int8",                "4-bit"),                "codes"),
    "low-rank":                  (("low-rank over dense", "low-rank over int8",  "low-rank over double"), FROZEN),
    "low-rank, trained base":    (("dense",               "low-rank over dense", "low-rank over dense"),  ""),
    "mixed":                     (("dense",               "double",              "low-rank over dense"),  FROZEN),
    "adapters alone":            (("low-rank over 4-bit", "dense",               "int8"),                 NOT_ADAPTERS),
}
# fmt: on


def out_and_grads(function: Any, inputs: Inputs, sizes: Any, cotangent: Any, frozen: str = "", **options: Any):
    """The output, and by path the gradients of all float leaves that do not match `frozen`."""
    leaves, tree = paths(inputs), jax.tree.structure(inputs)

    def of_trained(values: dict[str, Any]):
        rows, weights, experts = jax.tree.unflatten(tree, (leaves | values).values())
        return function(rows, *experts, sizes, weights=weights, **options)

    out, pull = jax.vjp(of_trained, trained(leaves, frozen))
    return out, pull(cotangent)[0]


@functools.cache
def jitted(function: Any, frozen: str = "", **options: Any):
    """Compiled `out_and_grads`; group sizes are traced."""
    return jax.jit(functools.partial(out_and_grads, function, frozen=frozen, **options))


@functools.cache
def arrays(
    R: int,
    dtype: Any = jnp.float32,
    kinds: tuple[str, str, str] = DENSE,
    experts: int = E,
    widths: tuple[int, int] = (D, F),
):
    """Return inputs scaled for outputs near 1, and an output gradient; every fifth row has weight 0."""
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
    """Compare the output and every gradient with the reference."""
    assert_near(got[0], want[0], tolerance, "out")
    for path, grad in got[1].items():
        assert_near(grad, want[1][path], tolerance, path)


def check_groups(groups: str, backend: str):
    """Check that rows use their group's expert, and that rows beyond the groups and their gradients are zero."""
    inputs, cotangent = arrays(ROWS[groups])
    sizes = jnp.array(GROUPS[groups], jnp.int32)
    used = sum(GROUPS[groups])

    out, grads = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    assert set(grads) == {"rows", "weights", "gate", "up", "down"}
    check_all((out, grads), expected(inputs, GROUPS[groups], cotangent))
    assert not any(np.any(by_row[used:]) for by_row in (out, grads["rows"], grads["weights"]))
    for e, size in enumerate(GROUPS[groups]):
        for name in Experts._fields:
            assert bool(np.any(grads[name][e])) == (size > 0), f"{name} of expert {e}"


def check_no_rows(backend: str):
    """Check an empty output and zero gradients."""
    inputs, cotangent = arrays(0)

    out, grads = jitted(expert_ffn, backend=backend)(inputs, jnp.zeros(E, jnp.int32), cotangent)

    assert out.shape == (0, D)
    assert {path: grad.shape for path, grad in grads.items()} == {p: leaf.shape for p, leaf in paths(inputs).items()}
    assert not any(np.any(grad) for grad in grads.values())


def check_kinds(kinds: str, backend: str):
    """Check quantized and low-rank operands with frozen leaves."""
    operands, frozen = KINDS[kinds]
    inputs, cotangent = arrays(24, kinds=operands)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(expert_ffn, frozen, backend=backend)(inputs, sizes, cotangent)

    check_all(got, expected(inputs, GROUPS["uneven"], cotangent))


def check_legs(backend: str):
    """Check different backends for fwd, dgrad and wgrad."""
    inputs, cotangent = arrays(24)
    sizes = jnp.array(GROUPS["rows beyond"], jnp.int32)

    got = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    check_all(got, expected(inputs, GROUPS["rows beyond"], cotangent))


def check_checkpoint(backend: str):
    """Check that recomputation in the backward pass does not change the gradients."""
    inputs, cotangent = arrays(24)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    got = jitted(jax.checkpoint(functools.partial(expert_ffn, backend=backend)))(inputs, sizes, cotangent)

    check_all(got, expected(inputs, GROUPS["uneven"], cotangent))


def check_bf16(backend: str):
    """Check outputs against fp32, and that gradients have their operand's dtype."""
    inputs, cotangent = arrays(24, jnp.bfloat16)
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    out, grads = jitted(expert_ffn, backend=backend)(inputs, sizes, cotangent)

    assert out.dtype == jnp.bfloat16
    assert {path: grad.dtype for path, grad in grads.items()} == {p: leaf.dtype for p, leaf in paths(inputs).items()}
    check_all((out, grads), expected(inputs, GROUPS["uneven"], cotangent), BF16)


def check_adapters_over_bf16(backend: str):
    """Check bf16 rows with fp32 adapters and gradients."""
    inputs, cotangent = arrays(24, jnp.bfloat16, ("low-rank over dense", "low-rank over 4-bit", "dense"))
    sizes = jnp.array(GROUPS["uneven"], jnp.int32)

    out, grads = jitted(expert_ffn, FROZEN, backend=backend)(inputs, sizes, cotangent)

    assert out.dtype == grads["rows"].dtype == jnp.bfloat16
    assert {grads[path].dtype for path in ("gate.a", "gate.b", "up.a", "up.b")} == {jnp.dtype(jnp.float32)}
    check_all((out, grads), expected(inputs, GROUPS["uneven"], cotangent), BF16)


def expected(inputs: Inputs, sizes: list[int], cotangent: Any, activation: str = "silu"):
    """Return output and all gradients, by path, in float64 NumPy."""
    rows, weights, experts = inputs
    exact = [np.asarray(rows, np.float64), np.asarray(weights, np.float64), *map(reference.dense, experts)]
    options = {"group_sizes": sizes, "activation": activation}
    grads = reference.expert_ffn_grads(*exact, **options, grad_out=np.asarray(cotangent, np.float64))
    named = {"rows": grads[0], "weights": grads[1]}
    for name, operand, grad in zip(Experts._fields, experts, grads[2:], strict=True):
        named |= reference.operand_grads(name, operand, grad)
    return reference.expert_ffn(*exact, **options), named
