"""The paper's experiments: variants, comparisons, ablations and routing of a checkpoint, the report."""

import contextlib
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

from dsmoe_jax.cli.experiments import disabled_experts
from dsmoe_jax.experiments import ablate, queue, reproduce, routes
from dsmoe_jax.experiments.ablations import paper_settings
from dsmoe_jax.experiments.comparisons import compare, interval
from dsmoe_jax.experiments.plan import Experiment, Job
from dsmoe_jax.experiments.queue import Place, places
from dsmoe_jax.experiments.report import write_report
from dsmoe_jax.experiments.texts import check_window, read_documents, sequences
from dsmoe_jax.experiments.variants import SCALES, VARIANTS, model_config, run_config, shortened
from dsmoe_jax.info import count_parameters
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.loading import load
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.data import tokenize
from tests.helpers import reference
from tests.helpers.command import run

pytestmark = pytest.mark.heavy

TEXTS = ("The quick brown fox jumps over the lazy dog. " * 6, "def add(a, b):\n    return a + b\n" * 6)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "prose.txt", folder / "code.txt"]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


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
        "gshard": near,
        "switch": {0: 1.9, 1: 2.0, 2: 2.1},
        "deepseek_moe": {0: 1.0},
    }

    verdicts = {(one.comparison.better, one.comparison.worse): one.verdict for one in compare(losses)}

    assert verdicts == {
        ("hash", "dense"): "as in the paper",
        ("switch", "dense"): "as in the paper",
        ("gshard", "hash"): "undecided",
        ("gshard", "switch"): "contrary",
        ("deepseek_moe", "gshard"): "undecided",  # one pair
    }


def test_variants_that_the_paper_finds_equal_are_contradicted_or_not():
    losses = {"deepseek_moe": {0: 2.0, 1: 2.1, 2: 2.2}, "gshard_x1.5": {0: 2.02, 1: 2.09, 2: 2.21}}
    worse = {name: {seed: loss - 0.3 for seed, loss in found.items()} for name, found in losses.items()}

    assert [one.verdict for one in compare(losses)] == ["not contradicted"]
    assert [one.verdict for one in compare(losses | {"gshard_x1.5": worse["gshard_x1.5"]})] == ["contrary"]


def test_sensitivity_is_the_rise_of_the_loss_with_experts_disabled():
    # disable_top 1/16 of 63 and of 16 routed experts
    deep = {seed: {Ablation(): 2.0 + seed, Ablation(disable_top=4): 5.0 + seed} for seed in range(3)}
    wide = {seed: {Ablation(): 2.0, Ablation(disable_top=1): 3.0 + 0.1 * seed} for seed in range(3)}

    (found,) = compare({}, {"deepseek_moe": deep, "gshard_x1.5": wide})

    assert found.mean == pytest.approx(3.0 - 1.1)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert found.paper == pytest.approx((7.468 - 1.808) - (5.586 - 1.808))
    assert found.verdict == "as in the paper"


@pytest.mark.slow
def test_losses_under_ablations_equal_the_reference(checkpoint: Path, tmp_path: Path):
    model, tokenizer = load(checkpoint), Tokenizer.from_pretrained(checkpoint)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text[:40]}) + "\n" for text in TEXTS))
    ablations = [Ablation(disable_top=1), Ablation(active=1), Ablation(shared=False)]

    measured = ablate(model, tokenizer, tmp_path / "texts.jsonl", ablations=ablations, window=20, out=tmp_path / "x")

    documents = [[*tokenizer.encode(text[:40]), tokenizer.eos_token_id] for text in TEXTS]
    for one in measured:
        losses = []
        for ids in documents:
            for done in range(1, len(ids), 20):
                end = min(done + 20, len(ids))
                first = max(0, end - 21)  # the last window has as much context as fits
                logits = reference.forward(model, [ids[first : end - 1]], ablation=one.ablation).logits[0]
                rows = zip(logits[done - first - 1 :], ids[done:end], strict=True)
                losses += [-np.log(reference.softmax(row)[token]) for row, token in rows]
        assert one.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert [one.ablation for one in measured] == [Ablation(), *ablations]
    fields = json.loads((tmp_path / "x/ablations.json").read_text())
    assert (fields["tokens"], len(fields["losses"])) == (sum(len(ids) - 1 for ids in documents), 4)
    assert (tmp_path / "x/ablations.png").stat().st_size > 10_000


