"""The training step on a GPU against the original's gradients and curve, and against the same step on the CPU.

Start at `test_losses_and_gradients_equal_the_originals`.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from dsmoe_jax.convert.param_mapping import hf_names, is_stacked
from dsmoe_jax.model import DeepSeekMoE, split
from dsmoe_jax.train import step as train_step
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.optimizer import OptimizerConfig, make_optimizer
from dsmoe_jax.train.step import Metrics, StepConfig, Trainable, init_state
from tests.helpers import golden
from tests.helpers.conformance import assert_near
from tests.test_step import (
    batch_of,
    test_packed_documents_have_the_loss_of_separate_ones,  # noqa: F401
    test_ten_steps_of_adamw_follow_the_originals_curve,  # noqa: F401
)

LOSSES = 1e-5  # absolute; losses are near 8
GRADIENTS = 1e-4  # of each parameter's largest: sums over 72 tokens and three layers, in another order
BF16_LOSS = 2e-2  # absolute; the original's bf16 differs by 0.011
BF16_NORM = 5e-2  # relative

CASE = "a_baseline"


def batch() -> Batch:
    tensors = golden.tensors(CASE)
    return batch_of(tensors["in.train.input_ids"], tensors["in.train.labels"])


@functools.cache
def differentiated(options: StepConfig, device: Any = None) -> tuple[Metrics, dict[str, np.ndarray]]:
    """The metrics and unclipped gradients of a step on a device (None: the default)."""
    model: DeepSeekMoE = golden.model(CASE)
    graph, params = split(model)
    transformation, _ = make_optimizer(OptimizerConfig(), 10)
    of_model = functools.partial(
        train_step._gradients, model.config, graph, options, 0, Trainable.all_params(model.config), frozen={}
    )
    # The placement of the inputs decides where a program runs.
    given: Any = jax.device_put(({name: np.asarray(value) for name, value in params.items()}, batch()), device)
    program = jax.jit(lambda params, batch: of_model(init_state(model.config, params, transformation, options), batch))
    grads, report = program(*given)
    places = {place for leaf in jax.tree.leaves(grads) for place in leaf.devices()}
    assert places == {device or jax.devices()[0]}
    return jax.tree.map(np.asarray, (report, grads))


def test_losses_and_gradients_equal_the_originals():
    tensors, want = golden.tensors(CASE), golden.expected(CASE)["train"]
    config = golden.model(CASE).config

    report, grads = differentiated(StepConfig())

    np.testing.assert_allclose(report.cross_entropy, want["ce"], rtol=0, atol=LOSSES)
    np.testing.assert_allclose(report.balance_loss, list(want["aux"].values()), rtol=0, atol=LOSSES)
    for name, parts in hf_names(config).items():
        theirs = [tensors[f"grad.{part}"] for part in parts]
        assert_near(grads[name], np.stack(theirs) if is_stacked(name) else theirs[0], GRADIENTS, name)


@pytest.mark.parametrize(
    "options",
    [StepConfig(), StepConfig(gradient_accumulation_steps=3, remat="full")],
    ids=["plain", "micro-batches, all recomputed"],
)
def test_losses_and_gradients_are_those_of_the_cpu(options: StepConfig, cpu: Any):
    got, want = differentiated(options), differentiated(options, cpu)

    for name in ("loss", "cross_entropy", "balance_loss", "expert_load", "entropy"):
        np.testing.assert_allclose(getattr(got[0], name), getattr(want[0], name), rtol=0, atol=LOSSES, err_msg=name)
    for name, gradient in want[1].items():
        assert_near(got[1][name], gradient, GRADIENTS, name)


def test_bf16_steps_stay_near_fp32():
    full, half = (differentiated(StepConfig(compute_dtype=dtype)) for dtype in ("float32", "bfloat16"))

    norms = [np.sqrt(sum((gradient**2).sum() for gradient in grads.values())) for _, grads in (full, half)]
    assert abs(half[0].loss - full[0].loss) < BF16_LOSS
    assert abs(norms[1] / norms[0] - 1) < BF16_NORM
    assert {gradient.dtype for gradient in half[1].values()} == {np.dtype(np.float32)}
