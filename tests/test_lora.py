"""LoRA adapters compared with peft on the original model, and with merged weights.

Start at `test_logits_with_an_adapter_equal_pefts`. The case `lora_all` adapts every projection of `a_baseline`; a
smaller model covers meshes, quantized bases, dropout and per-matrix ranks.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsmoe_jax import lora
from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.convert import peft
from dsmoe_jax.convert.merging import merge_to
from dsmoe_jax.convert.param_mapping import export_order
from dsmoe_jax.convert.peft_matching import make_plan, modules, untied_config
from dsmoe_jax.generate import Generator
from dsmoe_jax.kernels.operand import Quantized
from dsmoe_jax.loading import load
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import assemble, merge, shardings, split
from dsmoe_jax.quantize import quantize_params
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.train import balance_loss, cross_entropy
from tests.helpers import golden
from tests.helpers.adapters import random_adapter
from tests.helpers.hf_folder import make_tokenizer, tiny
from tests.helpers.meshes import MESHES, on_mesh
from tests.helpers.reference import random_model

GRADIENT = 1e-3  # relative L2 of a tensor
STEPPED = 2e-4  # absolute, after five steps of up to 1e-3 each
CURVE = 1e-3  # relative
SAME = 1e-5  # relative to the largest value: the same sums in another order


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
    ce = cross_entropy(model.logits(hidden.last_hidden_state), jnp.asarray(case["tensors"]["in.train.labels"]))
    aux = balance_loss(case["config"], hidden.routing)
    return ce + sum(aux.values()), (ce, aux)


@pytest.fixture(scope="module")
def step(case: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
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


def test_merged_weights_equal_pefts(case: dict[str, Any]):
    merged = jax.jit(partial(lora.merge, case["adapter"].plan))(case["base"], case["adapter"].params)

    logits = assemble(case["config"], merged)(case["tensors"]["in.input_ids"]).logits

    names = {name: (ours, e) for name, ours, e in export_order(case["config"])}
    merged_names = [name for name in case["tensors"] if name.startswith("merged.weight.")]
    assert merged_names
    for name in merged_names:
        ours, e = names[name.removeprefix("merged.weight.")]
        got = merged[ours] if e is None else merged[ours][e]
        np.testing.assert_allclose(got, case["tensors"][name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(logits, case["tensors"]["merged.logits"], rtol=0, atol=golden.LOGITS)
    largest = max(float(jnp.abs(merged[n] - case["base"][n]).max()) for n in merged)
    assert largest == pytest.approx(case["expected"]["merged_weight_maxabs_diff_overall"], abs=1e-6)


def test_ranks_and_scales_are_pefts(case: dict[str, Any]):
    plan, expected = case["adapter"].plan, case["expected"]

    paths = {name: modules(case["config"])[name] for name in plan.targets}
    ranks = {
        f"base_model.model.{p}": r for n, t in plan.targets.items() for p, r in zip(paths[n], t.ranks, strict=True)
    }
    scales = {
        f"base_model.model.{p}": s for n, t in plan.targets.items() for p, s in zip(paths[n], t.scales, strict=True)
    }

    assert ranks == expected["rank"]
    assert scales == expected["scaling"]
    assert lora.count(plan, case["config"]) == expected["n_lora"]


def test_losses_and_gradients_equal_pefts(case: dict[str, Any], step: Callable[..., Any]):
    (_, (ce, aux)), grads = step(case["adapter"].params)

    assert abs(ce - case["expected"]["train"]["ce"]) <= 1e-5
    assert {str(layer): pytest.approx(float(loss), abs=1e-6) for layer, loss in aux.items()} == case["expected"][
        "train"
    ]["aux"]
    got = by_peft_name(case, grads)
    assert {f"grad.{name}" for name in got} == {name for name in case["tensors"] if name.startswith("grad.")}
    for name, grad in got.items():
        want = case["tensors"][f"grad.{name}"]
        assert np.linalg.norm(grad - want) <= GRADIENT * np.linalg.norm(want) + 1e-5, name


@pytest.mark.slow
def test_five_steps_of_adamw_equal_pefts(case: dict[str, Any], step: Callable[..., Any]):
    expected = case["expected"]["adamw_curve"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, 0.9, 0.95, 1e-8))
    trained = jax.tree.map(jnp.asarray, case["adapter"].params)
    state, curve = optimizer.init(trained), []

    for _ in range(5):
        (_, (ce, _)), grads = step(trained)
        curve.append(float(ce))
        updates, state = jax.jit(optimizer.update)(grads, state)
        trained = jax.tree.map(jnp.add, trained, updates)

    np.testing.assert_allclose(curve, expected["ce"][:5], rtol=CURVE)
    for name, value in by_peft_name(case, trained).items():
        np.testing.assert_allclose(value, case["tensors"][f"after5.{name}"], rtol=0, atol=STEPPED, err_msg=name)


@pytest.mark.slow
def test_greedy_outputs_equal_pefts(case: dict[str, Any]):
    prompt = case["tensors"]["in.gen.prompt1"].reshape(-1).tolist()

    generator = Generator.from_pretrained(golden.folder("a_baseline"), adapter=case["folder"])
    answer = generator([prompt], max_new_tokens=16, ignore_eos=True)[0]

    assert answer.token_ids == case["expected"]["generation"]["ids"]


def test_writing_and_reading_an_adapter_is_lossless(case: dict[str, Any], tmp_path):
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


# --- a single MoE layer: every projection, of different ranks ---

SMALL = tiny(num_hidden_layers=1, first_k_dense_replace=0)
LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    rank_pattern={r"(experts.[0-3].up_proj)": 2},
    alpha_pattern={r"(experts.[0-3].up_proj)": 6},
    lora_dropout=0.5,
)
SOME = LoraConfig(
    r=4, target_modules=("experts.1.up_proj", "experts.3.up_proj"), rank_pattern={"(experts.3.up_proj)": 2}
)
STACK = "layers.0.moe.experts.up"
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 64, (8, 6)), jnp.int32)


def logits_of(plan: lora.Plan, base: dict[str, Any], adapter: dict[str, Any]) -> Any:
    model = assemble(SMALL, lora.attach(plan, base, adapter))
    return model.logits(model.hidden(IDS).last_hidden_state)


def logits_and_gradients(plan: lora.Plan, base: dict[str, Any], adapter: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    def loss(adapter: dict[str, Any], base: dict[str, Any]) -> tuple[Any, Any]:
        logits = logits_of(plan, base, adapter)
        return cross_entropy(logits, IDS), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter, base)
    return logits, grads


def assert_close(got: Any, want: Any, name: str = "") -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=SAME * np.abs(want).max(), err_msg=name)


@pytest.fixture(scope="module")
def small() -> tuple[lora.Plan, dict[str, Any], dict[str, Any]]:
    """A plan, a base and an adapter."""
    plan = make_plan(LORA, SMALL)
    return plan, split(random_model(SMALL))[1], random_adapter(plan, SMALL)


@pytest.fixture(scope="module")
def alone(small: tuple[lora.Plan, dict[str, Any], dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """The results on one device."""
    return logits_and_gradients(*small)


@pytest.mark.parametrize("mesh", [pytest.param("fsdp=8", marks=pytest.mark.slow), "expert=4,fsdp=2"])
def test_logits_and_gradients_on_a_mesh_equal_one_device(mesh: str, small: Any, alone: Any):
    (plan, base, adapter), (want, want_grads) = small, alone
    places = shardings(SMALL, MESHES[mesh])
    base = {name: jax.device_put(value, places[name]) for name, value in base.items()}

    placed = lora.place(plan, SMALL, adapter, base)
    with on_mesh(mesh):
        logits, grads = logits_and_gradients(plan, base, placed)

    part = {"fsdp=8": (8, 4, 4), "expert=4,fsdp=2": (2, 4, 16)}[mesh]
    assert placed[STACK + lora.LORA_A].sharding.shard_shape((8, 4, 32)) == part
    assert_close(logits, want)
    for name, grad in want_grads.items():
        assert_close(grads[name], grad, name)


@pytest.mark.parametrize("scheme", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_adapters_on_a_quantized_base(scheme: str, small: Any):
    plan, base, adapter = small
    some = {name: base[name] for name in (STACK, "layers.0.attention.q.weight")}  # each is a program to compile
    quantized = base | quantize_params(some, scheme)
    dense = base | {name: lora.merge(lora.Plan({}), {name: quantized[name]}, {})[name] for name in some}

    got, want = (jax.jit(partial(logits_of, plan))(params, adapter) for params in (quantized, dense))

    assert isinstance(quantized[STACK], Quantized)
    assert_close(got, want)
    for name in some:
        alone = lora.Plan({name: plan.targets[name]})
        merged, expected = (lora.merge(alone, {name: params[name]}, adapter)[name] for params in (quantized, dense))
        assert merged.dtype == jnp.float32
        np.testing.assert_array_equal(merged, expected)


def test_dropout_depends_only_on_its_key_and_is_unbiased(small: Any):
    plan, base, adapter = small
    a, keys = adapter[STACK + lora.LORA_A], jax.random.split(jax.random.key(0), 2000)

    def attached(key: Any = None, plan: lora.Plan = plan) -> Any:
        return lora.attach(plan, base, adapter, key)[STACK].a

    dropped, again = (np.asarray(jax.jit(jax.vmap(attached))(keys)) for _ in range(2))

    assert (dropped == again).all()
    assert (dropped[0] != dropped[1]).any()
    assert ((dropped == 0) | (dropped == 2 * a)).all()
    assert np.abs(dropped.mean(axis=0) - a).max() < 0.1 * np.abs(a).max()
    assert (attached() == a).all()
    assert (attached(keys[0], plan._replace(dropout=0.0)) == a).all()


def test_padding_of_ranks_gets_no_gradient(small: Any):
    plan = make_plan(SOME, SMALL)
    adapter, optimizer = random_adapter(plan, SMALL), optax.adamw(1e-2)

    _, grads = logits_and_gradients(plan, small[1], adapter)
    updates, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
    stepped: Any = optax.apply_updates(adapter, updates)

    in_use = np.arange(4) < np.array([0, 4, 0, 2, 0, 0, 0, 0])[:, None]
    for end, axis in ((lora.LORA_A, 2), (lora.LORA_B, 1)):
        assert (np.asarray(grads[STACK + end] != 0).any(axis=axis) == in_use).all()
        assert (np.asarray(stepped[STACK + end] != adapter[STACK + end]).any(axis=axis) == in_use).all()
        assert (np.asarray(stepped[STACK + end] != 0).any(axis=axis) == in_use).all()


def test_a_new_adapter_is_the_identity(small: Any):
    plan, base, _ = small

    fresh = jax.jit(lambda key: lora.init(plan, SMALL, base, key))(jax.random.key(0))

    assert all((value == 0).all() for name, value in fresh.items() if name.endswith(lora.LORA_B))
    assert np.abs(fresh[STACK + lora.LORA_A]).max() <= 32**-0.5
    assert (np.asarray(fresh[STACK + lora.LORA_A] != 0).any(axis=2).sum(axis=1) == [2, 2, 2, 2, 4, 4, 4, 4]).all()


def test_a_single_expert_is_a_stack_too():
    config = dataclasses.replace(SMALL, n_routed_experts=1, num_experts_per_tok=1)
    plan = make_plan(LoraConfig(r=2, target_modules=("up_proj",)), config)
    base, adapter = split(random_model(config))[1], random_adapter(plan, config)

    params = lora.attach(plan, base, adapter)

    assert params[STACK].b.shape == (1, 16, 2)
    assert lora.merge(plan, base, adapter)[STACK].shape == (1, 16, 32)


@pytest.mark.parametrize(
    ("tied", "layout"),
    [
        (False, "native"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, "hf"), (False, "hf"), (True, "native"))),
    ],
)
def test_a_merged_checkpoint_equals_its_adapter(tmp_path: Path, layout: str, tied: bool):
    config = tiny(vocab_size=300, tie_word_embeddings=tied)
    make_tokenizer(tmp_path / "tokenizer", 300)
    save(random_model(config), tmp_path / "base", extra_files=tokenizer_files(tmp_path / "tokenizer"))
    lora_config = LoraConfig(r=2, target_modules=("up_proj", "q_proj"), modules_to_save=("lm_head",))
    params = random_adapter(make_plan(lora_config, config), untied_config(config))
    peft.write_adapter(tmp_path / "adapter", lora_config, config, params)

    said = merge_to(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", layout=layout)

    merged = load(tmp_path / "merged")
    want = peft.attach_adapter(load(tmp_path / "base"), tmp_path / "adapter")(IDS).logits
    assert said == f"Merged {tmp_path / 'adapter'} into {tmp_path / 'base'}: {tmp_path / 'merged'}"
    assert not merged.config.tie_word_embeddings
    np.testing.assert_allclose(merged(IDS).logits, want, rtol=0, atol=golden.LOGITS)
    files = {path.name: path.read_bytes() for path in tokenizer_files(tmp_path / "tokenizer")}
    assert {path.name: path.read_bytes() for path in tokenizer_files(tmp_path / "merged")} == files
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "base", "adapter", "merged"}


def test_a_failed_merge_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match=r"layout must be one of native, hf, got 'pt'"):
        merge_to(golden.folder("a_baseline"), golden.folder("a_baseline"), tmp_path / "out", layout="pt")
    with pytest.raises(ValueError, match=r"not an adapter, adapter_config\.json is missing"):
        merge_to(golden.folder("a_baseline"), golden.folder("a_baseline"), tmp_path / "out")

    assert list(tmp_path.iterdir()) == []
