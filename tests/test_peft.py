"""The files of the peft library without it: what a config matches, by literal expectations, and what is refused.

Start at `test_a_list_matches_the_ends_of_paths`. `test_peft_library.py` holds the same rules against peft itself.
"""

import dataclasses
import json
import math
import os
import pickle
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
from dsmoe_jax.convert.peft_matching import RELEASES, MatchingRules, make_plan, modules
from dsmoe_jax.lora import PROJECTIONS, LoraConfig
from tests.helpers.adapters import random_adapter
from tests.helpers.hf_folder import edit, tiny
from tests.helpers.hostile import called, zip_file

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # it keeps nothing, but makes a folder

MODEL = tiny(num_hidden_layers=3, n_routed_experts=4)  # layer 0 is dense, 1 and 2 are MoE layers
OLD, NEW = RELEASES[0, 13], RELEASES[0, 20]
every_release = pytest.mark.parametrize("rules", RELEASES.values(), ids=map(str, RELEASES))


def ranks(config: LoraConfig, rules: MatchingRules | None = None) -> dict[str, int]:
    """The adapted modules by their paths below `model.`."""
    plan = make_plan(config, MODEL, rules=rules)
    paths = modules(MODEL)
    return {
        path.removeprefix("model."): rank
        for name, target in plan.targets.items()
        for path, rank in zip(paths[name], target.ranks, strict=True)
        if rank
    }


def scales(config: LoraConfig, rules: MatchingRules | None = None) -> dict[str, float]:
    plan, paths = make_plan(config, MODEL, rules=rules), modules(MODEL)
    return {
        path.removeprefix("model."): scale
        for name, target in plan.targets.items()
        for path, scale in zip(paths[name], target.scales, strict=True)
        if scale
    }


# --- what is adapted ---

ATTENTION = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj")
UP = (
    "layers.0.mlp.up_proj",
    *(f"layers.1.mlp.experts.{e}.up_proj" for e in range(4)),
    "layers.1.mlp.shared_experts.up_proj",
    *(f"layers.2.mlp.experts.{e}.up_proj" for e in range(4)),
    "layers.2.mlp.shared_experts.up_proj",
)


@every_release
@pytest.mark.parametrize(
    ("target", "paths"),
    [
        (("q_proj",), ATTENTION),
        (("self_attn.q_proj",), ATTENTION),
        (("up_proj",), UP),
        (("mlp.up_proj",), UP[:1]),
        (("experts.3.up_proj",), (UP[4], UP[9])),
        (("model.layers.2.self_attn.q_proj", "q_proj"), ATTENTION),
        (("model.layers.2.self_attn.q_proj",), ATTENTION[2:]),
        (("1.self_attn.q_proj", "shared_experts.up_proj"), (ATTENTION[1], UP[5], UP[10])),
        (r".*mlp\.experts\.\d+\.up_proj", (*UP[1:5], *UP[6:10])),
        (r"model\.layers\.0\.(self_attn\.q|mlp\.up)_proj", (ATTENTION[0], UP[0])),
    ],
    ids=str,
)
def test_a_list_matches_the_ends_of_paths_and_a_string_whole_ones(
    target: Any, paths: tuple[str, ...], rules: MatchingRules
):
    assert set(ranks(LoraConfig(target_modules=target), rules)) == set(paths)


def test_all_linear_is_every_projection_and_neither_router_nor_head():
    every = ranks(LoraConfig(target_modules="all-linear"))

    assert every == ranks(LoraConfig(target_modules=PROJECTIONS))
    assert len(every) == 3 * 4 + 3 + 2 * (4 + 1) * 3


@pytest.mark.parametrize(
    ("config", "rules", "paths"),
    [
        (LoraConfig(target_modules=("up_proj",), layers_to_transform=(1,)), NEW, UP[1:6]),
        # The number that counts is the expert's, and where there is none the layer's.
        (LoraConfig(target_modules=("up_proj",), layers_to_transform=(1,)), OLD, (UP[2], UP[5], UP[7])),
        (LoraConfig(target_modules=("up_proj",), layers_to_transform=(1,), layers_pattern="layers"), None, UP[1:6]),
        (LoraConfig(target_modules=("q_proj",), layers_to_transform=(0, 2)), None, ATTENTION[::2]),
        (LoraConfig(target_modules=("q_proj",), layers_to_transform=()), None, ATTENTION),
        # A whole path is taken without a look at its layer.
        (
            LoraConfig(target_modules=("q_proj", "model.layers.2.self_attn.q_proj"), layers_to_transform=(0,)),
            None,
            ATTENTION[::2],
        ),
    ],
    ids=["newer", "older", "pattern", "attention", "empty", "whole path"],
)
def test_layers_to_transform_choose_by_the_number_that_the_release_looks_at(
    config: LoraConfig, rules: MatchingRules | None, paths: tuple[str, ...]
):
    assert set(ranks(config, rules)) == set(paths)


