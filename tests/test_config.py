"""ModelConfig: presets, the round trip of config.json, and one clear line for every bad value."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from dsmoe_jax.config import PRESETS, ModelConfig
from dsmoe_jax.info import count_parameters, describe
from tests.helpers import golden

MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("preset", "total", "activated"),
    [
        ("deepseek_moe_16b", 16_375_728_128, 2_828_650_496),
        ("deepseek_moe_2b", 1_991_733_760, 319_582_720),
        pytest.param("deepseek_moe_145b", 144_612_773_888, 22_187_331_584, marks=pytest.mark.slow),
        ("bench", 271_008_256, None),
        ("tiny", None, None),
    ],
)
def test_presets_have_the_papers_sizes(preset: str, total: int | None, activated: int | None):
    counts = count_parameters(ModelConfig.preset(preset))

    assert total in (None, counts.total)
    assert activated in (None, counts.activated)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_the_round_trip(preset: str):
    config = ModelConfig.preset(preset)

    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("case", golden.CASES)
def test_config_json_survives_the_round_trip_without_its_code(case: str):
    fields = json.loads((golden.folder(case) / "config.json").read_text())

    back = ModelConfig.from_dict(fields).to_dict()

    del fields["auto_map"]
    assert back.items() >= {k: v for k, v in fields.items() if k != "rope_scaling"}.items()
    assert back["rope_scaling"] == fields["rope_scaling"]


def test_missing_fields_take_the_originals_defaults():
    config = ModelConfig.from_dict({"model_type": "deepseek"})

    assert (config.hidden_size, config.num_hidden_layers, config.moe_intermediate_size) == (4096, 30, 1407)
    assert (config.aux_loss_alpha, config.seq_aux, config.norm_topk_prob) == (0.001, True, False)


def test_unknown_harmless_fields_are_kept_and_code_is_not():
    config = ModelConfig.from_dict({"my_note": {"a": [1]}, "auto_map": {"AutoModel": "evil.Model"}, "head_dim": 128})

    assert config.to_dict()["my_note"] == {"a": [1]}
    assert "auto_map" not in config.to_dict()


BAD = [
    ({"hidden_size": math.nan}, "hidden_size"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"rope_theta": math.inf}, "rope_theta"),
    ({"rope_theta": 0.0}, "rope_theta"),
    ({"initializer_range": -1.0}, "initializer_range"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": 1 << 40}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"vocab_size": None}, "vocab_size"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"hidden_act": "mish"}, "hidden_act"),
    ({"scoring_func": "sigmoid"}, "scoring_func"),
    ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"attention_dropout": 1.0}, "attention_dropout"),
    ({"num_attention_heads": 3, "hidden_size": 64, "num_key_value_heads": 3}, "num_attention_heads"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
    ({"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 4}, "hidden_size"),  # odd head width
    ({"n_routed_experts": 8}, "num_experts_per_tok"),
    ({"n_routed_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok"),
    (MOE | {"n_shared_experts": 0}, "n_shared_experts"),
    (MOE | {"moe_layer_freq": 0}, "moe_layer_freq"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 1.0}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "low": 1}}, "rope_scaling"),
    ({"rope_scaling": [2.0]}, "rope_scaling"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "hidden_size": 64}, "rope_scaling.type"),  # heads of width 2
    ({"model_type": "deepseek_v2"}, "model_type"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ({"q_lora_rank": 1536}, "q_lora_rank"),
    ({"topk_method": "group_limited_greedy"}, "topk_method"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"head_dim": 100}, "head_dim"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[f"{fields}"[:60] for fields, _ in BAD])
def test_a_bad_value_is_refused_in_one_line_that_names_it(fields: dict, named: str):
    with pytest.raises(ValueError, match=named) as refused:
        ModelConfig.from_dict(fields)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("[1]", "holds a list"),
        ('{"hidden_size": 64, "hidden_size": 32}', "twice"),
        ('{"hidden_size": NaN}', "hidden_size"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_bad_config_json_is_refused_with_its_path(tmp_path: Path, text: str, reason: str):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(ValueError, match=reason) as refused:
        ModelConfig.from_file(tmp_path)

    assert str(tmp_path) in str(refused.value)


def test_a_config_is_hashable_and_frozen():
    config = ModelConfig.from_dict({"rope_scaling": {"type": "linear", "factor": 2.0}, "note": []})

    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]


def test_info_shows_the_layer_plan_of_a_folder():
    page = describe(str(golden.folder("a_baseline")))

    assert f"{206_272:,}" in page
    assert "layer 0 " in page
    assert "layers 1-2" in page
    assert "8 routed experts of width 24, top-3, 2 shared" in page


def test_info_refuses_what_is_neither_a_preset_nor_a_path():
    with pytest.raises(ValueError, match="deepseek_moe_17b"):
        describe("deepseek_moe_17b")
