"""Settings that must match to resume, may change, or are invalid."""

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import DeepSeekMoE, check_seed, split
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import CheckpointConfig, RunConfig
from dsmoe_jax.train.finetune import FinetuneConfig
from dsmoe_jax.train.optimizer import OptimizerConfig
from dsmoe_jax.train.resume import check_resumable, check_settings, identity, log_changes
from dsmoe_jax.train.step import StepConfig
from tests.helpers.hf_folder import tiny

MODEL = tiny()
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "num_experts_per_tok is 2 in the checkpoint, 1 in this run": ({}, {"num_experts_per_tok": 1}),
    "rope_theta is 10000.0 in the checkpoint, 123.0 in this run": ({}, {"rope_theta": 123.0}),
    "rms_norm_eps is 1e-06 in the checkpoint, 0.001 in this run": ({}, {"rms_norm_eps": 1e-3}),
    "hidden_act is 'silu' in the checkpoint, 'gelu' in this run": ({}, {"hidden_act": "gelu"}),
    "norm_topk_prob is False in the checkpoint, True in this run": ({}, {"norm_topk_prob": True}),
    "aux_loss_alpha is 0.001 in the checkpoint, 0.5 in this run": ({}, {"aux_loss_alpha": 0.5}),
    "rope_scaling is None in the checkpoint, {'type': 'linear', 'factor': 2.0} in this run": (
        {},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "optimizer.b2 is 0.95 in the checkpoint, 0.5 in this run": ({"optimizer": OptimizerConfig(b2=0.5)}, {}),
    "optimizer.moments is 'float32' in the checkpoint, 'factored' in this run": (
        {"optimizer": OptimizerConfig(moments="factored")},
        {},
    ),
    "step.z_loss is 0.0 in the checkpoint, 0.1 in this run": ({"step": StepConfig(z_loss=0.1)}, {}),
    "step.device_balance_groups is 1 in the checkpoint, 2 in this run": (
        {"step": StepConfig(device_balance_groups=2)},
        {},
    ),
}
FREE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning rate": ({"optimizer": OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=3)}, {}),
    "steps": ({"steps": 7}, {}),
    "how a step is computed": (
        {"step": StepConfig(gradient_accumulation_steps=2, remat="full", compute_dtype="bfloat16")},
        {},
    ),
    "mesh": ({"mesh": MeshConfig(expert=2)}, {}),
    "neutral fields": ({}, {"use_cache": False, "torch_dtype": "bfloat16", "extra": {"a": 1}, "hidden_act": "swish"}),
}


def metadata(settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    stream = {
        "datasets": ["0"],
        "weights": [1.0],
        "sequence_length": 8,
        "batch_size": 2,
        "seed": 0,
        "packing": "block_causal",
    }
    inputs = {"files": {"a": "0"}, "options": {}, "validation": []}
    config = identity(RunConfig(output_dir="run", **settings), dataclasses.replace(MODEL, **fields))
    return {"config": config, "stream": stream, "inputs": inputs}


@pytest.mark.parametrize(("line", "change"), REFUSED.items(), ids=[line.partition(" ")[0] for line in REFUSED])
def test_changed_settings_are_refused_by_name(line: str, change: tuple[dict[str, Any], dict[str, Any]]):
    wanted = re.escape(
        f"run/checkpoints: cannot resume from step 20: {line}; choose those of the checkpoint, or another --output-dir"
    )

    with pytest.raises(ValueError, match=f"^{wanted}$"):
        check_resumable(Path("run/checkpoints"), 20, metadata({}, {}), metadata(*change))


@pytest.mark.parametrize("change", FREE.values(), ids=FREE)
def test_free_settings_may_change(change: tuple[dict[str, Any], dict[str, Any]]):
    check_resumable(Path("run/checkpoints"), 20, metadata({}, {}), metadata(*change))


def test_another_spelling_is_the_same_model():
    spelled, absent = ({"num_key_value_heads": heads} for heads in (MODEL.num_attention_heads, None))

    check_resumable(Path("run/checkpoints"), 20, metadata({}, spelled), metadata({}, absent))


@pytest.mark.parametrize(("then", "now"), [(None, {"r": 8}), ({"r": 8}, None)], ids=["lora", "all"])
def test_another_way_of_training_is_named(then: Any, now: Any):
    trained = ["LoRA adapters" if lora else "all parameters" for lora in (then, now)]

    with pytest.raises(
        ValueError, match=f"20: the run of the checkpoint trains {trained[0]}, this run {trained[1]}; choose"
    ):
        check_settings(Path("run/checkpoints"), 20, {"config": {"lora": then}}, {"lora": now})


def test_every_field_of_a_model_is_compared_or_neutral():
    compared = identity(RunConfig(output_dir="run"), MODEL).keys()

    assert {field.name for field in dataclasses.fields(ModelConfig)} - compared == {
        *("architectures", "bos_token_id", "eos_token_id", "extra", "pad_token_id", "pretraining_tp"),
        *("torch_dtype", "transformers_version", "use_cache"),
    }


def test_a_changed_setting_is_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    before, now = (
        RunConfig(output_dir=out, optimizer=OptimizerConfig(learning_rate=lr)) for out, lr in (("a", 1.0), ("b", 0.5))
    )

    log_changes(before.to_dict(), now.to_dict(), 20)

    assert caplog.messages == ["Changed: optimizer.learning_rate 1.0 → 0.5 (from step 20)"]


# Invalid configs


REQUESTS: dict[str, tuple[Callable[[], object], str]] = {
    "seed": (lambda: RunConfig(output_dir="run", seed=1 << 32), r"seed must be in \[0, 2\*\*32\), got 4294967296"),
    "negative seed": (lambda: RunConfig(output_dir="run", seed=-1), r"seed must be in \[0, 2\*\*32\), got -1"),
    "weights": (lambda: DeepSeekMoE.init(MODEL, seed=1 << 32), "seed must be in"),
    "keep_period": (
        lambda: CheckpointConfig(interval=10, keep_period=15),
        "checkpoint.keep_period must be a multiple of checkpoint.interval 10, got 15",
    ),
    "model of a fine-tuning run": (lambda: FinetuneConfig(model="tiny"), "model 'tiny' cannot be set"),
}


@pytest.mark.parametrize(("make", "line"), REQUESTS.values(), ids=REQUESTS)
def test_invalid_configs_are_refused(make: Callable[[], object], line: str):
    with pytest.raises(ValueError, match=line):
        make()


def test_the_largest_seed_is_used():
    check_seed((1 << 32) - 1)

    drawn = [np.asarray(split(DeepSeekMoE.init(MODEL, seed=seed))[1]["embed"]) for seed in (0, (1 << 32) - 1)]

    assert (drawn[0] != drawn[1]).any()