def test_documents_are_cut_and_packed_as_for_training(checkpoint: Path, texts: list[Path], tmp_path: Path):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenize([tmp_path / "texts.jsonl"], checkpoint, tmp_path / "shards", val_fraction=0)
    sizes = {"vocab_size": tokenizer.vocab_size}

    whole = read_documents(tmp_path / "shards", None, 10_000, **sizes)
    cut = read_documents(tmp_path / "shards", None, len(whole[0]) + 5, **sizes)

    assert read_documents(tmp_path / "texts.jsonl", tokenizer, 10_000, **sizes) == sorted(whole, key=len, reverse=True)
    assert sorted(whole) == sorted([*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS)
    assert cut == [whole[0], whole[1][:5]]
    token_ids, _, segment_ids, positions = sequences([[5, 6, 7], [8, 9]], 4).swapaxes(0, 1)
    assert token_ids.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert segment_ids.tolist() == [[1, 1, 1, 2], [1, 0, 0, 0]]
    assert positions[0].tolist() == [0, 1, 2, 0]


def test_the_papers_ablations_fit_every_model():
    config = model_config("deepseek_moe", SCALES["laptop"])
    found = paper_settings(config)

    assert [one.disable_top for one in found if one.disable_top] == [4, 8, 12, 16]
    assert [one.active for one in found if one.active] == [6, 5, 4, 3]
    assert [one.shared for one in found].count(False) == 1
    assert paper_settings(model_config("switch", SCALES["laptop"])) == [Ablation(disable_top=n) for n in (1, 2, 3, 4)]


def test_routes_equal_counts_by_hand(checkpoint: Path, texts: list[Path], tmp_path: Path):
    model, tokenizer = load(checkpoint), Tokenizer.from_pretrained(checkpoint)

    found = routes(model, tokenizer, texts, max_tokens=60, window=20, out=tmp_path)[1]

    loads, pairs = [], np.zeros((4, 4))
    for text in TEXTS:
        ids = np.array(tokenizer.encode(text)[:60]).reshape(3, 20)
        chosen = np.asarray(model(ids).routing[1].ids).reshape(-1, 2)
        loads.append(np.bincount(chosen.ravel(), minlength=4) / chosen.size)
        for one, other in chosen:
            pairs[one, other] += 1
            pairs[other, one] += 1
    np.testing.assert_allclose(found.load, loads)
    np.testing.assert_allclose(found.together * (1 - np.eye(4)), pairs / np.maximum(pairs.sum(axis=1), 1)[:, None])
    entropy = lambda shares: -sum(share * math.log2(share) for share in shares if share)  # noqa: E731
    information = entropy(np.mean(loads, axis=0)) - np.mean([entropy(load) for load in loads])
    assert found.mutual_information == pytest.approx(information)
    assert json.loads((tmp_path / "routes.json").read_text())["tokens"] == [60, 60]
    assert (tmp_path / "routes.png").stat().st_size > 10_000


def test_the_verbs_print_their_tables(checkpoint: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]):
    options = ["--data", *map(str, texts), "--max-tokens", 80, "--sequence-length", 20]

    assert run("ablate", checkpoint, *options, "--disable-top", "1,2", "--disable-experts", "1:0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "ablation",
        "none",
        "top 1 disabled",
        "top 2 disabled",
        "disabled 1:0",
    ]
    assert disabled_experts("1:3 2:0 1:0,3") == {1: (3, 0, 3), 2: (0,)}
    assert run("routes", checkpoint, *options, "--mesh", "data=2,expert=4") == 0
    assert "bits" in capsys.readouterr().out
    assert run("reproduce", "--plan", "--scale", "2b", "--variants", "dense,deepseek_moe") == 0
    assert "1991.7M" in capsys.readouterr().out


