"""Reading and writing PEFT adapters without the library (test_peft_library.py compares with it)."""

import dataclasses
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.numpy import load_file, save_file

from dsmoe_jax import lora
from dsmoe_jax.convert.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.lora import LoraConfig
from tests.helpers.adapters import MODEL, random_adapter, scales
from tests.helpers.hf_folder import edit
from tests.helpers.hostile import called, zip_file

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # hypothesis creates it even without a database


SOME = LoraConfig(
    r=4,
    target_modules=(r"experts.1.up_proj", "experts.3.up_proj", "q_proj"),
    rank_pattern={"(experts.3.up_proj)": 2},
    alpha_pattern={"(experts.3.up_proj)": 2},
)


STACK = "layers.1.moe.experts.up"


def random_params(config: LoraConfig) -> dict[str, np.ndarray]:
    return random_adapter(make_plan(config, MODEL), MODEL)


def test_only_adapted_experts_are_written_with_their_ranks(tmp_path: Path):
    params = random_params(SOME)

    write_adapter(tmp_path / "adapter", SOME, MODEL, params)

    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    assert {name: tensor.shape for name, tensor in saved.items() if name.startswith(prefix)} == {
        f"{prefix}.1.up_proj.lora_A.weight": (4, 32),
        f"{prefix}.1.up_proj.lora_B.weight": (16, 4),
        f"{prefix}.3.up_proj.lora_A.weight": (2, 32),
        f"{prefix}.3.up_proj.lora_B.weight": (16, 2),
    }
    again = read_adapter(tmp_path / "adapter", MODEL)
    assert again.plan.targets[STACK] == lora.Target((0, 4, 0, 2), (0.0, 8.0, 0.0, 1.0))
    assert again.params.keys() == params.keys()
    assert all((again.params[name] == value).all() for name, value in params.items())
    assert lora.count(again.plan, MODEL) == sum(tensor.size for tensor in saved.values())


@pytest.mark.parametrize("config", [
    LoraConfig(r=4), LoraConfig(r=4, target_modules=r".*\.q_proj", use_rslora=True)
], ids=["list", "regex"])  # fmt: skip
def test_written_adapters_satisfy_the_rules_of_vllm(config: LoraConfig, tmp_path: Path):
    write_adapter(tmp_path / "adapter", config, MODEL, random_params(config))

    fields = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert isinstance(fields["r"], int)
    assert isinstance(fields["lora_alpha"], int | float)
    assert isinstance(fields["target_modules"], list | str)
    assert isinstance(fields["use_rslora"], bool)
    assert (fields["bias"], fields["use_dora"], fields["modules_to_save"]) == ("none", False, None)
    for name in load_file(tmp_path / "adapter" / WEIGHTS):  # base_model.model.PATH.lora_A.weight
        assert re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.[\w.]+_proj\.lora_[AB]\.weight", name), name


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_as_fp32(tmp_path: Path, dtype: Any):
    params = random_params(SOME)
    write_adapter(tmp_path / "adapter", SOME, MODEL, params)
    rewrite(tmp_path / "adapter", lambda name, tensor: tensor.astype(dtype))

    read = read_adapter(tmp_path / "adapter", MODEL).params

    for name, value in params.items():
        assert read[name].dtype == np.float32
        assert (read[name] == value.astype(dtype)).all()


def test_saved_router_with_adapted_gate_proj_is_read(tmp_path: Path):
    """PEFT 0.13.2 writes these adapters but drops them on reading, as "gate" is in "gate_proj"."""
    config = LoraConfig(target_modules=("gate_proj",), modules_to_save=("gate",))
    params = random_params(config)
    write_adapter(tmp_path / "adapter", config, MODEL, params)

    read = read_adapter(tmp_path / "adapter", MODEL)

    assert read.plan.saved == ("layers.1.moe.router.weight", "layers.2.moe.router.weight")
    assert len(read.plan.targets) == 5
    assert read.params.keys() == params.keys()
    assert all((read.params[name] == value).all() for name, value in params.items())


