"""The paper's comparison of architectures: variants, plan, queue, outcomes and report."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.experiments import queue, reproduce
from dsmoe_jax.experiments.comparisons import compare, interval
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.experiments.queue import Place, places
from dsmoe_jax.experiments.report import write_report
from dsmoe_jax.experiments.variants import SCALES, VARIANTS, model_config, run_config, shortened
from dsmoe_jax.info import count_parameters
from dsmoe_jax.layers.ablation import Ablation
from tests.helpers.command import run

pytestmark = pytest.mark.heavy


# millions of parameters, in total and active per token
@pytest.mark.parametrize(
    ("variant", "total", "active"),
    [
        ("dense", 1.33, 1.33),
        ("dense_x4", 2.95, 2.95),
        ("dense_x16", 9.44, 9.44),
        ("hash", 9.44, 1.33),
        ("switch", 9.45, 1.34),
        ("gshard", 9.45, 1.88),
        ("gshard_x1.5", 13.77, 2.42),
        ("deepseek_moe", 9.47, 1.90),
        ("half_active", 9.47, 1.36),
    ],
)
def test_variants_have_the_sizes_of_the_design(variant: str, total: float, active: float):
    counts = count_parameters(model_config(variant, SCALES["laptop"]))

    assert (round(counts.total / 1e6, 2), round(counts.activated / 1e6, 2)) == (total, active)


def test_the_papers_model_is_the_preset():
    found, preset = model_config("deepseek_moe", SCALES["2b"]), ModelConfig.preset("deepseek_moe_2b")

    fields = ("vocab_size", "hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts")
    fields += ("num_experts_per_tok", "num_hidden_layers", "num_attention_heads", "initializer_range")
    assert {name: getattr(found, name) for name in fields} == {name: getattr(preset, name) for name in fields}


def test_mixtures_have_equal_parameters_and_compute():
    counts = {name: count_parameters(model_config(name, SCALES["2b"])) for name in VARIANTS}
    gshard = counts["gshard"]

    for name in ("shared_1_15", "shared_1_31", "deepseek_moe", "fine_grained", "shared_2_62", "shared_4_60"):
        assert counts[name].total == pytest.approx(gshard.total, rel=0.005)
        assert counts[name].activated == pytest.approx(gshard.activated, rel=0.005)


def test_runs_of_a_seed_differ_by_the_model_alone(tmp_path: Path):
    one, other = (
        run_config(SCALES["laptop"], 1, model=tmp_path / name, data=tmp_path, out=tmp_path / name) for name in "ab"
    )

    differing = {key for key, value in one.to_dict().items() if value != other.to_dict()[key]}
    assert differing == {"model", "output_dir"}
    assert one.steps * one.data.batch_size * one.data.sequence_length >= 8_000_000


def test_the_interval_is_that_of_student():
    mean, half = interval(np.array([1.0, 2.0, 4.0]))

    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.3027 * np.std([1, 2, 4], ddof=1) / math.sqrt(3), rel=1e-4)
    assert interval(np.array([1.0])) == (1.0, math.inf)


def test_outcomes_follow_the_interval():
    near, apart = {0: 2.0, 1: 2.1, 2: 2.2}, {0: 2.10, 1: 2.21, 2: 2.29}
    losses = {
        "dense": apart,
        "hash": near,
        "gshard": {0: 1.9, 1: 2.15, 2: 2.12},
        "switch": {0: 1.8, 1: 2.04, 2: 2.03},
        "deepseek_moe": {0: 1.0},
    }

    verdicts = {(one.comparison.better, one.comparison.worse): one.verdict for one in compare(losses)}

    assert verdicts == {
        ("hash", "dense"): "confirmed",
        ("switch", "dense"): "confirmed",
        ("gshard", "hash"): "undecided",  # a positive mean of a wide interval
        ("gshard", "switch"): "contradicted",
        ("deepseek_moe", "gshard"): "undecided",  # one pair
    }


def test_variants_that_the_paper_finds_equal_are_contradicted_or_not():
    deep = {0: 2.0, 1: 2.1, 2: 2.2}
    verdicts = []
    for rises in ((0.02, -0.01, 0.01), (-0.02, 0.01, -0.01), (-0.3, -0.31, -0.3), (0.3, 0.31, 0.3)):
        wide = {seed: loss + rise for (seed, loss), rise in zip(deep.items(), rises, strict=True)}
        (found,) = compare({"deepseek_moe": deep, "gshard_x1.5": wide})
        verdicts.append(found.verdict)

    assert verdicts == ["not contradicted", "not contradicted", "contradicted", "contradicted"]


def test_sensitivity_is_the_rise_of_the_loss_with_experts_disabled():
    # disable_top 1/16 of 63 and of 16 routed experts
    deep = {seed: {Ablation(): 2.0 + seed, Ablation(disable_top=4): 5.0 + seed} for seed in range(3)}
    wide = {seed: {Ablation(): 2.0, Ablation(disable_top=1): 3.0 + 0.1 * seed} for seed in range(3)}

    (found,) = compare({}, {"deepseek_moe": deep, "gshard_x1.5": wide})

    assert found.mean == pytest.approx(3.0 - 1.1)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert found.paper == pytest.approx((7.468 - 1.808) - (5.586 - 1.808))
    assert found.verdict == "confirmed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "out": ((), "--out is required"),
        "variant": (("--variants", "dense,gshart", "--out", "x"), "variant must be one of .*, got 'gshart'.*"),
        "seeds": (("--seeds", "0", "--out", "x"), "seeds must be an integer of at least 1, got 0"),
        "report": (("--report-only", "--out", "x"), "x: no run is complete"),
        "devices": (("--plan", "--devices", "7"), ".*: devices must be a power of two up to 16, got 7"),
        "plan": (("--devices", "7", "--out", "x"), "--devices 7 needs --plan; .*"),
        "workers": (("--scale", "2b", "--workers", "4", "--out", "x"), "workers must be 1, .*, got 4"),
    }.values(),
)
def test_bad_experiments_are_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)

    assert run("reproduce", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsmoe reproduce: ")
    assert re.fullmatch(message, line.removeprefix("dsmoe reproduce: "))


def experiment(out: Path, *, variants: tuple[str, ...] = ("dense", "gshard"), seeds: int = 2, steps: int | None = None):
    sources = ("python-stdlib",)
    return Experiment.create(
        out, scale="ci", variants=variants, seeds=seeds, steps=steps, sources=sources, ablation_tokens=4096
    )


def test_an_experiment_grows_but_does_not_change(tmp_path: Path):
    experiment(tmp_path).write()
    experiment(tmp_path, variants=("dense", "gshard", "hash"), seeds=3).write()

    experiment(tmp_path, variants=("hash",), seeds=1).write()

    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["variants"], plan["seeds"]) == (["dense", "gshard", "hash"], 3)
    assert (plan["first"]["variants"], plan["first"]["seeds"]) == (["dense", "gshard"], 2)
    assert Experiment.read(tmp_path).fields() == plan
    with pytest.raises(ValueError, match="is another experiment: steps 30 -> 31;"):
        experiment(tmp_path, steps=31).write()


def test_variants_and_seeds_that_were_added_are_marked(tmp_path: Path):
    experiment(tmp_path, variants=("dense", "gshard"), seeds=1).write()
    one = experiment(tmp_path, variants=("deepseek_moe",), seeds=2)
    one.write()
    for job in one.jobs:
        one.write_result(job, {"eval_loss": 2.5, "parameters": 1000, "active_parameters": 500})

    text = write_report(one).read_text()

    assert "3 variants, 2 seeds (added later: `deepseek_moe`, 1 seed)" in text
    assert (
        "- DeepSeekMoE beats GShard at equal compute and parameters (table 1): `deepseek_moe` < `gshard` (added" in text
    )
    assert "| 2 (seeds added later) |" in text


def test_comparisons_of_later_versions_are_marked(tmp_path: Path):
    one = experiment(tmp_path, variants=("deepseek_moe", "gshard", "gshard_x1.5"))
    one.write()
    plan = json.loads((tmp_path / "plan.json").read_text())
    early = {name: plan["first"].pop(name) for name in ("variants", "seeds", "comparisons")}
    early["comparisons"] = [found for found in early["comparisons"] if not found.pop("disabled")]
    (tmp_path / "plan.json").write_text(json.dumps({**plan, **early, "first": None}))  # as an earlier version did
    one.write_result(Job("gshard", 0), {"eval_loss": 2.5, "parameters": 1000, "active_parameters": 500})

    lines = write_report(Experiment.read(tmp_path)).read_text().splitlines()

    late = [line for line in lines if line.endswith(" (added after the first run had started)")]
    assert [line.split(" of")[0] for line in late] == ["- 1/16", "- 4/16"]
    assert any(line.startswith("- DeepSeekMoE beats GShard") and line.endswith("`gshard`") for line in lines)


def test_data_may_change_before_the_first_run_only(tmp_path: Path):
    make = lambda sources: Experiment.create(tmp_path, scale="ci", sources=sources)  # noqa: E731
    make(["a.txt"]).write()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text('{"format": 1}')
    make(None).bind_data()
    make(["b.txt"]).write()
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text("{}")
    make(None).bind_data()
    (tmp_path / "runs").mkdir()

    with pytest.raises(ValueError, match=r"is another experiment: sources .'b.txt'. -> "):
        make(["c.txt"])
    (tmp_path / "data/manifest.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="data has changed; choose another --out"):
        make(None).bind_data()


def test_texts_without_a_second_document_are_refused(tmp_path: Path):
    (tmp_path / "one.txt").write_text("The quick brown fox jumps over the lazy dog. " * 6)
    for _ in range(2):  # the second time as the first
        with pytest.raises(ValueError, match="no document is held out for validation: at least 2 documents are needed"):
            reproduce(tmp_path / "x", scale="ci", sources=tmp_path / "one.txt")
    with pytest.raises(ValueError, match="missing"):
        reproduce(tmp_path / "y", sources=tmp_path / "missing.txt")
    assert not (tmp_path / "y").exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = experiment(tmp_path)

    def start(experiment: Experiment, job: Job, place: Place):
        experiment.run_folder(job).mkdir(parents=True, exist_ok=True)
        (experiment.run_folder(job) / "log.txt").write_text("no memory\n")
        failed = job == Job("gshard", 0)
        if not failed:
            experiment.write_result(job, {"eval_loss": 2.0})
        return mock.Mock(returncode=int(failed), **{"poll.return_value": int(failed)})

    monkeypatch.setattr(queue, "_start", start)

    assert queue.run_jobs(one, [Place({})]) == ["gshard-0 failed with exit code 1: no memory"]
    assert [job for job in one.jobs if one.result(job)] == [Job("dense", 0), Job("dense", 1), Job("gshard", 1)]


def test_folders_of_others_are_not_touched(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/book.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"has a data, but no plan.json; choose another --out"):
        reproduce(tmp_path, scale="ci", sources=tmp_path / "data/book.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "book.txt"]


@pytest.mark.parametrize(
    ("name", "value"), {"seeds": "3", "settings": 5, "variants": ["dense", "gshart"], "first": {"x": 1}}.items()
)
def test_damaged_plans_are_one_line(name: str, value: object, tmp_path: Path):
    experiment(tmp_path).write()
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, name: value}))

    with pytest.raises(ValueError, match=r"plan.json: damaged: |variant must be one of"):
        Experiment.read(tmp_path)


def test_settings_of_earlier_versions_are_completed(tmp_path: Path):
    experiment(tmp_path).write()
    plan = json.loads((tmp_path / "plan.json").read_text())
    del plan["settings"]["initializer_range"], plan["settings"]["step"]["z_loss"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    assert Experiment.read(tmp_path).scale == SCALES["ci"]


def test_damaged_results_are_named(tmp_path: Path):
    one = experiment(tmp_path)
    one.write()
    one.write_result(Job("dense", 0), {})

    with pytest.raises(ValueError, match=r"dense-0.json: damaged: it has no eval_loss$"):
        write_report(one)


def test_the_report_states_what_was_decided_and_what_came_out(tmp_path: Path):
    one = experiment(tmp_path, variants=("dense", "switch", "gshard_x1.5"))
    one.write()
    for job in one.jobs:
        loss = {"dense": 3.0, "switch": 2.6, "gshard_x1.5": 2.5}[job.variant] + 0.1 * job.seed
        sizes = {"parameters": 1000, "active_parameters": 500}
        one.write_result(job, {"eval_loss": loss, **sizes})

    ablated = {"disable_top": 0, "active": None, "shared": True, "disabled": [], "loss": 3.0}
    losses = [ablated, {**ablated, "disable_top": 1, "loss": 4.5}]
    fields = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": None, "losses": losses}
    fields |= {"tokens": 4000, "documents": 3}
    one.ablation_file(Job("gshard_x1.5", 0)).parent.mkdir()
    one.ablation_file(Job("gshard_x1.5", 0)).write_text(json.dumps(fields))
    text = write_report(one).read_text()

    assert "| `gshard_x1.5` | top 1 disabled | 4.5000 | +1.500 | 1 | +3.778 |" in text
    assert "the same 4,000 tokens of 3 documents" in text
    assert text.index("## Decided before running") < text.index("## Results") < text.index("## Losses")
    assert "| `dense` | one feed-forward | 0.00 | 0.00 | 3.0500 ± 0.6353 | 2 | 2.060 |" in text
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["eval_loss"] == 3.0


def test_runs_get_a_core_or_a_gpu_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})

    assert [place.cores for place in places(None, False)] == [(0,), (1,), (2,), (3,)]
    assert [place.cores for place in places(2, False)] == [(0, 2), (1, 3)]
    assert len(places(None, True)) == 1
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(queue, "_GPUS", tmp_path)
    (tmp_path / "0000:01:00.0").touch()
    assert [place.environment for place in places(None, False)] == [{"CUDA_VISIBLE_DEVICES": "0"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7f,5,-1,3")
    assert len(places(None, False)) == 3
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(2, False)] == ["2", "GPU-7f"]
    assert shortened(SCALES["laptop"], 200).warmup_steps == 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pipeline_resumes_after_a_kill(tmp_path: Path):
    """The main comparison at scale `ci`, in less than 4 minutes on two quiet cores."""
    command = [
        sys.executable,
        "-m",
        "dsmoe_jax",
        "reproduce",
        "--scale",
        "ci",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "x"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results, runs = tmp_path / "x/results", tmp_path / "x/runs"
    complete: dict[str, bytes] = {}
    begun: set[str] = set()  # runs with their first checkpoint
    while first.poll() is None and not (len(complete) >= 2 and begun):
        time.sleep(0.05)
        complete = {path.name: path.read_bytes() for path in results.glob("*.json")}
        begun = {path.parts[-3] for path in runs.glob("*/checkpoints/step-00000007")}
    first.send_signal(signal.SIGKILL)
    first.wait()
    complete = {path.name: path.read_bytes() for path in results.glob("*.json")}
    assert 2 <= len(complete) < 12

    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)

    assert len(list(results.glob("*.json"))) == 12
    assert {name: (results / name).read_bytes() for name in complete} == complete
    resumed = {path.name[:-5]: json.loads(path.read_text())["resumed_from"] for path in results.glob("*.json")}
    assert any(resumed[name] > 0 for name in begun)
    report = json.loads((tmp_path / "x/report.json").read_text())
    assert len(report["outcomes"]) == 8
    assert set(report["ablations"]) == {"deepseek_moe", "gshard_x1.5"}
    for run_fields in report["runs"]:  # of the same tokens
        for measured in report["ablations"].get(run_fields["variant"], []):
            if measured["seed"] == run_fields["seed"]:
                assert measured["losses"][0]["loss"] == pytest.approx(run_fields["eval_loss"], rel=0.03)
    assert len(Experiment.read(tmp_path / "x").jobs) == 12
    with pytest.raises(ValueError, match="is another experiment"):
        reproduce(tmp_path / "x", scale="laptop")
