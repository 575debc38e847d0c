"""Tokenizer: encoding, decoding and streaming with both backends, and the vectors of the original."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files
from tests.helpers import tokenizers
from tests.helpers.tokenizers import BOS, CHAT, EOS, TEXTS, configure, train_model

json_file, model_file, folder = tokenizers.json_file, tokenizers.model_file, tokenizers.folder
json_folder, model_folder = tokenizers.json_folder, tokenizers.model_folder
SHARED = Path(__file__).parents[2] / "shared" / "tokenizer"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    stream = tokenizer.decode_stream()
    return [stream.feed(i) for i in ids], stream.flush()


@pytest.fixture(scope="session")
def original() -> Tokenizer:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/tokenizer")
    return Tokenizer.from_pretrained(SHARED)


def test_original_vectors_encode_equal(original: Tokenizer):
    vectors = json.loads((SHARED / "vectors_raw.json").read_text())

    got = {v["text"]: original.encode(v["text"], add_special_tokens=False) for v in vectors}

    assert len(vectors) == 47
    assert got == {v["text"]: v["ids"] for v in vectors}


def test_original_vectors_with_bos_encode_and_decode_equal(original: Tokenizer):
    vectors = json.loads((SHARED / "vectors_with_bos.json").read_text())["vectors"]

    assert len(vectors) == 16
    for v in vectors:
        assert original.encode(v["text"]) == v["ids"]
        assert original.encode(v["text"], add_special_tokens=False) == v["ids_no_bos"]
        assert original.decode(v["ids"]) == v["decoded"]
        pieces, rest = streamed(original, v["ids"])
        assert "".join(pieces) + rest == v["decoded"]


@pytest.mark.parametrize("with_config", [True, False], ids="config={}".format)
def test_original_chats_render_equal(original: Tokenizer, with_config: bool, tmp_path: Path):
    vectors = json.loads((SHARED / "vectors_with_bos.json").read_text())["chat"]
    if not with_config:  # uses the default template and special tokens
        (tmp_path / "tokenizer.json").symlink_to(SHARED / "tokenizer.json")
        original = Tokenizer.from_pretrained(tmp_path)

    assert len(vectors) == 4
    for v in vectors:
        options = {"add_generation_prompt": v["add_generation_prompt"]}
        assert original.render_chat(v["messages"], **options) == v["text"]
        assert original.apply_chat_template(v["messages"], **options) == v["ids"]


def test_original_vocab_size_and_special_tokens(original: Tokenizer):
    assert original.vocab_size == 100015
    assert (original.bos_token, original.eos_token) == (BOS, EOS)
    assert (original.bos_token_id, original.eos_token_id, original.pad_token_id) == (100000, 100001, 100001)
    assert original.decode([17464, 100015, 102399, 1843]) == "Hello world"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_decode_inverts_encode(folder: Path, text: str):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("special", [True, False], ids="special={}".format)
@pytest.mark.parametrize("config", [{}, {"add_eos_token": True, "add_bos_token": False}], ids=["bos", "eos"])
def test_encode_batch_equals_encode(folder: Path, config: dict[str, bool], special: bool):
    tokenizer = configure(folder, **config)
    texts = [*TEXTS, tokenizer.eos_token or "", f"{tokenizer.bos_token}a {tokenizer.eos_token}b", "fox " * 500, *TEXTS]

    found = tokenizer.encode_batch(iter(texts), add_special_tokens=special)

    assert found == [tokenizer.encode(text, add_special_tokens=special) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_bos_is_first_without_a_config(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    with_bos, without = tokenizer.encode("the fox"), tokenizer.encode("the fox", add_special_tokens=False)

    assert with_bos == [tokenizer.bos_token_id, *without]
    assert tokenizer.bos_token_id not in without


def test_config_controls_bos_and_eos(folder: Path):
    plain = Tokenizer.from_pretrained(folder).encode("the fox", add_special_tokens=False)

    tokenizer = configure(folder, add_bos_token=False, add_eos_token=True)

    assert tokenizer.encode("the fox") == [*plain, tokenizer.eos_token_id]


def test_post_processor_adds_bos_once(json_folder: Path):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    bos = next(token["id"] for token in content["added_tokens"] if token["content"] == BOS)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }
    (json_folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(json_folder)

    assert tokenizer.encode("fox").count(bos) == 1
    assert tokenizer.encode("fox", add_special_tokens=False).count(bos) == 0


def test_truncation_of_tokenizer_json_is_not_applied(json_folder: Path):
    expected = Tokenizer.from_pretrained(json_folder).encode("the quick brown fox")
    content = json.loads((json_folder / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (json_folder / "tokenizer.json").write_text(json.dumps(content))

    assert Tokenizer.from_pretrained(json_folder).encode("the quick brown fox") == expected


def test_special_tokens_as_dicts_and_a_separate_pad_token(json_folder: Path):
    tokenizer = configure(json_folder, bos_token={"content": EOS, "special": True}, pad_token=BOS, eos_token=None)

    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, None, None)
    assert tokenizer.decode([tokenizer.pad_token_id or 0], skip_special_tokens=False) == BOS


def test_pad_falls_back_to_eos(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_special_token_string_is_encoded_as_its_token(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    fox, dog = (tokenizer.encode(text, add_special_tokens=False) for text in ("fox", "dog"))

    ids = tokenizer.encode(f"fox{tokenizer.eos_token}dog")

    assert ids == [tokenizer.bos_token_id, *fox, tokenizer.eos_token_id, *dog]
    assert EOS not in tokenizer.decode(ids)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == f"{tokenizer.bos_token}fox{tokenizer.eos_token}dog"


def test_added_tokens_extend_a_sentencepiece_model(model_folder: Path):
    pieces = Tokenizer.from_pretrained(model_folder).vocab_size
    added = {
        "1": {"content": "<s>", "special": True},
        str(pieces): {"content": "<|end|>", "special": True},
        str(pieces + 2): {"content": "<|tool|>", "special": False},
    }

    tokenizer = configure(model_folder, added_tokens_decoder=added, eos_token="<|end|>")

    assert tokenizer.vocab_size == pieces + 3
    assert tokenizer.eos_token_id == pieces
    ids = tokenizer.encode("fox<|tool|>dog<|end|>")
    assert pieces in ids
    assert pieces + 2 in ids
    assert tokenizer.decode([*ids, pieces + 1]) == "fox<|tool|>dog"


def test_model_without_control_pieces_has_no_special_tokens(tmp_path: Path):
    train_model(tmp_path / "tokenizer.model", bos_id=-1, eos_id=-1)

    tokenizer = Tokenizer.from_pretrained(tmp_path)

    assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.pad_token_id) == (None, None, None)
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


def test_ids_beyond_the_vocabulary_decode_to_nothing(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("the fox")

    assert tokenizer.decode([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 99, 2**40]) == "the fox"


def test_decode_accepts_arrays(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.decode(np.array(tokenizer.encode("the fox"), np.int32)) == "the fox"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_stream_never_splits_a_character(folder: Path, text: str):
    tokenizer = Tokenizer.from_pretrained(folder)

    pieces, rest = streamed(tokenizer, tokenizer.encode(text))

    assert "".join(pieces) + rest == text
    assert rest == ""
    assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_stream_of_random_ids_equals_decode(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    chance = random.Random(0)

    for _ in range(300):
        ids = [chance.randrange(tokenizer.vocab_size + 3) for _ in range(chance.randrange(40))]
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids), ids


def test_stream_keeps_spaces_that_sentencepiece_drops(tmp_path: Path):
    train_model(tmp_path / "tokenizer.model")  # removes extra spaces as well
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    the, space = (tokenizer.encode(text, add_special_tokens=False) for text in ("the", "␠"))
    ids = [*the, *space[:1], *space[:1], *the, *the]

    pieces, rest = streamed(tokenizer, ids)

    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_flush_returns_the_incomplete_character(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    stream = tokenizer.decode_stream()
    *ids, _ = tokenizer.encode("fox 你")

    pieces = [stream.feed(i) for i in ids]

    assert "".join(pieces) == "fox "
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_stream_survives_an_invalid_id(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    stream = tokenizer.decode_stream()

    with pytest.raises(ValueError, match="must not be negative, got -1"):
        stream.feed(-1)

    assert "".join(map(stream.feed, tokenizer.encode("fox"))) == "fox"


def test_files_are_those_copied_with_a_checkpoint(folder: Path):
    for name in ("model.safetensors", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text("{}")

    tokenizer = configure(folder)

    names = [path.name for path in tokenizer.files]
    assert names[1:] == ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    assert names[0].startswith("tokenizer.")
    assert tokenizer.files == tokenizer_files(folder)
    assert tokenizer_files(folder / "nowhere") == ()


def test_tokenizer_json_is_preferred(json_folder: Path, model_file: Path):
    (json_folder / "tokenizer.model").write_bytes(model_file.read_bytes())

    assert Tokenizer.from_pretrained(json_folder).bos_token == BOS


def test_import_loads_no_heavy_library():
    heavy = {"jax", "tokenizers", "sentencepiece", "jinja2"}
    program = f"import sys, dsmoe_jax.text.tokenizer; print({heavy} & set(sys.modules))"

    got = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True)

    assert (got.stdout.strip(), got.stderr) == ("set()", "")


def test_special_tokens_are_counted(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.count_special_tokens("the quick fox") == 0
    assert tokenizer.count_special_tokens(f"{tokenizer.eos_token}a{tokenizer.bos_token}{tokenizer.eos_token}") == 3


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "text": (lambda t: t.encode(b"x"), "text must be a string, got bytes"),
    "surrogate": (lambda t: t.encode("ab\ud800"), "lone surrogate at character 2"),
    "text of several": (lambda t: t.encode_batch(["a", b"x"]), "text must be a string, got bytes"),
    "surrogate of several": (lambda t: t.encode_batch(["a", "ab\ud800"]), "lone surrogate at character 2"),
    "one text for several": (lambda t: t.encode_batch("ab"), "texts must be an iterable of strings, got one"),
    "negative": (lambda t: t.decode([3, -2]), "token ids must not be negative, got -2"),
    "float": (lambda t: t.decode([1.5]), "must be a flat sequence of integers"),
    "nested": (lambda t: t.decode(np.zeros((1, 2), int)), "must be a flat sequence of integers"),
    "number": (lambda t: t.decode(5), "must be a flat sequence of integers"),
    "no role": (lambda t: t.render_chat([CHAT[0], {"content": "x"}]), "message 1 has no 'role'"),
    "no content": (lambda t: t.render_chat([{"role": "user"}]), "message 0 has no 'content'"),
    "role": (
        lambda t: t.apply_chat_template([{"role": "tool", "content": "x"}]),
        "message 0 has role 'tool', which the chat template ignores; allowed are system, user, assistant",
    ),
    "content": (
        lambda t: t.render_chat([{"role": "user", "content": 7}]),
        "message 0: content must be a string or a list, got int",
    ),
    "part": (
        lambda t: t.render_chat([{"role": "user", "content": [{"type": "text"}]}]),
        "message 0: part 0 of content has no string as 'text'",
    ),
    "image": (
        lambda t: t.render_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "message 0: part 0 of content has type 'image_url'; only 'text' is supported",
    ),
    "message": (lambda t: t.render_chat("Hi"), "message 0 must be a mapping with role and content, got str"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_invalid_input_error_names_the_value(folder: Path, call: Callable[[Any], Any], message: str):
    tokenizer = Tokenizer.from_pretrained(folder)

    with pytest.raises(ValueError, match=message):
        call(tokenizer)
