"""Tokenizers in GGUF files: llama.cpp's ids are ours, or the export is refused. Start at `test_text_has_our_ids`."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.convert import import_hf
from dsmoe_jax.convert.gguf_export import export_gguf
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers import golden
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf
from tests.helpers.llama_cpp import byte_tokenizer, server
from tests.helpers.tokenizers import CHAT, train_model

gguf = pytest.importorskip("gguf", reason="the writer is gguf: pip install -e '.[gguf]'")

SYMBOLS = {"user_defined_symbols": ["<sep>", "quickfox"], "control_symbols": ["<ctl>"]}
# Without a space before the text there are no spaces next to symbols.
NO_PREFIX = {"legacy": False, "add_prefix_space": False}


def sentencepiece_source(work: Path, settings: dict[str, Any], **options: Any) -> Path:
    """Return a Hugging Face folder with a sentencepiece tokenizer."""
    config = tiny(vocab_size=320, bos_token_id=1, eos_token_id=2)
    source = write_hf(work / "hf", config, random_params(config))
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
    train_model(source / "tokenizer.model", **options)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | settings))
    return source


def test_text_has_our_ids(tmp_path: Path):
    texts = ["def f(x):\n    return x", "Grüße 12345 ｜", "  a\t\tb", "<｜end▁of▁sentence｜>"]
    config = tiny(vocab_size=320)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    make_tokenizer(tmp_path / "tokenizer", 300)
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(source / file.name)
    import_hf(source, tmp_path / "native")
    export_gguf(tmp_path / "native", tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        ids = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]
        back = [post("/detokenize", tokens=one[1:])["content"] for one in ids[:3]]

    assert ids == Tokenizer.from_pretrained(tmp_path / "native").encode_batch(texts)
    assert back == texts[:3]


@pytest.mark.parametrize(("settings", "options"), [
    ({"legacy": False}, {}),
    ({"legacy": True}, {}),
    ({"legacy": True}, {"add_dummy_prefix": False, **SYMBOLS}),
    (NO_PREFIX, SYMBOLS),
    (NO_PREFIX | {"added_tokens_decoder": {"319": {"content": "<add>", "special": False}}}, {}),
], ids=["not legacy", "legacy", "no dummy prefix", "symbols", "added token"])  # fmt: skip
def test_sentencepiece_text_has_our_ids(settings: dict[str, Any], options: dict[str, Any], tmp_path: Path):
    texts = [
        "the quick brown fox",
        " two  spaces",
        "wörld 你",
        "line\nbreak",
        "the<sep> quickfox",
        "<sep>",
        "a<add> b",
        "",
    ]
    source = sentencepiece_source(tmp_path, settings, **options)
    export_gguf(source, tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        ids = [post("/tokenize", content=text, add_special=True)["tokens"] for text in texts]

    assert ids == Tokenizer.from_pretrained(source).encode_batch(texts)


def test_types_of_sentencepiece_tokens(tmp_path: Path):
    source = sentencepiece_source(tmp_path, NO_PREFIX, **SYMBOLS)

    export_gguf(source, tmp_path / "model.gguf")

    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    names = ("<unk>", "</s>", "<ctl>", "<sep>", "quickfox", "<0x41>", "▁the", "[PAD319]")
    want = ("UNKNOWN", "CONTROL", "CONTROL", "USER_DEFINED", "USER_DEFINED", "BYTE", "NORMAL", "UNUSED")
    assert tuple(gguf.TokenType(types[tokens.index(name)]).name for name in names) == want


@pytest.mark.parametrize(("options", "message"), [
    ({"model_type": "unigram", "byte_fallback": False, "vocab_size": 60}, "needs a BPE model, got a unigram one"),
    ({"normalization_rule_name": "nmt_nfkc"}, "does not normalize text, which this model does"),
    ({"byte_fallback": False}, "encodes unknown characters as bytes, which this model does not"),
    ({"treat_whitespace_as_suffix": True}, "does not support spaces as suffixes"),
    (SYMBOLS, "encodes text next to token '<sep>' otherwise"),
], ids=["unigram", "normalization", "no bytes", "suffix", "symbols after a space"])  # fmt: skip
def test_other_sentencepiece_models_are_refused(options: dict[str, Any], message: str, tmp_path: Path):
    source = sentencepiece_source(tmp_path, {"legacy": False}, **options)

    with pytest.raises(DSMoEError, match=rf"llama\.cpp {message}"):
        export_gguf(source, tmp_path / "model.gguf")

    assert not (tmp_path / "model.gguf").exists()


def test_unused_pieces_are_refused(tmp_path: Path):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

    source = sentencepiece_source(tmp_path, NO_PREFIX)
    model = ModelProto.FromString((source / "tokenizer.model").read_bytes())
    model.pieces[262].type = ModelProto.SentencePiece.UNUSED
    (source / "tokenizer.model").write_bytes(model.SerializeToString())

    with pytest.raises(DSMoEError, match=r"llama\.cpp does not resegment unused pieces"):
        export_gguf(source, tmp_path / "model.gguf")


def test_other_text_next_to_special_tokens_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = sentencepiece_source(tmp_path, {"legacy": False})

    with caplog.at_level(logging.WARNING):
        export_gguf(source, tmp_path / "model.gguf")

    assert [record.getMessage() for record in caplog.records] == [
        f"{source}: llama.cpp encodes text next to token '<s>' otherwise"
    ]


def test_chats_are_rendered_alike(tmp_path: Path):
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'].strip() }}{{ eos_token }}\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    source = write_hf(tmp_path / "hf", tiny(vocab_size=320), random_params(tiny(vocab_size=320)))
    make_tokenizer(tmp_path / "tokenizer", 300)
    fields = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": template}))
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(source / file.name)
    export_gguf(source, tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        prompt = post("/apply-template", messages=CHAT)["prompt"]
        ids = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]

    ours = Tokenizer.from_pretrained(source)
    text = ours.render_chat(CHAT, add_generation_prompt=True)
    assert prompt in (text, text.removeprefix(str(ours.bos_token)))
    assert ids == ours.encode(text, add_special_tokens=False)


def test_deepseek_tokenizer_has_our_ids(tmp_path: Path):
    folder = golden.SHARED / "tokenizer"
    if not folder.is_dir():
        pytest.skip("DeepSeek's tokenizer is in ../shared, which is absent")
    texts = [vector["text"] for vector in json.loads((folder / "vectors_raw.json").read_text()) if vector["text"]]
    config = tiny(vocab_size=102400)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, source / name)
    import_hf(source, tmp_path / "native")
    export_gguf(tmp_path / "native", tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        found = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]

    assert found == Tokenizer.from_pretrained(tmp_path / "native").encode_batch(texts)


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path):
    config = tiny(vocab_size=320)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    byte_tokenizer(source, 320)
    fields = json.loads((source / "tokenizer.json").read_text())
    fields["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(fields))
    import_hf(source, tmp_path / "native")

    with pytest.raises(DSMoEError, match=r"tokenizer\.json: llama\.cpp has no pre-tokenizer equal to this one"):
        export_gguf(tmp_path / "native", tmp_path / "model.gguf")


def test_added_tokens_with_flags_are_refused(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(vocab_size=320), random_params(tiny(vocab_size=320)))
    byte_tokenizer(source, 300)
    fields = json.loads((source / "tokenizer.json").read_text())
    flags = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    fields["added_tokens"] = [{"id": 300, "content": "<sep>", **flags}]
    (source / "tokenizer.json").write_text(json.dumps(fields))

    with pytest.raises(DSMoEError, match=r"llama\.cpp does not support single_word of added token '<sep>'"):
        export_gguf(source, tmp_path / "model.gguf")