def test_experts_disabled_by_layer_are_in_the_figures_folder(checkpoint: Path, texts: list[Path], tmp_path: Path):
    ablations = [Ablation(disabled={1: (0,)}), Ablation(disabled=(3,))]

    measured = ablate(
        load(checkpoint),
        Tokenizer.from_pretrained(checkpoint),
        texts[0],
        ablations=ablations,
        max_tokens=9,
        out=tmp_path,
    )

    losses = json.loads((tmp_path / "ablations.json").read_text())["losses"]
    assert [row["disabled"] for row in losses] == [[], {"1": [0]}, [3]]
    assert [row["loss"] for row in losses] == [one.loss for one in measured]
    assert (tmp_path / "ablations.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "window": (("--sequence-length", "-5"), "sequence length must be at least 1, got -5"),
        "experts": (
            ("--disable-experts", "1;2"),
            "--disable-experts must be ID,ID or 'LAYER:ID,ID LAYER:ID', got '1;2'",
        ),
        "layer": (("--disable-experts", "0:1"), "ablation.disabled names layer 0; MoE layers are 1 to 1"),
        "top": (("--disable-top", "3"), "2 experts are active, but layer 1 has 1 of 4 left"),
        "active": (("--active", "0"), "ablation.active must be an integer of at least 1, got 0"),
        "tokens": (("--max-tokens", "1"), "max_tokens must be at least 2, got 1"),
    }.values(),
)
def test_bad_ablations_are_one_line(
    checkpoint: Path, texts: list[Path], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    assert run("ablate", checkpoint, "--data", *texts, *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"dsmoe ablate: {message}"


def test_a_window_beyond_the_trained_context_warns(caplog: pytest.LogCaptureFixture):
    check_window(9999, model_config("dense", SCALES["ci"]))

    assert "sequence length 9999 exceeds the model's max_position_embeddings" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "out": ((), "--out is required"),
        "variant": (("--variants", "dense,gshart", "--out", "x"), "variant must be one of .*, got 'gshart'.*"),
        "seeds": (("--seeds", "0", "--out", "x"), "seeds must be an integer of at least 1, got 0"),
        "report": (("--report-only", "--out", "x"), "x: no run is complete"),
        "devices": (("--plan", "--devices", "7"), ".*: devices must be a power of two up to 16, got 7"),
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


def test_texts_without_a_second_document_are_refused(texts: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match="no document is held out for validation: at least 2 documents are needed"):
        reproduce(tmp_path / "x", scale="ci", sources=texts[0])
    with pytest.raises(ValueError, match="missing"):
        reproduce(tmp_path / "y", sources=tmp_path / "missing.txt")
    assert not (tmp_path / "y").exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = experiment(tmp_path)

    @contextlib.contextmanager
    def process(experiment: Experiment, job: Job, place: Place):
        experiment.run_folder(job).mkdir(parents=True, exist_ok=True)
        (experiment.run_folder(job) / "log.txt").write_text("no memory\n")
        failed = job == Job("gshard", 0)
        if not failed:
            experiment.write_result(job, {"eval_loss": 2.0})
        yield mock.Mock(returncode=int(failed), **{"poll.return_value": int(failed)})

    monkeypatch.setattr(queue, "_process", process)

    assert queue.run_jobs(one, [Place({})]) == ["gshard-0 failed with exit code 1: no memory"]
    assert [job for job in one.jobs if one.result(job)] == [Job("dense", 0), Job("dense", 1), Job("gshard", 1)]


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
    one.ablation_file(Job("gshard_x1.5", 0)).parent.mkdir()
    one.ablation_file(Job("gshard_x1.5", 0)).write_text(json.dumps(fields))
    text = write_report(one).read_text()

    assert "| `gshard_x1.5` | top 1 disabled | 4.5000 | +1.500 | +3.778 |" in text
    assert text.index("## Decided before running") < text.index("## What came out") < text.index("## Losses")
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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7f,5")
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
    results = tmp_path / "x/results"
    while first.poll() is None and len(list(results.glob("*.json"))) < 2:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    complete = {path.name: path.read_bytes() for path in results.glob("*.json")}
    assert 2 <= len(complete) < 12

    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)

    assert len(list(results.glob("*.json"))) == 12
    assert {name: (results / name).read_bytes() for name in complete} == complete
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
