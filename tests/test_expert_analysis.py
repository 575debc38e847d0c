"""Experts switched off and routing of a checkpoint, against the NumPy reference and counts by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsmoe_jax.cli.experiments import disabled_experts
from dsmoe_jax.experiments import ablate, routes
from dsmoe_jax.experiments.ablations import paper_settings
from dsmoe_jax.experiments.routing import _Counts
from dsmoe_jax.experiments.texts import check_limits, read_documents, sequences
from dsmoe_jax.experiments.variants import SCALES, model_config
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
    np.testing.assert_allclose(found.coactivation * (1 - np.eye(4)), pairs / np.maximum(pairs.sum(axis=1), 1)[:, None])
    entropy = lambda shares: -sum(share * math.log2(share) for share in shares if share)  # noqa: E731
    information = entropy(np.mean(loads, axis=0)) - np.mean([entropy(load) for load in loads])
    assert found.mutual_information == pytest.approx(information)
    assert json.loads((tmp_path / "routes.json").read_text())["tokens"] == [60, 60]
    assert (tmp_path / "routes.png").stat().st_size > 10_000


def test_the_routing_of_a_layer_is_counted():
    counts = _Counts(domains=2, experts=4)
    rows = {5: [(0, 1, 2)] * 8, 6: [(0, 1, 3)] * 6 + [(0, 2, 3)] * 2, 7: [(1, 2, 3)]}  # by token; the last is rare
    for domain, tokens in ((0, (5,)), (1, (6, 7))):
        for token in tokens:
            counts.add(domain, np.full(len(rows[token]), token), np.array(rows[token]))

    found = counts.summarize()

    load = np.array([[8, 8, 8, 0], [8, 7, 3, 9]]) / [[24], [27]]
    np.testing.assert_allclose(found.load, load)
    mean = load.mean(axis=0)
    assert found.load_entropy == pytest.approx(-(mean * np.log2(mean)).sum())
    np.testing.assert_allclose(found.coactivation[0], [1, 14 / 16, 10 / 16, 8 / 16])
    np.testing.assert_allclose(found.coactivation[3], [8 / 9, 7 / 9, 3 / 9, 1])
    assert found.top_tokens[0] == [(5, 1.0), (6, 1.0)]
    assert found.top_tokens[1:] == [[(5, 1.0), (6, 0.75)], [(5, 1.0), (6, 0.25)], [(6, 1.0)]]


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
    check_limits(2, 9999, model_config("dense", SCALES["ci"]))

    assert "sequence length 9999 exceeds the model's max_position_embeddings" in caplog.text
