"""Runs on several sources: their shares, epochs and validation losses."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.config import DataConfig
from dsmoe_jax.train.data import Mixture, Stream, TokenShards, tokenize, unique_names
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.metrics import read_records
from tests.test_loop import config, home  # noqa: F401  fixtures

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]


@pytest.fixture(scope="module")
def sources(home: Path) -> list[Path]:  # noqa: F811
    """Token shards of prose and, of fewer tokens, of code."""
    code = "".join(json.dumps({"text": f"return (x) {n}"}) + "\n" for n in range(40))
    (home / "code.jsonl").write_text(code)
    tokenize(home / "code.jsonl", home / "tokenizer", home / "code", val_fraction=0.2)
    return [home / "shards", home / "code"]


def test_epochs_and_validation_losses_of_each_source(home: Path, sources: list[Path], tmp_path: Path, caplog):  # noqa: F811
    data = DataConfig(sources=tuple(map(str, sources)), weights=(3.0, 1.0), sequence_length=24, batch_size=8)
    trackers = ("jsonl", "console")
    settings = config(home, tmp_path, mesh=MeshConfig(), steps=6, data=data, trackers=trackers)

    with caplog.at_level(logging.INFO, "dsmoe_jax"):
        run(settings)

    recorded = read_records(tmp_path)
    last = [one for one in recorded if "loss" in one][-1]
    sizes = [TokenShards.open(folder).tokens for folder in sources]
    mixture = Mixture((3.0, 1.0), seed=0)
    counts = np.bincount([mixture.place(n)[0] for n in range(6 * 8)])
    want = [count * 24 / size for count, size in zip(counts, sizes, strict=True)]
    assert [last["epoch/shards"], last["epoch/code"]] == pytest.approx(want)
    (line,) = (one.message for one in caplog.records if one.message.startswith("Mixture: "))
    assert line.startswith("Mixture: shards 75.0% (")
    assert f"code 25.0% ({want[1]:.3g} epochs)" in line
    evaluation = recorded[-1]
    losses = [evaluation[f"eval/{name}/loss"] for name in ("shards", "code")]
    assert min(losses) < evaluation["eval/loss"] < max(losses)
    assert [one for one in caplog.records if f"eval/code/loss {losses[1]:.4g}" in one.message]


def test_one_source_has_one_epoch_and_one_loss(home: Path, tmp_path: Path):  # noqa: F811
    run(config(home, tmp_path, mesh=MeshConfig(), steps=6))

    recorded = read_records(tmp_path)
    size = TokenShards.open(home / "shards").tokens
    assert recorded[0]["epoch"] == pytest.approx(8 * 24 / size)
    assert not [name for one in recorded for name in one if name.startswith(("epoch/", "eval/shards"))]


def test_counts_are_those_of_the_places():
    mixture = Mixture((5, 1, 2), seed=3)
    placed = [mixture.place(n)[0] for n in range(700)]

    for samples in (0, 1, 255, 256, 257, 700):
        assert mixture.counts(samples) == np.bincount(placed[:samples], minlength=3).tolist()


def test_equal_names_are_numbered(sources: list[Path]):
    assert unique_names(["web", "code", "web"]) == ["web.0", "code", "web.2"]
    shards = [TokenShards.open(sources[0])] * 2
    assert Stream(shards, sequence_length=8, batch_size=2, seed=0).names == ["shards.0", "shards.1"]