@pytest.mark.parametrize(
    ("entries", "saved"),
    [
        (("embed_tokens", "lm_head"), {"embed", "head.weight"}),
        (("gate",), {"layers.1.moe.router.weight", "layers.2.moe.router.weight"}),
        (
            ("norm",),
            {"norm.weight", *(f"layers.{i}.{name}_norm.weight" for i in range(3) for name in ("attention", "ffn"))},
        ),
        (
            ("1.mlp",),
            {"layers.1.moe.router.weight"}
            | {f"layers.1.moe.experts.{name}" for name in ("gate", "up", "down")}
            | {f"layers.1.moe.shared.{name}.weight" for name in ("gate", "up", "down")},
        ),
    ],
    ids=["embeddings", "routers", "norms", "feed-forward"],
)
def test_modules_to_save_match_any_end_and_all_that_is_inside(entries: tuple[str, ...], saved: set[str]):
    plan = make_plan(LoraConfig(target_modules=("q_proj",), modules_to_save=entries), MODEL)

    assert set(plan.saved) == saved


# --- ranks and scales ---


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 9), (True, 6 / 3)])
def test_the_scale_is_alpha_over_r_or_over_its_root(rslora: bool, scale: float):
    config = LoraConfig(r=9, lora_alpha=6, target_modules=("q_proj",), use_rslora=rslora)

    assert scales(config) == dict.fromkeys(ATTENTION, pytest.approx(scale))


BOTH: dict[str, Any] = {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"shared_experts.up_proj": 9}}


@pytest.mark.parametrize(
    ("patterns", "rules", "shared", "dense"),
    [
        (BOTH, OLD, (6, 16), (6, 16)),  # the first key of both decides for both
        (BOTH, RELEASES[0, 14], (6, 9), (6, 16)),
        (BOTH, NEW, (6, 9), (6, 16)),
        ({"rank_pattern": {"^model.*shared_experts.up_proj": 6}}, OLD, (8, 16), (8, 16)),
        ({"rank_pattern": {"^model.*shared_experts.up_proj": 6}}, RELEASES[0, 14], (8, 16), (8, 16)),
        ({"rank_pattern": {"^model.*shared_experts.up_proj": 6}}, RELEASES[0, 15], (6, 16), (8, 16)),
        ({"rank_pattern": {"(model.layers.0.mlp.up_proj)": 6}}, OLD, (8, 16), (8, 16)),  # a dot must come before it
        ({"rank_pattern": {"(model.layers.0.mlp.up_proj)": 6}}, NEW, (8, 16), (6, 16)),
        ({"rank_pattern": {"model.layers.0.mlp.up_proj": 6}}, None, (8, 16), (6, 16)),  # but for a path as it is
        ({"alpha_pattern": {"mlp|x": 4}}, OLD, (8, 4), (8, 4)),  # .*\.mlp or x$
        ({"alpha_pattern": {"mlp|x": 4}}, NEW, (8, 16), (8, 16)),
        ({"rank_pattern": {"up_proj": 6, "(mlp.up_proj)": 2}}, None, (6, 16), (6, 16)),  # the first of several
        ({"rank_pattern": {"(mlp.up_proj)": 2, "up_proj": 6}}, None, (6, 16), (2, 16)),
        ({"rank_pattern": {"(u._proj)": 2}, "alpha_pattern": {"(u._proj)": 3}}, None, (2, 3), (2, 3)),
    ],
)
def test_the_first_key_that_matches_gives_r_and_alpha_by_the_rule_of_the_release(
    patterns: dict[str, Any], rules: MatchingRules | None, shared: tuple[int, float], dense: tuple[int, float]
):
    config = LoraConfig(r=8, lora_alpha=16, target_modules=("up_proj",), **patterns)

    rank, scale = ranks(config, rules), scales(config, rules)

    for path, (r, alpha) in ((UP[5], shared), (UP[0], dense)):
        assert (rank[path], scale[path]) == (r, pytest.approx(alpha / r))


