"""Flags of `dsmoe pretrain` and `dsmoe finetune`: recipes, overrides, errors."""

import io
import sys

import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.train.flags import parse
from dsmoe_jax.train.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_full_config_of_a_preset(name: str):
    recipe = RECIPES[name]()

    assert recipe.model_config() == ModelConfig.preset(recipe.model)
    assert parse(recipe, [], prog=name) == recipe


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_invalid_flag_is_one_line(encoding: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))

    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0$"):
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