@pytest.mark.parametrize("listed", [True, False])
def test_embeddings_are_read_listed_or_not(tmp_path: Path, listed: bool):
    config = LoraConfig(target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    write_adapter(tmp_path / "adapter", config, MODEL, random_params(config))
    if not listed:
        edit(CONFIG, lambda fields: fields.update(modules_to_save=None))(tmp_path / "adapter")

    read = read_adapter(tmp_path / "adapter", MODEL)

    assert read.plan.saved == ("embed", "head.weight")
    assert read.config == config


def rewrite(folder: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> None:
    """Change each tensor of the file, or drop it if the change is None."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


NEUTRAL = {
    "layers_pattern": [],
    "layers_to_transform": [],
    "modules_to_save": [],
    "exclude_modules": [],
    "rank_pattern": None,
    "alpha_pattern": None,
    "use_rslora": None,
    "lora_dropout": None,
    "use_dora": None,
    "init_lora_weights": None,
    "task_type": None,
    "loftq_config": None,
    "target_parameters": [],
    "trainable_token_indices": {},
    "lora_bias": False,
    "bias": None,
    "r": 2.0,
    "peft_version": "0.18.1.dev0@abc",
}


@pytest.mark.parametrize("name", [*NEUTRAL, "all of them"])
def test_neutral_value_equals_an_absent_field(tmp_path: Path, name: str):
    write_adapter(tmp_path / "adapter", GOOD, MODEL, random_params(GOOD))
    edit(CONFIG, lambda old: old.update(NEUTRAL if name == "all of them" else {name: NEUTRAL[name]}))(
        tmp_path / "adapter"
    )

    assert read_adapter(tmp_path / "adapter", MODEL).config == GOOD


@pytest.mark.parametrize(
    ("field", "default"),
    [("lora_alpha", 8), ("r", 8), ("lora_dropout", 0.0), ("use_rslora", False), ("bias", None), ("rank_pattern", {})],
)
def test_absent_field_has_the_default_of_peft(tmp_path: Path, field: str, default: Any):
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, use_rslora=True, target_modules=("q_proj",))
    write_adapter(tmp_path / "adapter", config, MODEL, random_params(config))
    edit(CONFIG, lambda old: old.pop(field))(tmp_path / "adapter")

    read = read_adapter(tmp_path / "adapter", MODEL)

    assert read.config == (config if default is None else dataclasses.replace(config, **{field: default}))
    if field == "lora_alpha":
        assert set(scales(read.config).values()) == {8 / math.sqrt(8)}


Damage = Callable[[Path], Any]


GOOD = LoraConfig(r=2, target_modules=("q_proj", "experts.1.up_proj"))


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight" for end in "AB")


def patch(**fields: Any) -> Damage:
    return edit(CONFIG, lambda old: old.update(fields))


def tensors(**changes: np.ndarray | None) -> Damage:
    """Change the adapter's first A and B, or another tensor."""
    changed = {{"A": A, "B": B}.get(name, name): tensor for name, tensor in changes.items()}

    def damage(folder: Path) -> None:
        saved = load_file(folder / WEIGHTS) | changed
        save_file({name: tensor for name, tensor in saved.items() if tensor is not None}, folder / WEIGHTS)

    return damage


def instead(file: str, data: bytes, name: str | None = None) -> Damage:
    """Replace a file."""

    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / (name or file)).write_bytes(data)

    return damage


def linked_away(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).rename(folder.parent / "elsewhere")
        (folder / file).symlink_to(folder.parent / "elsewhere")

    return damage


ZEROS = np.zeros((2, 32), np.float32)


ATTACK = zip_file(called("os", "system"))


BAD: dict[str, tuple[Damage, str]] = {
    # tensors
    "missing": (tensors(A=None), rf"tensor {A} is missing$"),
    "several missing": (tensors(A=None, B=None), rf"tensor {A} is missing \(and 1 more\)$"),
    "surplus": (tensors(extra=ZEROS), "unexpected tensor extra: the config does not adapt"),
    "another adapter's name": (
        tensors(**{A: None, A.replace(".weight", ".default.weight"): ZEROS}),
        r"unexpected tensor .*lora_A\.default\.weight",
    ),
    "bias": (
        tensors(**{"base_model.model.model.layers.0.self_attn.q_proj.bias": ZEROS[0]}),
        r"unexpected .*q_proj\.bias",
    ),
    "another base": (tensors(A=np.zeros((2, 64), np.float32)), r"must have shape \[2, 32\], got \[2, 64\]$"),
    "turned": (tensors(A=ZEROS.T.copy()), r"must have shape \[2, 32\], got \[32, 2\]$"),
    "another rank": (patch(r=3), r"must have shape \[3, 32\], got \[2, 32\]$"),
    "a huge rank": (patch(r=10**15), r"must have shape \[1000000000000000, 32\], got"),
    "integers": (tensors(A=np.zeros((2, 32), np.int8)), "has dtype 'I8'; weights are F32, F16 or BF16"),
    "float64": (tensors(A=np.zeros((2, 32))), "has dtype 'F64'; weights are F32, F16 or BF16"),
    # unsupported kinds of adapters
    "another kind": (patch(peft_type="IA3"), "peft_type 'IA3' is not supported, only 'LORA'"),
    "another task": (patch(task_type="SEQ_CLS"), "task_type 'SEQ_CLS' is not supported"),
    "DoRA": (patch(use_dora=True), "'use_dora' True is not supported"),
    "bias trained": (patch(bias="lora_only"), "bias 'lora_only' is not supported, only 'none'"),
    "bias of B": (patch(lora_bias=True), "'lora_bias' True is not supported"),
    "turned weights": (patch(fan_in_fan_out=True), "'fan_in_fan_out' True is not supported"),
    "layers again": (patch(layer_replication=[[0, 2], [1, 3]]), "'layer_replication' .* is not supported"),
    "parameters": (patch(target_parameters=["mlp.experts.up"]), "'target_parameters' .* is not supported"),
    "excluded": (patch(exclude_modules=["0.q_proj"]), "'exclude_modules' .* is not supported"),
    "tokens": (patch(trainable_token_indices=[1, 2]), "'trainable_token_indices' .* is not supported"),
    "aLoRA": (patch(alora_invocation_tokens=[1]), "'alora_invocation_tokens' .* is not supported"),
    "pissa": (patch(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' is not supported"),
    "olora": (patch(init_lora_weights="olora"), "init_lora_weights 'olora' is not supported"),
    "unknown": (patch(colour="blue"), "'colour' 'blue' is not supported"),
    "unknown, of two lines": (patch(**{"a\nb": "c\nd"}), r"'a\\nb' 'c\\nd' is not supported"),
    # values
    "r as a string": (patch(r="8"), "r '8' is not supported"),
    "r = 0": (patch(r=0), "r must be an integer of at least 1, got 0"),
    "r = 2.5": (patch(r=2.5), "r must be an integer of at least 1, got 2.5"),
    "r = true": (patch(r=True), "r True is not supported"),
    "a rank of 0": (patch(rank_pattern={"q_proj": 0}), "rank_pattern 'q_proj' must be an integer"),
    "alpha = nan": (patch(lora_alpha=math.nan), "lora_alpha nan is not supported"),
    "alpha = inf": (patch(alpha_pattern={"q_proj": math.inf}), "alpha_pattern .* is not supported"),
    "alpha too large": (patch(lora_alpha=1e300), "lora_alpha must be a finite number, at most 1e"),
    "alpha = null": (patch(lora_alpha=None), "lora_alpha None is not supported"),
    "r = null": (patch(r=None), "r None is not supported"),
    "target = null": (patch(target_modules=None), "target_modules None is not supported"),
    "target absent": (edit(CONFIG, lambda old: old.pop("target_modules")), "target_modules is missing"),
    "all dropped": (patch(lora_dropout=1.0), "lora_dropout must be in \\[0, 1\\), got 1.0"),
    "rslora as a string": (patch(use_rslora="yes"), "use_rslora 'yes' is not supported"),
    "version": (patch(peft_version="new"), "peft_version 'new' is not supported"),
    "base": (patch(base_model_name_or_path=["x"]), "base_model_name_or_path .* is not supported"),
    # modules
    "nothing": (patch(target_modules=["query"]), r"target_modules \('query',\) match no module of this model"),
    "no target": (patch(target_modules=[]), r"target_modules \(\) match no module of this model"),
    "regex of nothing": (patch(target_modules="q_proj"), "target_modules 'q_proj' match no module of this model"),
    "bad regex": (
        patch(target_modules="(q_proj"),
        r"target_modules: '\(q_proj' is not a regular expression \(.missing",
    ),
    "bad regex of two lines": (
        patch(target_modules="(?\n)"),
        r"is not a regular expression \('unknown extension \?\\n",
    ),
    "endless repeat": (patch(target_modules="q{99999999999}"), "is not a regular expression"),
    "bad key": (patch(rank_pattern={"(": 2}), r"rank_pattern: .* is not a regular expression"),
    "bad layers": (
        patch(layers_to_transform=[1], layers_pattern="["),
        "layers_pattern: .* is not a regular expression",
    ),
    "layers of a regex": (
        patch(target_modules=".*q_proj", layers_to_transform=[1]),
        "layers_to_transform needs a list of target_modules",
    ),
    "layers' name alone": (patch(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    "embedding": (
        patch(target_modules=["embed_tokens"]),
        r"target_modules must match only q_proj, .*, got model\.embed_tokens",
    ),
    "head": (patch(target_modules=["q_proj", "lm_head"]), "target_modules must match only q_proj, .*, got lm_head"),
    "router": (patch(target_modules=["gate"]), r"target_modules must match only .*, got model\.layers\.1\.mlp\.gate"),
    "twice": (patch(modules_to_save=["q_proj"]), r"0\.self_attn\.q_proj is both in target_modules and in modules_to_"),
    "an expert whole": (patch(modules_to_save=["experts.0"]), "modules_to_save must match all experts of .* or none"),
    # files
    "no config": (lambda folder: (folder / CONFIG).unlink(), rf"not an adapter, {CONFIG} is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights; looked for adapter_model"),
    "no JSON": (instead(CONFIG, b"{"), "is not JSON"),
    "a list": (instead(CONFIG, b"[]"), "must be a JSON object, got list"),
    "no safetensors": (instead(WEIGHTS, b"{}"), "header"),
    "config elsewhere": (linked_away(CONFIG), "links to .*, outside the checkpoint"),
    "weights elsewhere": (linked_away(WEIGHTS), "links to .*, outside the checkpoint"),
    "a pickle that runs": (instead(WEIGHTS, ATTACK, "adapter_model.bin"), "system"),
    "a bare pickle": (instead(WEIGHTS, pickle.dumps({"a": 1}), "adapter_model.bin"), "adapter_model.bin: "),
}


@pytest.mark.parametrize(("damage", "line"), BAD.values(), ids=BAD)
def test_unsupported_adapter_is_a_one_line_error(
    tmp_path: Path, damage: Damage, line: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    folder = tmp_path / "adapter"
    write_adapter(folder, GOOD, MODEL, random_params(GOOD))
    damage(folder)

    with pytest.raises(ValueError, match=line) as caught:
        read_adapter(folder, MODEL)

    assert str(caught.value).startswith(str(folder))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"target_modules": ("q_proj", "qproj")}, "'qproj' matches no module of this model"),
        ({"modules_to_save": ("head_lm",)}, "'head_lm' matches no module of this model"),
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 10**400}, "r must be an integer of at least 1, got an integer of 1329 bits"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a finite number, at most 1e\\+30, got inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, at most 1e\\+30, got an integer of 1329 bits"),
        ({"alpha_pattern": {"x": math.nan}}, "alpha_pattern 'x' must be a finite number, at most 1e\\+30, got nan"),
        ({"lora_dropout": -0.1}, "lora_dropout must be in \\[0, 1\\), got -0.1"),
    ],
    ids=str,
)
def test_invalid_config_is_an_error_before_training(changes: dict[str, Any], line: str):
    with pytest.raises(ValueError, match=line):
        make_plan(dataclasses.replace(GOOD, **changes), MODEL)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.sampled_from(["q_proj", "gate", "lm_head", "all-linear", ".*q_proj", "(", "layers", "0.21.2", "none", ""])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


FIELDS = st.sampled_from(
    [field.name for field in dataclasses.fields(LoraConfig)]
    + ["peft_type", "task_type", "bias", "init_lora_weights", "peft_version", "base_model_name_or_path", "use_dora"]
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    write_adapter(folder, GOOD, MODEL, random_params(GOOD))
    return folder, json.loads((folder / CONFIG).read_text())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of unusual regular expressions
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS | st.text(max_size=8), VALUES, min_size=1, max_size=3))
@example(changes={"r": 10**30, "rank_pattern": {"(q_proj": 1}})
@example(changes={"layers_to_transform": [0], "layers_pattern": "(layers)"})
def test_any_config_is_read_or_a_one_line_error(good: tuple[Path, dict[str, Any]], changes: dict[str, Any]):
    folder, fields = good
    (folder / CONFIG).write_text(json.dumps(fields | changes))

    try:
        adapter, line = read_adapter(folder, MODEL), None
    except ValueError as error:
        adapter, line = None, str(error)

    if adapter is None:
        assert line is not None
        assert line.startswith(str(folder))
        assert line.isprintable()
    else:
        assert adapter.params.keys() == lora.specs(adapter.plan, MODEL).keys()