@pytest.mark.parametrize(
    "options",
    [
        BOTH,
        {"rank_pattern": {"^model.*shared_experts.up_proj": 6}},
        {"alpha_pattern": {"q_proj|up_proj": 9}},
        {"layers_to_transform": (1,)},
    ],
    ids=str,
)
def test_what_releases_read_differently_is_neither_trained_nor_written(tmp_path: Path, options: dict[str, Any]):
    config = LoraConfig(target_modules=("up_proj", "q_proj"), **options)

    with pytest.raises(ValueError, match=r"^releases of peft disagree on model\.layers\.\d\.[\w.]+, or .*") as refused:
        write_adapter(tmp_path / "adapter", config, MODEL, {})

    assert "\n" not in str(refused.value)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("fields", "release"),
    [
        ({}, (0, 13)),
        ({"exclude_modules": None}, (0, 14)),
        ({"exclude_modules": None, "corda_config": None}, (0, 15)),
        ({"exclude_modules": None, "corda_config": None, "peft_version": "0.18.0"}, (0, 15)),
        ({"peft_version": "0.20.0"}, (0, 20)),
        ({"peft_version": "0.21.3.dev0@1a2b3c"}, (0, 20)),
        ({"peft_version": "1.0"}, (0, 20)),
    ],
    ids=str,
)
def test_a_file_is_read_by_the_rules_of_the_release_that_wrote_it(
    tmp_path: Path, fields: dict[str, Any], release: tuple[int, int]
):
    patterns: dict[str, Any] = {
        "rank_pattern": {"up_proj": 6},
        "alpha_pattern": {"shared_experts.up_proj": 9, "q|up_proj": 3},
    }
    asked = {"layers_to_transform": [1], "target_modules": ["up_proj"], **patterns, **fields}
    config = LoraConfig(lora_alpha=16, target_modules=("up_proj",), layers_to_transform=(1,), **patterns)
    plans = {since: make_plan(config, MODEL, rules=rules) for since, rules in RELEASES.items()}
    write_plan(tmp_path, plans[release], asked)

    adapter = read_adapter(tmp_path, MODEL)

    assert [since for since, plan in plans.items() if plan == adapter.plan] == [release]


def write_plan(folder: Path, plan: lora.Plan, fields: dict[str, Any]) -> None:
    """An adapter of ones as some release might have written it."""
    paths, shapes = modules(MODEL), {name: spec.shape for name, spec in lora.specs(plan, MODEL).items()}
    tensors = {}
    for name, target in plan.targets.items():
        into, out = shapes[name + lora.LORA_A][-1], shapes[name + lora.LORA_B][-2]
        for path, r in zip(paths[name], target.ranks, strict=True):
            if r:
                tensors[f"base_model.model.{path}.lora_A.weight"] = np.ones((r, into), np.float32)
                tensors[f"base_model.model.{path}.lora_B.weight"] = np.ones((out, r), np.float32)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | fields))


# --- what is in the arrays ---

SOME = LoraConfig(
    r=4,
    target_modules=(r"experts.1.up_proj", "experts.3.up_proj", "q_proj"),
    rank_pattern={"(experts.3.up_proj)": 2},
    alpha_pattern={"(experts.3.up_proj)": 2},
)
STACK = "layers.1.moe.experts.up"


def drawn(config: LoraConfig) -> dict[str, np.ndarray]:
    return random_adapter(make_plan(config, MODEL), MODEL)


def test_experts_that_are_not_adapted_are_not_written_and_ranks_differ_within_a_stack(tmp_path: Path):
    params = drawn(SOME)

    write_adapter(tmp_path / "adapter", SOME, MODEL, params)

    held = load_file(tmp_path / "adapter" / WEIGHTS)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    assert {name: tensor.shape for name, tensor in held.items() if name.startswith(prefix)} == {
        f"{prefix}.1.up_proj.lora_A.weight": (4, 32),
        f"{prefix}.1.up_proj.lora_B.weight": (16, 4),
        f"{prefix}.3.up_proj.lora_A.weight": (2, 32),
        f"{prefix}.3.up_proj.lora_B.weight": (16, 2),
    }
    again = read_adapter(tmp_path / "adapter", MODEL)
    assert again.plan.targets[STACK] == lora.Target((0, 4, 0, 2), (0.0, 8.0, 0.0, 1.0))
    assert again.params.keys() == params.keys()
    assert all((again.params[name] == value).all() for name, value in params.items())
    assert lora.count(again.plan, MODEL) == sum(tensor.size for tensor in held.values())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_as_fp32(tmp_path: Path, dtype: Any):
    params = drawn(SOME)
    write_adapter(tmp_path / "adapter", SOME, MODEL, params)
    rewrite(tmp_path / "adapter", lambda name, tensor: tensor.astype(dtype))

    read = read_adapter(tmp_path / "adapter", MODEL).params

    for name, value in params.items():
        assert read[name].dtype == np.float32
        assert (read[name] == value.astype(dtype)).all()


