"""Matching a LoRA config with the modules of a model, by the rules of PEFT's releases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsmoe_jax import lora
from dsmoe_jax.convert.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from dsmoe_jax.convert.peft_matching import RELEASES, MatchingRules, make_plan, modules
from dsmoe_jax.lora import PROJECTIONS, LoraConfig
from tests.helpers.adapters import MODEL, scales

OLD, NEW = RELEASES[0, 13], RELEASES[0, 20]


every_release = pytest.mark.parametrize("rules", RELEASES.values(), ids=map(str, RELEASES))


def ranks(config: LoraConfig, rules: MatchingRules | None = None) -> dict[str, int]:
    """Return the rank of each adapted module by its path below `model.`."""
    plan = make_plan(config, MODEL, rules=rules)
    paths = modules(MODEL)
    return {
        path.removeprefix("model."): rank
        for name, target in plan.targets.items()
        for path, rank in zip(paths[name], target.ranks, strict=True)
        if rank
    }


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
def test_lists_match_suffixes_and_strings_full_paths(target: Any, paths: tuple[str, ...], rules: MatchingRules):
    assert set(ranks(LoraConfig(target_modules=target), rules)) == set(paths)


def test_all_linear_matches_every_projection():
    every = ranks(LoraConfig(target_modules="all-linear"))

    assert every == ranks(LoraConfig(target_modules=PROJECTIONS))
    assert len(every) == 3 * 4 + 3 + 2 * (4 + 1) * 3


@pytest.mark.parametrize(
    ("config", "rules", "paths"),
    [
        (LoraConfig(target_modules=("up_proj",), layers_to_transform=(1,)), NEW, UP[1:6]),
        # The last number in the path, the expert's if any.
        (LoraConfig(target_modules=("up_proj",), layers_to_transform=(1,)), OLD, (UP[2], UP[5], UP[7])),
        (LoraConfig(target_modules=("up_proj",), layers_to_transform=(1,), layers_pattern="layers"), None, UP[1:6]),
        (LoraConfig(target_modules=("q_proj",), layers_to_transform=(0, 2)), None, ATTENTION[::2]),
        (LoraConfig(target_modules=("q_proj",), layers_to_transform=()), None, ATTENTION),
        # A full path matches in any layer.
        (
            LoraConfig(target_modules=("q_proj", "model.layers.2.self_attn.q_proj"), layers_to_transform=(0,)),
            None,
            ATTENTION[::2],
        ),
    ],
    ids=["newer", "older", "pattern", "attention", "empty", "whole path"],
)
def test_layers_to_transform_by_release(config: LoraConfig, rules: MatchingRules | None, paths: tuple[str, ...]):
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
def test_modules_to_save_match_suffixes_and_submodules(entries: tuple[str, ...], saved: set[str]):
    plan = make_plan(LoraConfig(target_modules=("q_proj",), modules_to_save=entries), MODEL)

    assert set(plan.saved) == saved


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 9), (True, 6 / 3)])
def test_scale_is_alpha_over_r_or_sqrt_r(rslora: bool, scale: float):
    config = LoraConfig(r=9, lora_alpha=6, target_modules=("q_proj",), use_rslora=rslora)

    assert scales(config) == dict.fromkeys(ATTENTION, pytest.approx(scale))


BOTH: dict[str, Any] = {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"shared_experts.up_proj": 9}}


@pytest.mark.parametrize(
    ("patterns", "rules", "shared", "dense"),
    [
        (BOTH, OLD, (6, 16), (6, 16)),  # one key decides for both
        (BOTH, RELEASES[0, 14], (6, 9), (6, 16)),
        (BOTH, NEW, (6, 9), (6, 16)),
        ({"rank_pattern": {"^model.*shared_experts.up_proj": 6}}, OLD, (8, 16), (8, 16)),
        ({"rank_pattern": {"^model.*shared_experts.up_proj": 6}}, RELEASES[0, 14], (8, 16), (8, 16)),
        ({"rank_pattern": {"^model.*shared_experts.up_proj": 6}}, RELEASES[0, 15], (6, 16), (8, 16)),
        ({"rank_pattern": {"(model.layers.0.mlp.up_proj)": 6}}, OLD, (8, 16), (8, 16)),  # requires a dot before it
        ({"rank_pattern": {"(model.layers.0.mlp.up_proj)": 6}}, NEW, (8, 16), (6, 16)),
        ({"rank_pattern": {"model.layers.0.mlp.up_proj": 6}}, None, (8, 16), (6, 16)),  # except for a full path
        ({"alpha_pattern": {"mlp|x": 4}}, OLD, (8, 4), (8, 4)),  # .*\.mlp or x$
        ({"alpha_pattern": {"mlp|x": 4}}, NEW, (8, 16), (8, 16)),
        ({"rank_pattern": {"up_proj": 6, "(mlp.up_proj)": 2}}, None, (6, 16), (6, 16)),  # the first match wins
        ({"rank_pattern": {"(mlp.up_proj)": 2, "up_proj": 6}}, None, (6, 16), (2, 16)),
        ({"rank_pattern": {"(u._proj)": 2}, "alpha_pattern": {"(u._proj)": 3}}, None, (2, 3), (2, 3)),
    ],
)
def test_first_matching_key_gives_r_and_alpha_by_release(
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
def test_config_on_which_releases_disagree_is_an_error(tmp_path: Path, options: dict[str, Any]):
    config = LoraConfig(target_modules=("up_proj", "q_proj"), **options)

    with pytest.raises(ValueError, match=r"^PEFT releases disagree on model\.layers\.\d\.[\w.]+ or its .*") as caught:
        write_adapter(tmp_path / "adapter", config, MODEL, {})

    assert "\n" not in str(caught.value)
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
def test_file_is_read_by_the_rules_of_its_release(tmp_path: Path, fields: dict[str, Any], release: tuple[int, int]):
    patterns: dict[str, Any] = {
        "rank_pattern": {"up_proj": 6},
        "alpha_pattern": {"shared_experts.up_proj": 9, "q|up_proj": 3},
    }
    written = {"layers_to_transform": [1], "target_modules": ["up_proj"], **patterns, **fields}
    config = LoraConfig(lora_alpha=16, target_modules=("up_proj",), layers_to_transform=(1,), **patterns)
    plans = {since: make_plan(config, MODEL, rules=rules) for since, rules in RELEASES.items()}
    write_ones(tmp_path, plans[release], written)

    adapter = read_adapter(tmp_path, MODEL)

    assert [since for since, plan in plans.items() if plan == adapter.plan] == [release]


def write_ones(folder: Path, plan: lora.Plan, fields: dict[str, Any]) -> None:
    """Write an adapter of ones as some release would."""
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
