"""Losses and their gradients compared with the original's training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.param_mapping import hf_names, is_stacked
from dsmoe_jax.layers.router import Routing
from dsmoe_jax.model import merge, split
from dsmoe_jax.sharding import make_mesh
from dsmoe_jax.train import balance_loss, cross_entropy, loss
from dsmoe_jax.train.loss import IGNORED
from tests.helpers import golden
from tests.helpers.hf_folder import tiny
from tests.helpers.meshes import MESHES

CE, AUX, GRADIENT = 1e-5, 1e-6, 1e-3  # the first two absolute, the last relative; see shared/spec/model.md


def losses(params, graph, config: ModelConfig, batch: dict, mask=None):
    model = merge(graph, params)
    hidden = model.hidden(jnp.asarray(batch["in.train.input_ids"]), mask)
    ce = cross_entropy(model.logits(hidden.last_hidden_state), jnp.asarray(batch["in.train.labels"]))
    aux = balance_loss(config, hidden.routing)
    return ce + sum(aux.values()), (ce, aux)


@pytest.mark.parametrize("seq_aux", [True, False], ids="seq_aux={}".format)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "d_rope_linear")) for case in golden.COMMITTED]
)
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


def test_padding_counts_in_the_balance_loss_as_in_the_original():
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


# Fused output projection and loss


def plain_loss(states, head, targets, z_loss=0.0):
    """Reference of `chunked_cross_entropy` with all logits at once."""
    logits = jnp.einsum("btd,vd->btv", states, head)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, :, None].clip(0), axis=-1)[:, :, 0]
    counted = targets != IGNORED
    return jnp.where(counted, log_sum - picked + z_loss * log_sum**2, 0).sum()


def head_inputs(B: int = 8, T: int = 9, D: int = 16, V: int = 64):
    keys = jax.random.split(jax.random.key(0), 4)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    targets = jnp.where(jax.random.bernoulli(keys[3], 0.3, (B, T)), IGNORED, targets)
    return jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D)), targets


@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids="z_loss={}".format)
@pytest.mark.parametrize("tokens", [1, 7, 1000], ids="{} tokens a chunk".format)
def test_chunked_loss_and_gradients_equal_the_plain_ones(monkeypatch: pytest.MonkeyPatch, tokens: int, z_loss: float):
    states, head, targets = head_inputs()
    monkeypatch.setattr(loss, "_CHUNK_BYTES", tokens * 4 * len(head))

    got, got_grads = jax.value_and_grad(
        lambda s, h: 3 * loss.chunked_cross_entropy(s, h, targets, z_loss=z_loss).total, (0, 1)
    )(states, head)
    want, want_grads = jax.value_and_grad(lambda s, h: 3 * plain_loss(s, h, targets, z_loss), (0, 1))(states, head)

    np.testing.assert_allclose(got, want, rtol=1e-5)
    for mine, plain in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-4)
    assert loss.chunked_cross_entropy(states, head, targets, z_loss=z_loss).cross_entropy == pytest.approx(
        float(plain_loss(states, head, targets)), rel=1e-5
    )


@pytest.mark.parametrize("V", [pytest.param(64, marks=pytest.mark.slow), 63], ids="a vocabulary of {}".format)
@pytest.mark.parametrize("mesh", MESHES)
def test_chunked_loss_is_equal_on_every_mesh(mesh: str, V: int):
    states, head, targets = head_inputs(V=V)
    want, want_grads = jax.value_and_grad(lambda s, h: plain_loss(s, h, targets, 0.1), (0, 1))(states, head)

    with jax.set_mesh(make_mesh(MESHES[mesh])):
        run = jax.jit(
            jax.value_and_grad(lambda s, h: loss.chunked_cross_entropy(s, h, targets, z_loss=0.1).total, (0, 1))
        )
        got, got_grads = run(states, head)

    np.testing.assert_allclose(got, want, rtol=1e-5)
    for mine, plain in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-4)


def test_full_logits_are_never_materialized():
    states, head, targets = head_inputs(B=4, T=64, V=2**15)

    compiled = (
        jax.jit(jax.grad(lambda s, h: loss.chunked_cross_entropy(s, h, targets).total, (0, 1)))
        .lower(states, head)
        .compile()
    )

    all_logits = 4 * 64 * 2**15 * 4
    plain = jax.jit(jax.grad(lambda s, h: plain_loss(s, h, targets), (0, 1))).lower(states, head).compile()
    memory, plain_memory = compiled.memory_analysis(), plain.memory_analysis()
    assert memory is not None
    assert plain_memory is not None
    assert plain_memory.temp_size_in_bytes >= all_logits
    assert memory.temp_size_in_bytes <= 4 * loss._CHUNK_BYTES


# Balance losses


def routing_of(ids, scores) -> dict[int, Routing]:
    scores = jnp.asarray(scores, jnp.float32)
    ids = jnp.asarray(ids)
    return {1: Routing(jnp.take_along_axis(scores, ids, axis=-1), ids, scores)}


def random_routing(B: int = 2, T: int = 6, E: int = 8, A: int = 3) -> dict[int, Routing]:
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(1), (B, T, E)))
    return routing_of(jax.lax.top_k(scores, A)[1], scores)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_device_level_loss_is_the_papers(groups: int):
    routed = random_routing()[1]
    ids, scores = np.asarray(routed.ids).reshape(-1, 3), np.asarray(routed.scores).reshape(-1, 8)
    f = np.array([(ids == e).sum() for e in range(8)]) * 8 / (3 * len(ids))
    P = scores.mean(axis=0)
    width = 8 // groups
    want = sum(f[d * width :][:width].mean() * P[d * width :][:width].sum() for d in range(groups))

    got = loss.device_balance_loss({1: routed}, groups, 0.05)

    assert float(got[1]) == pytest.approx(0.05 * want, rel=1e-5)


def test_groups_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ValueError, match="groups must divide 8 experts, got 3"):
        loss.device_balance_loss(random_routing(), 3, 0.05)


@pytest.mark.parametrize("seq_aux", [True, False], ids="seq_aux={}".format)
def test_padding_that_does_not_count_changes_nothing(seq_aux: bool):
    config = tiny(seq_aux=seq_aux)
    routed = random_routing(B=1)[1]
    padded = Routing(*(jnp.pad(x, ((0, 0), (0, 4), (0, 0))) for x in routed[:3]))
    counted = (jnp.arange(10) < 6)[None, :]

    alone, among_padding = balance_loss(config, {1: routed}), balance_loss(config, {1: padded}, counted)

    assert float(among_padding[1]) == pytest.approx(float(alone[1]), rel=1e-6)
    assert float(loss.device_balance_loss({1: padded}, 2, 1.0, counted)[1]) == pytest.approx(
        float(loss.device_balance_loss({1: routed}, 2, 1.0)[1]), rel=1e-6
    )