def test_a_router_saved_whole_beside_adapted_gate_projections_is_read(tmp_path: Path):
    """peft 0.13.2 writes this right and loses the adapters on reading: "gate" is in "gate_proj"."""
    config = LoraConfig(target_modules=("gate_proj",), modules_to_save=("gate",))
    params = drawn(config)
    write_adapter(tmp_path / "adapter", config, MODEL, params)

    read = read_adapter(tmp_path / "adapter", MODEL)

    assert read.plan.saved == ("layers.1.moe.router.weight", "layers.2.moe.router.weight")
    assert len(read.plan.targets) == 5
    assert read.params.keys() == params.keys()
    assert all((read.params[name] == value).all() for name, value in params.items())


@pytest.mark.parametrize("listed", [True, False])
def test_embeddings_that_are_not_listed_are_read_and_listed_ones_only_once(tmp_path: Path, listed: bool):
    config = LoraConfig(target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    write_adapter(tmp_path / "adapter", config, MODEL, drawn(config))
    if not listed:
        edit(CONFIG, lambda fields: fields.update(modules_to_save=None))(tmp_path / "adapter")

    read = read_adapter(tmp_path / "adapter", MODEL)

    assert read.plan.saved == ("embed", "head.weight")
    assert read.config == config


def rewrite(folder: Path, change: Callable[[str, np.ndarray], np.ndarray | None]) -> None:
    """The file again, each tensor changed, or left out where the change is None."""
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
def test_a_neutral_value_is_read_as_if_it_were_absent(tmp_path: Path, name: str):
    write_adapter(tmp_path / "adapter", GOOD, MODEL, drawn(GOOD))
    edit(CONFIG, lambda old: old.update(NEUTRAL if name == "all of them" else {name: NEUTRAL[name]}))(
        tmp_path / "adapter"
    )

    assert read_adapter(tmp_path / "adapter", MODEL).config == GOOD


@pytest.mark.parametrize(
    ("field", "default"),
    [("lora_alpha", 8), ("r", 8), ("lora_dropout", 0.0), ("use_rslora", False), ("bias", None), ("rank_pattern", {})],
)
def test_an_absent_field_means_what_the_library_means(tmp_path: Path, field: str, default: Any):
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, use_rslora=True, target_modules=("q_proj",))
    write_adapter(tmp_path / "adapter", config, MODEL, drawn(config))
    edit(CONFIG, lambda old: old.pop(field))(tmp_path / "adapter")

    read = read_adapter(tmp_path / "adapter", MODEL)

    assert read.config == (config if default is None else dataclasses.replace(config, **{field: default}))
    if field == "lora_alpha":
        assert set(scales(read.config).values()) == {8 / math.sqrt(8)}


# --- what is refused ---

Spoil = Callable[[Path], Any]
GOOD = LoraConfig(r=2, target_modules=("q_proj", "experts.1.up_proj"))
A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight" for end in "AB")


def says(**fields: Any) -> Spoil:
    return edit(CONFIG, lambda old: old.update(fields))


def tensors(**changes: np.ndarray | None) -> Spoil:
    """The adapter's first A and B, or a tensor of another name, changed."""
    named = {{"A": A, "B": B}.get(name, name): tensor for name, tensor in changes.items()}

    def spoil(folder: Path) -> None:
        held = load_file(folder / WEIGHTS) | named
        save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS)

    return spoil


def instead(file: str, data: bytes, name: str | None = None) -> Spoil:
    """Another file in its place."""

    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        (folder / (name or file)).write_bytes(data)

    return spoil


def linked_away(file: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / file).rename(folder.parent / "elsewhere")
        (folder / file).symlink_to(folder.parent / "elsewhere")

    return spoil


