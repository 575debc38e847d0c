"""The golden cases of the original PyTorch model on a GPU (`tests/test_golden.py`, collected again), and TF32.

The tolerances in fp32 ("highest") and bf16 are those of the CPU. Decode steps and greedy ids are in
`test_generation.py`.
"""

import jax
import numpy as np

from tests.helpers import golden
from tests.helpers.conformance import assert_near
from tests.test_golden import (
    BF16_ARGMAX,
    every_case,
    test_bf16_is_as_close_to_fp32_as_the_original,  # noqa: F401
    test_left_padded_logits_equal_the_original,  # noqa: F401
    test_logits_and_hidden_states_equal_the_original,  # noqa: F401
    test_routing_equals_the_original,  # noqa: F401
)

FP32 = 1e-5  # of the largest value; TF32, with a mantissa of 10 bits, is near 3e-4


def test_highest_precision_is_fp32_and_not_tf32():
    """The tolerances of this folder depend on it."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(256, 256)).astype(np.float32) for _ in range(2))

    got = jax.jit(lambda x, y: x @ y)(x, y)

    assert_near(got, x.astype(np.float64) @ y, FP32)


@every_case
def test_the_default_precision_is_nearer_to_fp32_than_bf16(case: str):
    """The default is TF32 on NVIDIA since Ampere; the router is always in fp32."""
    want, bf16 = golden.tensors(case)["logits"], golden.expected(case)["bf16_vs_fp32_logits_rms"]

    with jax.default_matmul_precision("default"):
        logits = np.asarray(golden.model(case)(golden.tensors(case)["in.input_ids"]).logits)

    assert np.sqrt(np.mean((logits - want) ** 2)) <= bf16
    assert np.mean(logits.argmax(-1) == want.argmax(-1)) >= BF16_ARGMAX
