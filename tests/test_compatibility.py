"""Files of version 0.1.0 still work: runs resume, models and adapters load, metrics are read.

`tests/data/v0_1` was written by that version on one CPU device; the expected losses are from the same runs resumed to
step 4 with that version.
"""

import json
import shutil
from pathlib import Path

import pytest

import dsmoe_jax
from dsmoe_jax.cli import main
from dsmoe_jax.convert.peft import read_adapter
from dsmoe_jax.train.metrics import read_records
from dsmoe_jax.train.old_names import OLD_NAMES, new_metric, with_new_names
from dsmoe_jax.train.plotting import draw
from tests.helpers.runs import losses

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]

DATA = Path(__file__).parent / "data" / "v0_1"
EQUAL = 1e-5  # relative: the optimization level of XLA differs from that of the release
COMMON = ["--checkpoint.interval", "2", "--log-interval", "1", "--eval-interval", "2", "--trackers", "jsonl"]
COMMON += ["--optimizer.warmup-steps", "0"]
TEXTS = ["--data.sources", "texts.jsonl", "--data.sequence-length", "32", "--data.batch-size", "2"]
TEXTS += ["--data.val-fraction", "0.2"]
EXAMPLES = ["--data", "examples.jsonl", "--data.sequence-length", "64", "--data.batch-size", "4"]
EXAMPLES += ["--data.val-fraction", "0.1", "--lora", "--lora.r", "2"]
PRETRAIN = ["pretrain", "tiny", "--model", "model.json", "--output-dir", "run", *TEXTS, *COMMON]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(DATA, tmp_path / "v0_1")
    monkeypatch.chdir(tmp_path / "v0_1")
    return tmp_path / "v0_1"


def test_a_pretraining_run_resumes(folder: Path):
    code = main([*PRETRAIN, "--steps", "4"])

    assert code == 0
    assert [losses(folder / "run")[step] for step in (3, 4)] == pytest.approx(
        [6.332320213317871, 6.435914039611816], rel=EQUAL
    )
    assert losses(folder / "run", "eval/loss")[4] == pytest.approx(6.229704265353046, rel=EQUAL)
    assert json.loads((folder / "run" / "run.json").read_text())["checkpoint"]["interval"] == 2


@pytest.mark.slow
def test_a_fine_tuning_run_resumes(folder: Path):
    code = main(["finetune", "run/model", "--output-dir", "finetune", *EXAMPLES, *COMMON, "--steps", "4"])

    assert code == 0
    assert [losses(folder / "finetune")[step] for step in (3, 4)] == pytest.approx(
        [5.996227741241455, 5.931654453277588], rel=EQUAL
    )
    assert losses(folder / "finetune", "eval/loss")[4] == pytest.approx(6.1332221031188965, rel=EQUAL)


def test_a_finished_run_is_complete(folder: Path, capsys: pytest.CaptureFixture[str]):
    code = main([*PRETRAIN, "--steps", "2"])

    printed = capsys.readouterr().out
    assert code == 0
    assert "6.5656" in printed
    assert "6.3054" in printed
    assert list(losses(folder / "run")) == [1, 2]


def test_a_model_and_its_adapter_generate(folder: Path):
    model = dsmoe_jax.load(folder / "run" / "model")
    adapter = read_adapter(folder / "finetune" / "adapter", model.config)

    generate = dsmoe_jax.Generator.from_pretrained(folder / "run" / "model", adapter=folder / "finetune" / "best")

    assert adapter.config.r == 2
    assert len(generate(["alpha"], max_new_tokens=3, ignore_eos=True)[0].token_ids) == 3


def test_metrics_have_todays_names(tmp_path: Path):
    first, second, last = read_records(DATA / "run")

    assert (first["grad_norm"], first["total_skips"]) == (4.458441734313965, 0)
    assert first["load_imbalance"] == first["moe/1/load_imbalance"] == 1.875
    assert first["overflow_passes"] == first["moe/1/overflow_passes"] == 0
    assert first["moe/1/expert_load"] == [11, 17, 5, 6, 30, 25, 21, 13]
    assert second["step_time_seconds"] == 0.0012280629998713266
    assert last == {"step": 2, "eval/loss": 6.305373372910898, "eval/tokens": 79}
    pytest.importorskip("matplotlib")
    draw(DATA / "run", tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_old_names_become_new_ones_once():
    old = {"out": "a", "processes": {"distributed": True}, "data": {"packing": "packed", "too_long": "refuse"}}
    new = {
        "output_dir": "a",
        "distributed": {"initialize": True},
        "data": {"packing": "best_fit", "excess_length_strategy": "raise"},
    }

    assert with_new_names(old, "run.json") == with_new_names(new, "run.json") == new
    for name, now in OLD_NAMES["metrics.jsonl"].items():
        assert new_metric(name if "/" in name or name != "load" else "moe/1/load").removeprefix("moe/1/") == now
