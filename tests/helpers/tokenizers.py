"""Tiny tokenizers of both backends, as fixtures to assign in a test module."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = [
    "",
    "a",
    " the quick  fox ",
    "def f(x):\n    return x\n",
    "你好, wörld 👩‍👧",
    "x\ufffdy",
    "tab\tnul\0",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello 100%"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="session")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    library.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore
    library.train_from_iterator(["the quick brown fox, the lazy dog"] * 9, trainer)
    library.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    library.save(str(path))
    return path


def train_model(path: Path, **options: Any) -> Path:
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
            sentence_iterator=iter(["the quick brown fox, the lazy dog", "user assistant hello world"] * 9),
            model_writer=file,
            **{"vocab_size": 300, "model_type": "bpe", "byte_fallback": True} | options,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    return train_model(path, normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(params=["json_file", "model_file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a copy of a tokenizer of either backend."""
    source: Path = request.getfixturevalue(request.param)
    (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path


@pytest.fixture
def json_folder(json_file: Path, tmp_path: Path) -> Path:
    (tmp_path / json_file.name).write_bytes(json_file.read_bytes())
    return tmp_path


@pytest.fixture
def model_folder(model_file: Path, tmp_path: Path) -> Path:
    (tmp_path / model_file.name).write_bytes(model_file.read_bytes())
    return tmp_path


def configure(folder: Path, **config: Any) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder)
