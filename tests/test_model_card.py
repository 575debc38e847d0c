"""Model cards promise what works, and state scores. Start at `test_card_names_readers_of_the_model`."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.model_card import model_card
from dsmoe_jax.errors import DSMoEError
from tests.helpers.hf_folder import make_tokenizer, tiny
from tests.helpers.tokenizers import train_model

VLLM, LLAMA_CPP = "vllm serve someone/x", "dsmoe export someone/x model.gguf"
TOKENIZER = 'AutoTokenizer.from_pretrained("someone/x", trust_remote_code=True'
ROW: dict[str, Any] = {"benchmark": "HellaSwag", "task": "hellaswag", "metric": "acc_norm,none", "shots": 0, "n": 1000}


def checkpoint(folder: Path, tokenizer: str = "json", **changes: Any) -> Path:
    """Return a folder with config and tokenizer, which is all that a card needs."""
    if tokenizer == "json":
        make_tokenizer(folder, 300)
    else:
        folder.mkdir()
    config: ModelConfig = tiny(vocab_size=320, **changes)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if tokenizer == "sentencepiece":
        options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        train_model(folder / "tokenizer.model", **options)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


def write_report(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    rows = [ROW | {"score": 43.21}, ROW | {"benchmark": "PIQA", "score": None}]
    (folder / "report.json").write_text(json.dumps({"rows": rows, "adapter": None} | fields))
    return folder


def front_matter(card: str, name: str) -> Any:
    (line,) = [line for line in card.split("---")[1].splitlines() if line.startswith(f"{name}: ")]
    return json.loads(line.removeprefix(f"{name}: "))


def test_card_names_readers_of_the_model(tmp_path: Path):
    card = model_card(checkpoint(tmp_path / "model"), "someone/x")

    assert f"{TOKENIZER})" in card
    for text in (f"{VLLM} --trust-remote-code`", LLAMA_CPP, "pip install -e '.[hub]'", 'generate("Hello"'):
        assert text in card
    assert "Evaluation" not in card


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, {"attention_bias": True}], ids=str)
def test_card_leaves_out_readers_of_other_models(changes: dict[str, Any], tmp_path: Path):
    card = model_card(checkpoint(tmp_path / "model", **changes), "someone/x")

    assert (VLLM in card, LLAMA_CPP in card, TOKENIZER in card) == (False, False, True)


def test_card_without_a_tokenizer_takes_token_ids(tmp_path: Path):
    card = model_card(checkpoint(tmp_path / "model", tokenizer=""), "someone/x")

    assert "generate([[1, 2, 3]]" in card
    assert "model(torch.tensor(" in card
    for text in ("AutoTokenizer", VLLM, LLAMA_CPP, "Hello"):
        assert text not in card


def test_card_of_sentencepiece_names_the_slow_tokenizer(tmp_path: Path):
    card = model_card(checkpoint(tmp_path / "model", tokenizer="sentencepiece"), "someone/x")

    assert f"{TOKENIZER}, use_fast=False)" in card
    assert f"{VLLM} --trust-remote-code --tokenizer-mode slow" in card
    assert "for some texts\nthe ids of transformers 5 differ" in card


def test_card_states_the_scores_of_an_evaluation(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    report = write_report(tmp_path / "results", limit=100, quantize="int8")

    card = model_card(checkpoint(tmp_path / "model"), "someone/x", evaluation=report)

    assert "| HellaSwag | 43.2 | acc_norm | 0 | 1,000 |" in card
    assert "By `dsmoe evaluate`, quantize int8, limit 100, in percent" in card
    assert "PIQA" not in card
    (entry,) = front_matter(card, "model-index")
    (result,) = entry["results"]
    assert entry["name"] == "x"
    assert result["dataset"] == {"name": "HellaSwag", "type": "hellaswag"}
    assert result["metrics"][0].items() >= {"type": "acc_norm", "value": 43.21}.items()


def test_scores_beside_the_checkpoint_are_its_own(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    model = checkpoint(tmp_path / "model")
    report = write_report(tmp_path / "scores", model=str(model)) / "report.json"
    stated = model_card(model, "someone/x")
    report.write_text(report.read_text().replace(str(model), str(tmp_path / "other")))

    assert "HellaSwag" in stated
    assert "HellaSwag" not in model_card(model, "someone/x")


@pytest.mark.parametrize(("content", "message"), [
    (None, "report.json: does not exist"),
    ('{"rows": 3}', r"report.json is no report of `dsmoe evaluate` with a score"),
], ids=["no report", "another file"])  # fmt: skip
def test_folder_without_scores_is_refused(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)

    with pytest.raises(DSMoEError, match=message):
        model_card(checkpoint(tmp_path / "model"), "someone/x", evaluation=tmp_path)
