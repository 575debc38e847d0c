"""Switching experts off at inference, and hash routing, against the NumPy reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.convert.param_mapping import hf_names
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.layers.router import hash_experts
from dsmoe_jax.model import DeepSeekMoE, _forward, count_tensors, split
from tests.helpers import golden, reference
from tests.helpers.hf_folder import tiny
from tests.helpers.small import SMALL, small_model

LOGITS = 1e-4  # absolute, on logits of rms 2
ABLATIONS = {
    "none": Ablation(),
    "top expert": Ablation(disable_top=1),
    "top three, one active": Ablation(disable_top=3, active=1),
    "all active": Ablation(active=8),
    "no shared, one more": Ablation(shared=False),
    "no shared, as many": Ablation(shared=False, active=2),
    "two experts": Ablation(disabled=(0, 5)),
    "experts of a layer": Ablation(disabled={2: (1, 2, 3)}, disable_top=2),
}


@pytest.mark.parametrize("case", ["a_baseline", pytest.param("b_norm_topk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_equal_the_reference(case: str, name: str):
    model, ablation = golden.model(case), ABLATIONS[name]
    ids = golden.tensors(case)["in.input_ids"][:, :12]

    got = model(ids, ablation=ablation)

    want = reference.forward(model, ids, ablation=ablation)
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=LOGITS)
    for layer, chosen in want.chosen.items():
        np.testing.assert_array_equal(got.routing[layer].ids, chosen)


def test_without_an_ablation_the_program_is_the_same():
    model, ids = small_model(), np.arange(12).reshape(2, 6)
    plain, ablated = (split(one)[0] for one in (model, model.ablated(Ablation())))
    operands = split(model)[1], ids, np.ones_like(ids), np.arange(12).reshape(2, 6) % 6

    texts = [_forward.lower(graph, *operands, False).as_text() for graph in (plain, ablated)]

    assert texts[0] == texts[1]
    assert plain == ablated


def test_an_ablated_model_shares_its_weights():
    model = small_model()
    ablated = model.ablated(Ablation(disable_top=1))

    assert all(one is other for one, other in zip(split(model)[1].values(), split(ablated)[1].values(), strict=True))
    ids = np.arange(6)[None]
    assert np.abs(ablated(ids).logits - model(ids).logits).max() > 0.01
    np.testing.assert_array_equal(model(ids).logits, small_model()(ids).logits)


def test_layers_of_different_experts_are_not_scanned():
    model, ids = DeepSeekMoE.init(dataclasses.replace(SMALL, num_hidden_layers=3)), jnp.arange(6)[None]

    for disabled in ((0,), {}):
        model.ablated(Ablation(disabled=disabled)).hidden(ids, scan_layers=True)
    with pytest.raises(DSMoEError, match="scan_layers needs equal layers"):
        model.ablated(Ablation(disabled={2: (0,)})).hidden(ids, scan_layers=True)


def test_an_ablated_model_generates():
    model = small_model().ablated(Ablation(shared=False, disable_top=1))

    output = Generator(model)([[3, 5, 7]], max_new_tokens=6, ignore_eos=True)[0]

    ids = [3, 5, 7, *output.token_ids]
    logits = reference.forward(small_model(), [ids], ablation=Ablation(shared=False, disable_top=1)).logits[0]
    assert output.token_ids == logits[2:-1].argmax(axis=-1).tolist()


@pytest.mark.parametrize(
    ("ablation", "message"),
    {
        "too many": (Ablation(active=5), "5 experts are active, but layer 1 has 4 of 4 left"),
        "too few left": (
            Ablation(disable_top=2, disabled=(0,)),
            "2 experts are active, but layer 1 has 1 of 4 left",
        ),
        "unknown expert": (Ablation(disabled=(4,)), "ablation.disabled: layer 1 has experts 0 to 3, got 4"),
        "dense layer": (Ablation(disabled={0: (1,)}), "ablation.disabled names layer 0; MoE layers are 1 to 1"),
    }.values(),
)
def test_impossible_ablations_are_rejected(ablation: Ablation, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        small_model().ablated(ablation)


@pytest.mark.parametrize(
    ("fields", "message"),
    {
        "negative": ({"disable_top": -1}, "ablation.disable_top must be an integer of at least 0, got -1"),
        "no expert": ({"active": 0}, "ablation.active must be an integer of at least 1, got 0"),
        "boolean": ({"disabled": (True,)}, "ablation.disabled must be an integer of at least 0, got True"),
    }.values(),
)
def test_impossible_numbers_are_rejected(fields: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Ablation(**fields)


def test_ablations_are_compared_by_their_experts():
    one = Ablation(active=2, disabled=[3, 1])

    assert one == Ablation(active=2, disabled=(1, 3, 3))
    assert len({one, Ablation(active=2, disabled={1: (0,)}), Ablation()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": None, "num_experts_per_tok": None, "n_shared_experts": None}, "needs a model with"),
        ({"n_shared_experts": None}, "the model has no shared experts"),
    ],
)
def test_models_without_such_experts_are_rejected(changes: dict, message: str):
    model = jax.eval_shape(lambda: DeepSeekMoE.init(dataclasses.replace(SMALL, **changes)))

    with pytest.raises(ValueError, match=message):
        model.ablated(Ablation(shared=False))


HASH = {"num_experts_per_tok": 1, "aux_loss_alpha": 0.0, "extra": {"topk_method": "hash"}}


def test_hash_routing_equals_the_reference():
    model = reference.random_model(tiny(**HASH))
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(2, 9))

    got, want = model(ids), reference.forward(model, ids)

    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=LOGITS)
    for layer, chosen in want.chosen.items():
        np.testing.assert_array_equal(got.routing[layer].ids, chosen)
        np.testing.assert_array_equal(got.routing[layer].weights, 1)


def test_hash_routing_spreads_tokens_differently_in_each_layer():
    first, second = (np.asarray(hash_experts(jnp.arange(4096)[None], layer, 8)).ravel() for layer in (1, 2))

    assert all(np.bincount(one, minlength=8).min() > 400 for one in (first, second))  # 512 on average
    assert 0.05 < (first == second).mean() < 0.2


def test_hash_routing_has_no_router_and_no_other_top_k():
    config = tiny(**HASH)
    params = split(reference.random_model(config))[1]

    assert not [name for name in params if "router" in name]
    assert len(params) == count_tensors(config)
    with pytest.raises(ValueError, match="topk_method 'hash' needs num_experts_per_tok 1"):
        tiny(**HASH | {"num_experts_per_tok": 2})
    with pytest.raises(ValueError, match="topk_method 'hash' is for pretraining here"):
        hf_names(config)
    with pytest.raises(ValueError, match="ablation needs a router"):
        reference.random_model(config).ablated(Ablation(active=2))
