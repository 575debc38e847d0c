"""A task from held-out texts, during training and after it."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.continuations import write_continuations
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train.config import CheckpointConfig, DataConfig, RunConfig
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.metrics import read_records
from dsmoe_jax.train.optimizer import OptimizerConfig
from tests.helpers.hf_folder import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]

QUESTIONS, STEPS = 60, 60
SCORE = "eval/continuations/acc_mutual_info"


def texts(seed: int, count: int) -> list[str]:
    """Texts that count from a random number on, in words."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    rng = random.Random(seed)
    return [" ".join(words[(start + i) % len(words)] for i in range(60)) for start in rng.choices(range(12), k=count)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a tokenizer, a model config, and a task of other texts."""
    pytest.importorskip("lm_eval", reason="evaluation needs lm_eval: pip install -e '.[eval]'")
    home = tmp_path_factory.mktemp("tasks")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(0, 80)))
    train_tokenizer(texts(0, 80), home / "tokenizer", 300)
    (home / "model.json").write_text(json.dumps(tiny(vocab_size=300).to_dict()))
    sizes: dict[str, Any] = {"context_chars": 60, "choice_chars": 30}
    write_continuations(texts(1, 60), home / "tasks", questions=QUESTIONS, **sizes)
    return home


def config(home: Path, out: Path, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "model": str(home / "model.json"),
        "steps": STEPS,
        "data": DataConfig(
            sources=(str(home / "texts.jsonl"),), tokenizer=str(home / "tokenizer"), sequence_length=64, batch_size=8
        ),
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "checkpoint": CheckpointConfig(interval=STEPS),
        "eval_interval": STEPS // 2,
        "eval_batches": 1,
        "eval_tasks": ("continuations",),
        "eval_tasks_include": (str(home / "tasks"),),
        "trackers": ("jsonl", "tensorboard"),
    }
    return RunConfig(**(fields | changes))


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    return home / "run"


@pytest.mark.slow
def test_trained_model_beats_chance_on_what_its_texts_teach(home: Path, trained: Path):
    run(config(home, trained))

    scores = {r["step"]: r[SCORE] for r in read_records(trained) if SCORE in r}
    assert list(scores) == [STEPS // 2, STEPS]
    chance = 25 + 3 * 100 * math.sqrt(0.25 * 0.75 / QUESTIONS)  # three standard errors
    assert scores[STEPS] > chance
    (events,) = trained.rglob("events.out.tfevents*")
    assert SCORE.encode() in events.read_bytes()


@pytest.mark.slow
def test_report_of_the_trained_model_has_the_same_score(home: Path, trained: Path, tmp_path: Path):
    from dsmoe_jax.evaluate import evaluate

    evaluate(trained / "model", suite="continuations", include_path=home / "tasks", out=tmp_path / "out")

    last = [r[SCORE] for r in read_records(trained) if SCORE in r][-1]
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert row["score"] == pytest.approx(last)
    assert f"{last:.1f}" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_tasks_of_a_lora_run_see_the_adapter(home: Path, trained: Path, tmp_path: Path):
    examples = "".join(json.dumps({"prompt": text[:40], "completion": text[40:80]}) + "\n" for text in texts(3, 24))
    (tmp_path / "examples.jsonl").write_text(examples)
    fields = {name: value for name, value in vars(config(home, tmp_path / "out", steps=2)).items() if name != "model"}
    fields |= {"data": ExamplesConfig(files=(str(tmp_path / "examples.jsonl"),)), "lora": LoraConfig(r=2)}

    run(FinetuneConfig(**(fields | {"init_from": str(trained / "model"), "eval_tasks_limit": 8})))

    assert [r["step"] for r in read_records(tmp_path / "out") if SCORE in r] == [2]


@pytest.mark.slow
def test_unknown_task_is_refused_before_training(home: Path, tmp_path: Path):
    with pytest.raises(DSMoEError, match="did you mean continuations"):
        run(config(home, tmp_path / "out", eval_tasks=("continuation",)))

    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_questions_have_one_true_answer(tmp_path: Path):
    held_out = ["".join(chr(97 + (i * j) % 26) for i in range(200)) for j in (1, 3, 5, 7)]

    task = write_continuations(held_out, tmp_path, questions=9, choices=3, context_chars=30, choice_chars=10)

    lines = [json.loads(line) for line in (tmp_path / "continuations" / "test.jsonl").read_text().splitlines()]
    assert task.name == "continuations.yaml"
    assert len(lines) == 9
    for line in lines:
        true = line["choices"][line["answer"]]
        assert any(line["context"] + true in text for text in held_out)
        assert len(set(line["choices"])) == 3


def test_short_texts_make_no_task(tmp_path: Path):
    with pytest.raises(DSMoEError, match="at least 4 passages of 480 characters, got 0"):
        write_continuations(["short"], tmp_path / "out")

    assert not (tmp_path / "out").exists()
