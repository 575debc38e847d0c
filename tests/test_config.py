"""ModelConfig: presets, round trips of config.json, and one-line errors for invalid values."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

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
def test_every_preset_round_trips(preset: str):
    config = ModelConfig.preset(preset)

    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("case", golden.CASES)
def test_config_json_round_trips_without_auto_map(case: str):
    fields = json.loads((golden.folder(case) / "config.json").read_text())

    back = ModelConfig.from_dict(fields).to_dict()

    del fields["auto_map"]
    assert back.items() >= {k: v for k, v in fields.items() if k != "rope_scaling"}.items()
    assert back["rope_scaling"] == fields["rope_scaling"]


def test_missing_fields_take_the_originals_defaults():
    config = ModelConfig.from_dict({"model_type": "deepseek"})

    assert (config.hidden_size, config.num_hidden_layers, config.moe_intermediate_size) == (4096, 30, 1407)
    assert (config.aux_loss_alpha, config.seq_aux, config.norm_topk_prob) == (0.001, True, False)


def test_unknown_fields_are_preserved_but_not_code():
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
    (MOE | {"n_shared_experts": -1}, "n_shared_experts"),
    (MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok"),
    (MOE | {"n_shared_experts": False}, "n_shared_experts"),
    ({"rope_theta": 10**400}, "rope_theta .* an integer of 1329 bits"),
    ({"rope_theta": 1e31}, "rope_theta"),
    ({"initializer_range": 1e300}, "initializer_range"),
    ({"hidden_size": 64.5}, "hidden_size"),
    ({"bos_token_id": [1, 2]}, r"bos_token_id must be one token id, got \[1, 2\]"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    ({"eos_token_id": [True]}, "eos_token_id"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"architectures": "DeepseekForCausalLM"}, "architectures"),
    (MOE | {"moe_layer_freq": 0}, "moe_layer_freq"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, "rope_scaling.factor"),
    ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "contradict each other"),
    ({"rope_scaling": {"type": "default", "factor": 2.0}}, "rope_scaling.factor 2.0"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor 2.0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32}}, "rope_parameters.type 'yarn'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ({"rope_parameters": "default"}, "rope_parameters"),
    (
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4},
        r"rope_theta 10000.0 and rope_parameters.rope_theta 500000.0 contradict each other",
    ),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling .* and rope_parameters None contradict each other",
    ),
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
def test_bad_values_are_rejected_by_name(fields: dict, named: str):
    with pytest.raises(ValueError, match=named) as refused:
        ModelConfig.from_dict(fields)

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        # other libraries' names
        ("num_experts", "n_routed_experts"),
        ("num_local_experts", "n_routed_experts"),
        ("moe_num_experts", "n_routed_experts"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("moe_topk", "num_experts_per_tok"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("d_model", "hidden_size"),
        ("ffn_hidden_size", "intermediate_size"),
        ("rotary_base", "rope_theta"),
        ("layer_norm_epsilon", "rms_norm_eps"),
        # typing errors
        ("n_routed_expert", "n_routed_experts"),
        ("n_route_experts", "n_routed_experts"),
        ("norm_topk_proc", "norm_topk_prob"),
        ("hidden_sise", "hidden_size"),
        ("rope_thetta", "rope_theta"),
        ("seq_aus", "seq_aux"),
        ("rope_paramters", "rope_parameters"),
        ("firstKDenseReplace", "first_k_dense_replace"),
        ("moe-intermediate-size", "moe_intermediate_size"),
        ("num_expertz", "n_routed_experts"),
        ("routed_scaling_facto", "routed_scaling_factor"),
        # the same words
        ("n_experts_routed", "n_routed_experts"),
        ("layers_hidden", "num_hidden_layers"),
        ("number_of_heads", "num_attention_heads"),
        ("context_length", "max_position_embeddings"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("expert_used_count", "num_experts_per_tok"),
        ("rotary_scaling", "rope_scaling"),
    ],
)
def test_misspelled_and_foreign_fields_are_rejected(field: str, meant: str):
    with pytest.raises(ValueError, match=f"unknown field '{field}'; .*'{meant}'"):
        ModelConfig.from_dict({field: 7})


@pytest.mark.parametrize("name", ["text_config", "ffn_config", "model_args"])
def test_fields_in_a_nested_config_are_rejected(name: str):
    with pytest.raises(ValueError, match=f"'{name}' holds 'hidden_size', which must be at the top level"):
        ModelConfig.from_dict({name: {"dtype": "float32", "hidden_size": 64}, "vision": {"depth": 3}})


@pytest.mark.parametrize(
    ("neutral", "other"),
    [
        ({"rotary_dim": 128, "kv_channels": 128, "original_max_position_embeddings": 2048}, {"rotary_dim": 64}),
        ({"qk_layernorm": False, "router_bias": None, "num_mtp_layers": 0}, {"qk_layernorm": True}),
        ({"rotary_pct": 1.0, "rope_ratio": 1, "scale_emb": 1, "route_scale": 1.0}, {"scale_emb": 12}),
        ({"resid_pdrop": 0.0, "embd_pdrop": 0, "dropout": None}, {"dropout": 0.1}),
    ],
    ids=str,
)
def test_neutral_fields_of_other_models_are_accepted(neutral: dict, other: dict):
    assert dict(ModelConfig.from_dict(neutral).extra) == neutral
    with pytest.raises(ValueError, match=f"{next(iter(other))} .* is not supported, only"):
        ModelConfig.from_dict(other)


def test_an_alias_may_repeat_the_field():
    fields = MOE | {"num_experts": 8, "num_local_experts": None, "num_layers": 30}

    assert ModelConfig.from_dict(fields).n_routed_experts == 8
    with pytest.raises(ValueError, match="num_experts"):
        ModelConfig.from_dict(fields | {"num_experts": 16})


# Fields that PretrainedConfig of transformers 4.57 and 5 adds to every config.json.
PRETRAINED = """
_attn_implementation_autoset _attn_implementation _commit_hash _from_model_config _name_or_path _output_attentions
add_cross_attention bad_words_ids begin_suppress_tokens cache_config cache_implementation chunk_size_feed_forward
compile_config cross_attention_hidden_size decoder_start_token_id disable_compile diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id guidance_scale id2label
is_assistant is_decoder is_encoder_decoder label2id length_penalty low_memory max_length max_new_tokens max_time
min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_beam_groups num_beams num_labels
num_return_sequences output_attentions output_hidden_states output_logits output_scores penalty_alpha prefix
problem_type prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty return_dict
return_dict_in_generate sep_token_id sequence_bias stop_strings suppress_tokens task_specific_params temperature
tf_legacy_loss tie_encoder_decoder token_healing tokenizer_class top_h top_k top_p torchscript typical_p unk_token_id
use_bfloat16 use_mtp watermarking_config ep_size output_router_logits router_z_loss_coef max_window_layers
"""


def test_other_fields_of_transformers_are_preserved():
    fields: dict[str, Any] = dict.fromkeys(PRETRAINED.split(), 1)

    assert dict(ModelConfig.from_dict(fields).extra) == fields


# alias | fields
SAME = [
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
    ({"rope_parameters": {"rope_theta": 5e5, "type": "default"}, "rope_theta": 500000}, {"rope_theta": 5e5}),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}, "rope_scaling": None}, {}),
    ({"rope_parameters": None}, {}),
    ({"eos_token_id": 7.0}, {"eos_token_id": 7}),
    ({"rope_parameters": {}}, {}),
    (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    ),
    (
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": None}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    ({"rope_scaling": {"type": "default"}}, {}),
    ({"rope_scaling": {}}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {}),
    ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
    ({"torch_dtype": "torch.float16"}, {"torch_dtype": "float16"}),
    ({"torch_dtype": None, "dtype": "torch.float16"}, {"torch_dtype": "float16"}),
    ({"eos_token_id": [7]}, {"eos_token_id": 7}),
    ({"eos_token_id": []}, {"eos_token_id": None}),
    ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": (7, 9)}),
    ({"bos_token_id": [3], "pad_token_id": []}, {"bos_token_id": 3}),
    ({"architectures": None}, {}),
    ({"architectures": []}, {}),
    ({"architectures": ["DeepseekModel"]}, {}),
    (MOE | {"n_shared_experts": 0}, MOE),
    ({"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 0}, {}),
    ({"attention_bias": None, "norm_topk_prob": None, "tie_word_embeddings": None, "use_cache": None}, {}),
    ({"pretraining_tp": None}, {}),
    (
        {"aux_loss_alpha": None, "seq_aux": None, "attention_dropout": None},
        {"aux_loss_alpha": 0.0, "seq_aux": False, "attention_dropout": 0.0},
    ),
    ({"pretraining_tp": 0}, {}),
    ({"hidden_size": 4096.0, "rope_theta": 10000}, {}),
    ({"quantization_config": {}, "head_dim": 128, "routed_scaling_factor": 1.0, "topk_method": "gready"}, {}),
    ({"layer_types": ["full_attention"] * 30, "n_group": 1, "topk_group": 1, "scoring_func": "softmax"}, {}),
    ({"model_type": None}, {}),
]


@pytest.mark.parametrize(("spelling", "meaning"), SAME, ids=[f"{fields}"[:60] for fields, _ in SAME])
def test_equivalent_spellings_give_equal_configs(spelling: dict, meaning: dict):
    config = ModelConfig.from_dict(spelling)

    assert dataclasses.replace(config, extra={}) == ModelConfig(**meaning)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["architectures"] == ["DeepseekForCausalLM"]
    assert "rope_parameters" not in config.to_dict()


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"vocab_size": 1024}, (None, None)),
        ({"vocab_size": 1024, "bos_token_id": 100000, "eos_token_id": [100001]}, (None, None)),
        ({"vocab_size": 100001}, (100000, None)),
        ({"vocab_size": 102400}, (100000, 100001)),
        ({"vocab_size": 1024, "eos_token_id": 5}, (None, 5)),
    ],
    ids=str,
)
def test_default_ids_are_within_the_vocabulary(fields: dict, ids: tuple):
    config = ModelConfig.from_dict(fields)

    assert (config.bos_token_id, config.eos_token_id) == ids


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"hidden_size": 64, "hidden_size": 32}', "twice"),
        ('{"hidden_size": NaN}', "hidden_size"),
        ('{"rope_theta": 1e400}', "has 1e400, too large for a float, for 'rope_theta'"),
        ('{"note": [[-1e999]]}', "has -1e999, too large for a float, for 'note'"),
        (f'{{"rope_theta": {10**50}}}', r"an integer of 51 digits \(at most 40\) for 'rope_theta'"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_bad_config_json_is_rejected_with_its_path(tmp_path: Path, text: str, reason: str):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(ValueError, match=reason) as refused:
        ModelConfig.from_file(tmp_path)

    assert str(tmp_path) in str(refused.value)


def test_a_config_json_without_sizes_is_no_model(tmp_path: Path):
    fields = {name: getattr(ModelConfig(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    for found, missing in (({}, "vocab_size, hidden_size, "), (fields, "num_hidden_layers, num_attention_heads$")):
        (tmp_path / "config.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match=f"config.json: is not the config of a model, it has no {missing}"):
            ModelConfig.from_file(tmp_path)


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


def test_info_rejects_an_unknown_model():
    with pytest.raises(ValueError, match="deepseek_moe_17b"):
        describe("deepseek_moe_17b")
