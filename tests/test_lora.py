"""Low-rank adapters against peft's on the original model, and against a base that they are merged into.

Start at `test_logits_with_an_adapter_equal_pefts`. The case `lora_all` adapts every projection of `a_baseline`.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsmoe_jax import lora
from dsmoe_jax.convert import peft
from dsmoe_jax.convert.names import export_order
from dsmoe_jax.generate import Generator
from dsmoe_jax.model import assemble, merge, split
from dsmoe_jax.train import balance_loss, cross_entropy
from tests.helpers import golden

GRADIENT = 1e-3  # relative L2 of a tensor
STEPPED = 2e-4  # absolute, after five steps of up to 1e-3 each
CURVE = 1e-3  # relative


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    model = golden.model("a_baseline")
    folder = golden.TESTS / "golden" / "lora_all"
    graph, base = split(model)
    return {
        "folder": folder,
        "config": model.config,
        "graph": graph,
        "base": base,
        "adapter": peft.read_adapter(folder, model.config),
        "tensors": golden.load_file(folder / "expected.safetensors"),
        "expected": json.loads((folder / "expected.json").read_text()),
    }


def losses(case: dict[str, Any], trained: dict[str, Any]):
    model = merge(case["graph"], lora.attach(case["adapter"].plan, case["base"], trained))
    hidden = model.hidden(jnp.asarray(case["tensors"]["in.train.input_ids"]))
    ce = cross_entropy(model.logits(hidden.states), jnp.asarray(case["tensors"]["in.train.labels"]))
    aux = balance_loss(case["config"], hidden.routing)
    return ce + sum(aux.values()), (ce, aux)


def differentiate(case: dict[str, Any]):
    return jax.jit(jax.value_and_grad(lambda trained: losses(case, trained), has_aux=True))


def by_peft_name(case: dict[str, Any], trained: dict[str, Any]) -> dict[str, np.ndarray]:
    return peft.to_peft(case["adapter"].plan, case["config"], trained)


def test_logits_with_an_adapter_equal_pefts(case: dict[str, Any]):
    params = lora.attach(case["adapter"].plan, case["base"], case["adapter"].params)

    out = merge(case["graph"], params)(case["tensors"]["in.input_ids"])

    np.testing.assert_allclose(out.logits, case["tensors"]["logits"], rtol=0, atol=golden.LOGITS)
    for layer, routing in out.routing.items():
        ids = routing.ids.reshape(-1, routing.ids.shape[-1])
        assert (ids == case["tensors"][f"router.{layer}.topk_idx"]).all()


def test_merged_weights_are_pefts_bit_for_bit_and_give_the_same_logits(case: dict[str, Any]):
    merged = lora.merge(case["adapter"].plan, case["base"], case["adapter"].params)

    logits = assemble(case["config"], merged)(case["tensors"]["in.input_ids"]).logits

    names = {name: (ours, e) for name, ours, e in export_order(case["config"])}
    kept = [name for name in case["tensors"] if name.startswith("merged.weight.")]
    assert kept
    for name in kept:
        ours, e = names[name.removeprefix("merged.weight.")]
        got = merged[ours] if e is None else merged[ours][e]
        np.testing.assert_allclose(got, case["tensors"][name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits, case["tensors"]["merged.logits"], rtol=0, atol=golden.LOGITS)
    largest = max(float(jnp.abs(merged[n] - case["base"][n]).max()) for n in merged)
    assert largest == pytest.approx(case["expected"]["merged_weight_maxabs_diff_overall"], abs=1e-6)


def test_ranks_and_scales_are_pefts(case: dict[str, Any]):
    plan, expected = case["adapter"].plan, case["expected"]

    paths = {name: peft.modules(case["config"])[name] for name in plan.targets}
    ranks = {
        f"base_model.model.{p}": r for n, t in plan.targets.items() for p, r in zip(paths[n], t.ranks, strict=True)
    }
    scales = {
        f"base_model.model.{p}": s for n, t in plan.targets.items() for p, s in zip(paths[n], t.scales, strict=True)
    }

    assert ranks == expected["rank"]
    assert scales == expected["scaling"]
    assert lora.count(plan, case["config"]) == expected["n_lora"]


def test_losses_and_every_gradient_equal_those_of_the_original(case: dict[str, Any]):
    (_, (ce, aux)), grads = differentiate(case)(case["adapter"].params)

    assert abs(ce - case["expected"]["train"]["ce"]) <= 1e-5
    assert {str(layer): pytest.approx(float(loss), abs=1e-6) for layer, loss in aux.items()} == case["expected"][
        "train"
    ]["aux"]
    got = by_peft_name(case, grads)
    assert {f"grad.{name}" for name in got} == {name for name in case["tensors"] if name.startswith("grad.")}
    for name, grad in got.items():
        want = case["tensors"][f"grad.{name}"]
        assert np.linalg.norm(grad - want) <= GRADIENT * np.linalg.norm(want) + 1e-5, name


def test_five_steps_of_adamw_equal_those_of_the_original(case: dict[str, Any]):
    expected, step = case["expected"]["adamw_curve"], differentiate(case)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, 0.9, 0.95, 1e-8))
    trained = jax.tree.map(jnp.asarray, case["adapter"].params)
    state, curve = optimizer.init(trained), []

    for _ in range(5):
        (_, (ce, _)), grads = step(trained)
        curve.append(float(ce))
        updates, state = optimizer.update(grads, state)
        trained = optax.apply_updates(trained, updates)

    np.testing.assert_allclose(curve, expected["ce"][:5], rtol=CURVE)
    for name, value in by_peft_name(case, trained).items():
        np.testing.assert_allclose(value, case["tensors"][f"after5.{name}"], rtol=0, atol=STEPPED, err_msg=name)


def test_greedy_answers_are_those_of_the_original(case: dict[str, Any]):
    prompt = case["tensors"]["in.gen.prompt1"].reshape(-1).tolist()

    generator = Generator.from_pretrained(golden.folder("a_baseline"), adapter=case["folder"])
    answer = generator([prompt], max_new_tokens=16, ignore_eos=True)[0]

    assert answer.tokens == case["expected"]["generation"]["ids"]


def test_an_adapter_that_is_written_and_read_again_is_the_same(case: dict[str, Any], tmp_path):
    config, params = case["adapter"].config, case["adapter"].params

    peft.write_adapter(tmp_path / "copy", config, case["config"], params, base="a_baseline")
    again = peft.read_adapter(tmp_path / "copy", case["config"])

    fields = [json.loads((folder / peft.CONFIG).read_text()) for folder in (case["folder"], tmp_path / "copy")]
    for one in fields:
        one["target_modules"] = sorted(one["target_modules"])  # peft keeps them as a set
    assert fields[0] == fields[1]
    assert again.plan == case["adapter"].plan
    assert again.base == "a_baseline"
    files = [golden.load_file(folder / peft.WEIGHTS) for folder in (case["folder"], tmp_path / "copy")]
    assert files[0].keys() == files[1].keys()
    assert all((files[0][name] == files[1][name]).all() for name in files[0])
    assert all((again.params[name] == params[name]).all() for name in params)