ZEROS = np.zeros((2, 32), np.float32)
ATTACK = zip_file(called("os", "system"))
BAD: dict[str, tuple[Spoil, str]] = {
    # tensors
    "missing": (tensors(A=None), rf"tensor {A} is missing$"),
    "several missing": (tensors(A=None, B=None), rf"tensor {A} is missing \(and 1 more\)$"),
    "surplus": (tensors(extra=ZEROS), "tensor extra belongs to no part of this adapter of this base"),
    "another adapter's name": (
        tensors(**{A: None, A.replace(".weight", ".default.weight"): ZEROS}),
        r"lora_A\.default\.weight belongs to no part",
    ),
    "bias": (tensors(**{"base_model.model.model.layers.0.self_attn.q_proj.bias": ZEROS[0]}), "belongs to no part"),
    "another base": (tensors(A=np.zeros((2, 64), np.float32)), r"has shape \[2, 64\], rank and base .* \[2, 32\]$"),
    "turned": (tensors(A=ZEROS.T.copy()), r"has shape \[32, 2\], rank and base ask for \[2, 32\]$"),
    "another rank": (says(r=3), r"has shape \[2, 32\], rank and base ask for \[3, 32\]$"),
    "a huge rank": (says(r=10**15), r"rank and base ask for \[1000000000000000, 32\]$"),
    "integers": (tensors(A=np.zeros((2, 32), np.int8)), "has dtype 'I8'; weights are F32, F16 or BF16"),
    "float64": (tensors(A=np.zeros((2, 32))), "has dtype 'F64'; weights are F32, F16 or BF16"),
    # what adapters may be, but not here
    "another kind": (says(peft_type="IA3"), "peft_type 'IA3' is not supported, only 'LORA'"),
    "another task": (says(task_type="SEQ_CLS"), "task_type 'SEQ_CLS' is not supported"),
    "DoRA": (says(use_dora=True), "'use_dora' True is not supported"),
    "bias trained": (says(bias="lora_only"), "bias 'lora_only' is not supported, only 'none'"),
    "bias of B": (says(lora_bias=True), "'lora_bias' True is not supported"),
    "turned weights": (says(fan_in_fan_out=True), "'fan_in_fan_out' True is not supported"),
    "layers again": (says(layer_replication=[[0, 2], [1, 3]]), "'layer_replication' .* is not supported"),
    "parameters": (says(target_parameters=["mlp.experts.up"]), "'target_parameters' .* is not supported"),
    "excluded": (says(exclude_modules=["0.q_proj"]), "'exclude_modules' .* is not supported"),
    "tokens": (says(trainable_token_indices=[1, 2]), "'trainable_token_indices' .* is not supported"),
    "aLoRA": (says(alora_invocation_tokens=[1]), "'alora_invocation_tokens' .* is not supported"),
    "pissa": (says(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' changes the base's weights"),
    "olora": (says(init_lora_weights="olora"), "init_lora_weights 'olora' changes the base's weights"),
    "unknown": (says(colour="blue"), "'colour' 'blue' is not supported"),
    "unknown, of two lines": (says(**{"a\nb": "c\nd"}), r"'a\\nb' 'c\\nd' is not supported"),
    # values
    "r as a string": (says(r="8"), "r '8' is not understood"),
    "r = 0": (says(r=0), "r must be a whole number of at least 1, not 0"),
    "r = 2.5": (says(r=2.5), "r must be a whole number of at least 1, not 2.5"),
    "r = true": (says(r=True), "r True is not understood"),
    "a rank of 0": (says(rank_pattern={"q_proj": 0}), "rank_pattern 'q_proj' must be a whole number of at least 1"),
    "alpha = nan": (says(lora_alpha=math.nan), "lora_alpha nan is not understood"),
    "alpha = inf": (says(alpha_pattern={"q_proj": math.inf}), "alpha_pattern .* is not understood"),
    "alpha too large": (says(lora_alpha=1e300), "lora_alpha must be a finite number, at most 1e"),
    "alpha = null": (says(lora_alpha=None), "lora_alpha None is not understood"),
    "r = null": (says(r=None), "r None is not understood"),
    "target = null": (says(target_modules=None), "target_modules None is not understood"),
    "target absent": (edit(CONFIG, lambda old: old.pop("target_modules")), "target_modules is missing"),
    "all dropped": (says(lora_dropout=1.0), "lora_dropout must be at least 0 and below 1, not 1.0"),
    "rslora as a string": (says(use_rslora="yes"), "use_rslora 'yes' is not understood"),
    "version": (says(peft_version="new"), "peft_version 'new' is not understood"),
    "base": (says(base_model_name_or_path=["x"]), "base_model_name_or_path .* is not understood"),
    # modules
    "nothing": (says(target_modules=["query"]), r"target_modules \('query',\) match no module of this model"),
    "no target": (says(target_modules=[]), r"target_modules \(\) match no module of this model"),
    "regex of nothing": (says(target_modules="q_proj"), "target_modules 'q_proj' match no module of this model"),
    "bad regex": (says(target_modules="(q_proj"), r"target_modules: '\(q_proj' is no regular expression \('missing \)"),
    "bad regex of two lines": (says(target_modules="(?\n)"), r"is no regular expression \('unknown extension \?\\n"),
    "endless repeat": (says(target_modules="q{99999999999}"), "is no regular expression"),
    "bad key": (says(rank_pattern={"(": 2}), r"rank_pattern: .* is no regular expression"),
    "bad layers": (says(layers_to_transform=[1], layers_pattern="["), "layers_pattern: .* is no regular expression"),
    "layers of a regex": (
        says(target_modules=".*q_proj", layers_to_transform=[1]),
        "layers_to_transform goes with a list of target_modules",
    ),
    "layers' name alone": (says(layers_pattern="layers"), "layers_pattern goes with layers_to_transform"),
    "embedding": (
        says(target_modules=["embed_tokens"]),
        r"target_modules: model\.embed_tokens cannot be adapted, only",
    ),
    "head": (says(target_modules=["q_proj", "lm_head"]), "target_modules: lm_head cannot be adapted, only q_proj"),
    "router": (says(target_modules=["gate"]), r"target_modules: model\.layers\.1\.mlp\.gate cannot be adapted"),
    "twice": (says(modules_to_save=["q_proj"]), r"0\.self_attn\.q_proj is both in target_modules and in modules_to_"),
    "an expert whole": (says(modules_to_save=["experts.0"]), "some experts of .* alone cannot be saved whole"),
    # files
    "no config": (lambda folder: (folder / CONFIG).unlink(), rf"no adapter \(no {CONFIG}\)"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights; looked for adapter_model"),
    "no JSON": (instead(CONFIG, b"{"), "is not JSON"),
    "a list": (instead(CONFIG, b"[]"), "holds a list where a JSON object must be"),
    "no safetensors": (instead(WEIGHTS, b"{}"), "header"),
    "config elsewhere": (linked_away(CONFIG), "links to .*, outside the checkpoint"),
    "weights elsewhere": (linked_away(WEIGHTS), "links to .*, outside the checkpoint"),
    "a pickle that runs": (instead(WEIGHTS, ATTACK, "adapter_model.bin"), "system"),
    "a bare pickle": (instead(WEIGHTS, pickle.dumps({"a": 1}), "adapter_model.bin"), "adapter_model.bin: "),
}


@pytest.mark.parametrize(("spoil", "line"), BAD.values(), ids=BAD)
def test_what_is_not_understood_is_refused_in_one_line(
    tmp_path: Path, spoil: Spoil, line: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    folder = tmp_path / "adapter"
    write_adapter(folder, GOOD, MODEL, drawn(GOOD))
    spoil(folder)

    with pytest.raises(ValueError, match=line) as refused:
        read_adapter(folder, MODEL)

    assert str(refused.value).startswith(str(folder))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"target_modules": ("q_proj", "qproj")}, "'qproj' matches no module of this model"),
        ({"modules_to_save": ("head_lm",)}, "'head_lm' matches no module of this model"),
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": 10**400}, "r must be a whole number of at least 1, not an integer of 1329 bits"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a finite number, at most 1e\\+30, not inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, at most 1e\\+30, not an integer of 1329 bits"),
        ({"alpha_pattern": {"x": math.nan}}, "alpha_pattern 'x' must be a finite number, at most 1e\\+30, not nan"),
        ({"lora_dropout": -0.1}, "lora_dropout must be at least 0 and below 1, not -0.1"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_it_is(changes: dict[str, Any], line: str):
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
    write_adapter(folder, GOOD, MODEL, drawn(GOOD))
    return folder, json.loads((folder / CONFIG).read_text())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of odd regular expressions
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS | st.text(max_size=8), VALUES, min_size=1, max_size=3))
@example(changes={"r": 10**30, "rank_pattern": {"(q_proj": 1}})
@example(changes={"layers_to_transform": [0], "layers_pattern": "(layers)"})
def test_any_config_is_read_or_refused_in_one_line(good: tuple[Path, dict[str, Any]], changes: dict[str, Any]):
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
