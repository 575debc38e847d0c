"""Flags of `dsmoe pretrain` and `dsmoe finetune`: recipes, overrides, errors."""

import dataclasses
import io
import json
import logging
import sys
from pathlib import Path

import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.defaults import with_defaults
from dsmoe_jax.train.finetune import FinetuneConfig
from dsmoe_jax.train.flags import parse, parse_finetuning, parse_pretraining
from dsmoe_jax.train.optimizer import OptimizerConfig
from dsmoe_jax.train.recipes import RECIPES
from tests.helpers.hf_folder import tiny


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_full_config_of_a_preset(name: str):
    recipe = RECIPES[name]()

    assert recipe.model_config() == ModelConfig.preset(recipe.model)
    assert parse(recipe, [], prog=name) == recipe


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_invalid_flag_is_one_line(encoding: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))

    with pytest.raises(ValueError, match=r"^--steps must be at least 1, got 0$"):
        parse(RECIPES["tiny"](), ["--steps", "0"], prog="tiny")


def test_flags_change_a_recipe():
    flags = [
        "--steps",
        "7",
        "--data.sources",
        "a",
        "b",
        "--step.remat",
        "full",
        "--mesh.expert",
        "2",
        "--resume",
        "never",
    ]

    got = parse(RECIPES["tiny"](), flags, prog="tiny")

    assert (got.steps, got.data.sources, got.step.remat, got.mesh.expert) == (7, ("a", "b"), "full", 2)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (("pretrain", "huge"), "recipe must be one of tiny, bench"),
        (("pretrain", "tiny", "--stepz", "3"), "--stepz"),
        (("pretrain", "tiny", "--steps", "many"), "--steps"),
        (("pretrain", "tiny", "--steps", "0"), "steps must be at least 1, got 0"),
        (("pretrain", "tiny", "--step.remat", "some"), "--step.remat"),
    ],
)
def test_an_invalid_flag_exits_with_2(capsys: pytest.CaptureFixture, typed: tuple[str, ...], named: str):
    code = main(list(typed))

    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert named in error


def test_old_flags_and_values_are_accepted(caplog: pytest.LogCaptureFixture):
    flags = [
        "--out",
        "a",
        "--checkpoints.every=5",
        "--data.packing",
        "documents",
        "--step.accumulation",
        "2",
        "--sinks",
        "jsonl",
    ]

    config = parse(RECIPES["tiny"](), flags, prog="")

    assert (config.output_dir, config.checkpoint.interval, config.trackers) == ("a", 5, ("jsonl",))
    assert (config.data.packing, config.step.gradient_accumulation_steps) == ("block_causal", 2)
    assert "Flag --checkpoints.every is deprecated, use --checkpoint.interval" in caplog.text
    assert "Value documents of --data.packing is deprecated, use block_causal" in caplog.text


def test_a_value_that_looks_like_an_old_one_is_kept():
    config = parse(RECIPES["tiny"](), ["--output-dir", "documents", "--data.sources", "out", "packed"], prog="")

    assert (config.output_dir, config.data.sources) == ("documents", ("out", "packed"))


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 2e-5),
        (["--lora"], 2e-4),
        (["--lora.r", "4"], 2e-4),
        (["--lora", "--optimizer.learning-rate", "1e-3"], 1e-3),
        (["--recipe", "tiny", "--lora"], 1e-3),
    ],
    ids=["all", "lora", "lora flag", "set", "recipe"],
)
def test_the_learning_rate_is_higher_with_lora(flags: list[str], rate: float, checkpoint: Path):
    config, _ = parse_finetuning([str(checkpoint), "--data", "a.jsonl", *flags])

    assert with_defaults(config).optimizer.learning_rate == rate


def test_the_length_of_a_recipe_is_within_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(tiny(max_position_embeddings=128).to_dict()))

    default, given = (
        with_defaults(parse_pretraining(["tiny", "--model", "model.json", *flags])).data.sequence_length
        for flags in ([], ["--data.sequence-length", "512"])
    )

    assert (default, given) == (128, 512)
    assert caplog.messages == ["Sequence length: 128 tokens, the model's context length (recipe tiny: 256)"]
    started(tmp_path / "runs" / "tiny", RunConfig(output_dir="runs/tiny", data=DataConfig(sequence_length=256)))
    assert with_defaults(parse_pretraining(["tiny", "--model", "model.json"])).data.sequence_length == 256


# The run in the output directory


def started(folder: Path, config: RunConfig, **entries: object) -> list[str]:
    """Write what a run leaves behind; return the flag of its folder."""
    (folder / "checkpoints" / "step-00000500").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(config.to_dict() | entries))
    return ["--output-dir", str(folder)]


def test_a_resumed_run_keeps_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    run = RunConfig(
        output_dir=str(tmp_path),
        recipe="tiny",
        steps=77,
        data=DataConfig(sources=("a", "b"), weights=(1.0, 2.0), batch_size=4),
        optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=3, max_grad_norm=None),
        trackers=("jsonl",),
        seed=3,
    )
    folder = started(tmp_path, run, total_steps=77, model_config={}, result=None)

    same = parse_pretraining(["tiny", *folder])
    other = parse_pretraining(["tiny", *folder, "--steps", "99", "--optimizer.warmup-steps=4"])

    assert same == run
    assert other == dataclasses.replace(run, steps=99, optimizer=dataclasses.replace(run.optimizer, warmup_steps=4))
    assert f"Using the settings of {tmp_path / 'run.json'}; flags override them" in caplog.messages


def test_a_fine_tuning_run_keeps_recipe_and_adapter(tmp_path: Path):
    config = FinetuneConfig(recipe="lora_1x80gb", init_from="old", lora=LoraConfig(r=3, rank_pattern={"a": 2}))
    folder = started(tmp_path, with_defaults(config))

    resumed, _ = parse_finetuning(["new", *folder, "--lora.lora-alpha", "8"])

    assert config.lora is not None
    assert resumed.lora == dataclasses.replace(config.lora, lora_alpha=8)
    assert (resumed.recipe, resumed.init_from, resumed.epochs) == ("lora_1x80gb", "new", 3.0)


def test_settings_of_a_start_are_not_kept(tmp_path: Path):
    folder = started(tmp_path, RunConfig(output_dir="elsewhere", resume="never"))

    config = parse_pretraining(["tiny", *folder])

    assert (config.output_dir, config.resume, config.recipe) == (str(tmp_path), "auto", "tiny")


def test_a_run_without_checkpoints_takes_the_recipe(tmp_path: Path):
    folder = started(tmp_path, RunConfig(output_dir=str(tmp_path), steps=77))
    (tmp_path / "checkpoints" / "step-00000500").rmdir()

    assert parse_pretraining(["tiny", *folder]).steps == RECIPES["tiny"]().steps


def test_another_recipe_is_refused(tmp_path: Path):
    folder = started(tmp_path, RunConfig(output_dir=str(tmp_path), recipe="tiny"))

    with pytest.raises(
        ValueError, match=r"recipe bench is not that of the run in .*, tiny; choose another --output-dir"
    ):
        parse_pretraining(["bench", *folder])


def test_a_folder_named_like_a_recipe_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "own").mkdir()

    assert parse_pretraining(["tiny"]).model == "tiny"
    with pytest.raises(ValueError, match="pass a model with it, `tiny --model own`"):
        parse_pretraining(["own"])
