"""The losses and their gradients against the original's training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.names import hf_names, is_stacked
from dsmoe_jax.model import merge, split
from dsmoe_jax.train import balance_loss, cross_entropy
from tests.helpers import golden

CE, AUX, GRADIENT = 1e-5, 1e-6, 1e-3  # the first two absolute, the last relative; see shared/spec/model.md


def losses(params, graph, config: ModelConfig, batch: dict, mask=None):
    model = merge(graph, params)
    hidden = model.hidden(jnp.asarray(batch["in.train.input_ids"]), mask)
    ce = cross_entropy(model.logits(hidden.states), jnp.asarray(batch["in.train.labels"]))
    aux = balance_loss(config, hidden.routing)
    return ce + sum(aux.values()), (ce, aux)


@pytest.mark.parametrize("seq_aux", [True, False], ids="seq_aux={}".format)
@pytest.mark.parametrize("case", golden.COMMITTED)
def test_cross_entropy_and_balance_losses_equal_the_originals(case: str, seq_aux: bool):
    model = golden.model(case)
    batch, expected = golden.tensors(case), golden.expected(case)[f"train_aux_seq_{str(seq_aux).lower()}"]
    graph, params = split(model)
    ids, labels = jnp.asarray(batch["in.train.input_ids"]), jnp.asarray(batch["in.train.labels"])
    config = ModelConfig.from_dict(model.config.to_dict() | {"seq_aux": seq_aux})

    out = model(ids)
    aux = balance_loss(config, out.routing)

    assert abs(cross_entropy(out.logits, labels) - expected["ce"]) <= CE
    assert {str(layer): pytest.approx(float(loss), abs=AUX) for layer, loss in aux.items()} == expected["aux"]
    assert graph is not None
    assert params


def test_every_gradient_equals_the_originals():
    model = golden.model("a_baseline")
    batch = golden.tensors("a_baseline")
    graph, params = split(model)

    grads = jax.jit(jax.grad(lambda p: losses(p, graph, model.config, batch)[0]))(params)

    for name, parts in hf_names(model.config).items():
        stack = grads[name] if is_stacked(name) else [grads[name]]
        for part, got in zip(parts, stack, strict=True):
            want = batch[f"grad.{part}"]
            np.testing.assert_allclose(got, want, rtol=GRADIENT, atol=GRADIENT * np.abs(want).max(), err_msg=part)


def test_right_padding_counts_in_the_balance_loss_as_in_the_original():
    model = golden.model("a_baseline")
    batch, expected = golden.tensors("a_baseline"), golden.expected("a_baseline")
    graph, params = split(model)
    mask = jnp.asarray(batch["in.train_rp.attention_mask"])

    loss = jax.jit(jax.value_and_grad(lambda p: losses(p, graph, model.config, batch, mask), has_aux=True))
    (_, (ce, aux)), grads = loss(params)

    assert abs(ce - expected["train_rightpad_masked"]["ce"]) <= CE
    for layer, value in expected["train_rightpad_masked"]["aux"].items():
        assert abs(aux[int(layer)] - value) <= AUX
    for name, parts in hf_names(model.config).items():
        stack = grads[name] if is_stacked(name) else [grads[name]]
        for part, got in zip(parts, stack, strict=True):
            assert jnp.linalg.norm(got) == pytest.approx(expected["grad_norms_rightpad"][part], rel=GRADIENT), part
