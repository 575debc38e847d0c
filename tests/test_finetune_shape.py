"""Default sequence length and batch size of fine-tuning, short runs, and lengths beyond the trained context."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsmoe_jax.config import ModelConfig, RopeScaling
from dsmoe_jax.model import DeepSeekMoE, _warn_beyond_context
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig, examples, open_examples
from dsmoe_jax.train.shape import fit_batch_size, fit_sequence_length
from tests.helpers.small import SMALL

LENGTHS = (5, 90)  # characters of the completions


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty examples, short and long."""
    home = tmp_path_factory.mktemp("shape")
    for size in LENGTHS:
        rows = [{"prompt": f"question {n}", "completion": "ab " * size} for n in range(50)]
        (home / f"{size}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def config(home: Path, out: Path, checkpoint: Path, size: int = 5, **fields: Any) -> FinetuneConfig:
    data = ExamplesConfig(files=(str(home / f"{size}.jsonl"),), **fields.pop("data", {}))
    return FinetuneConfig(output_dir=str(out), init_from=str(checkpoint), data=data, **fields)


@pytest.mark.parametrize(
    ("longest", "limit", "want"), [(1, 1024, 64), (64, 1024, 64), (65, 1024, 128), (999, 1024, 1024), (65, 100, 100)]
)
def test_the_length_holds_the_longest_example(longest: int, limit: int, want: int):
    assert fit_sequence_length(longest, limit) == want


@pytest.mark.parametrize(
    ("sequences", "multiple", "want"), [(0, 1, 1), (150, 1, 2), (10_000, 1, 64), (150, 8, 8), (10_000, 12, 48)]
)
def test_the_batch_size_leaves_forty_steps(sequences: int, multiple: int, want: int):
    assert fit_batch_size(sequences, multiple) == want


@pytest.mark.parametrize("size", LENGTHS)
def test_defaults_fit_the_data(home: Path, tmp_path: Path, checkpoint: Path, size: int):
    one = config(home, tmp_path, checkpoint, size)

    corpus, steps = examples(one, SMALL, tmp_path)

    train = open_examples(one, SMALL, tmp_path)[1]
    assert corpus.stream.sequence_length == fit_sequence_length(int(train.lengths.max()), 1024) <= 320
    assert corpus.stream.batch_size <= 2
    assert steps > 20
    assert corpus.settings.items() <= corpus.stream.identity.items()


def test_explicit_values_are_kept_and_a_short_run_is_logged(
    home: Path, tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
):
    one = config(home, tmp_path, checkpoint, data={"sequence_length": 1024, "batch_size": 64, "val_fraction": 0.0})

    corpus, steps = examples(one, SMALL, tmp_path)

    assert corpus.settings == {"sequence_length": 1024, "batch_size": 64}
    assert steps < 4
    text = f"50 examples × 3 epochs = {steps} step{'s' if steps > 1 else ''} at batch size 64 × 1024 tokens: decrease"
    assert text in caplog.text


def test_the_batch_size_is_a_multiple_of_the_mesh(home: Path, tmp_path: Path, checkpoint: Path):
    corpus, _ = examples(config(home, tmp_path, checkpoint), SMALL, tmp_path, batch_multiple=6)

    assert corpus.stream.batch_size == 6


def test_lengths_stay_within_the_trained_context(home: Path, tmp_path: Path, checkpoint: Path):
    model = dataclasses.replace(SMALL, max_position_embeddings=48)

    corpus, _ = examples(config(home, tmp_path, checkpoint, 90), model, tmp_path)

    assert corpus.stream.sequence_length == 48


def test_a_resumed_run_keeps_its_batch_and_length(home: Path, tmp_path: Path, checkpoint: Path):
    write_json(tmp_path / "run.json", {"data": {"sequence_length": 192, "batch_size": 5}})

    corpus, _ = examples(config(home, tmp_path, checkpoint), SMALL, tmp_path, resuming=True)
    fresh, _ = examples(config(home, tmp_path, checkpoint), SMALL, tmp_path)

    assert corpus.settings == {"sequence_length": 192, "batch_size": 5}
    assert corpus.inputs["options"]["data.sequence_length"] == 192
    assert fresh.settings != corpus.settings


def test_a_resumed_batch_must_divide_over_the_mesh(home: Path, tmp_path: Path, checkpoint: Path):
    write_json(tmp_path / "run.json", {"data": {"batch_size": 5}})

    with pytest.raises(ValueError, match=r"data.batch_size must be a multiple of 4, got 5"):
        examples(config(home, tmp_path, checkpoint), SMALL, tmp_path, resuming=True, batch_multiple=4)


def test_a_fitted_length_resumes_when_it_is_set(home: Path, tmp_path: Path, checkpoint: Path):
    fitted, _ = examples(config(home, tmp_path, checkpoint), SMALL, tmp_path)

    given, _ = examples(config(home, tmp_path, checkpoint, data=fitted.settings), SMALL, tmp_path)

    assert (given.inputs, given.stream.identity) == (fitted.inputs, fitted.stream.identity)


def test_a_fitted_length_does_not_tokenize_again(home: Path, tmp_path: Path, checkpoint: Path):
    fitted, _ = examples(config(home, tmp_path, checkpoint), SMALL, tmp_path)

    for length in (fitted.stream.sequence_length, 8):  # 8 truncates
        examples(config(home, tmp_path, checkpoint, data={"sequence_length": length}), SMALL, tmp_path)

    assert len(list((tmp_path / "examples").iterdir())) == 2


def test_few_steps_are_logged(home: Path, tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture):
    examples(config(home, tmp_path, checkpoint, steps=6), SMALL, tmp_path)

    assert "6 steps hardly train: pass at least --steps 20" in caplog.messages


# Beyond the trained context


def test_scaling_extends_the_context():
    scaled = dataclasses.replace(SMALL, max_position_embeddings=100, rope_scaling=RopeScaling("linear", 2.5))

    assert (ModelConfig().context_length, scaled.context_length) == (2048, 250)


def test_calls_beyond_the_context_are_logged_once(caplog: pytest.LogCaptureFixture):
    model = DeepSeekMoE.init(dataclasses.replace(SMALL, max_position_embeddings=4))
    _warn_beyond_context.cache_clear()

    for length in (4, 5, 5):
        jax.eval_shape(model, jnp.ones((1, length), int))

    assert [line.message for line in caplog.records] == ["Sequences of 5 tokens exceed the model's context length 4"]
