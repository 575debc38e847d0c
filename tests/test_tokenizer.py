"""Tokenizer: both backends on tiny vocabularies trained here, and the original's vectors where at hand.

Read the fixtures first; bad input is the table `REFUSED` at the end.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.tokenizer import Tokenizer, tokenizer_files

SHARED = Path(__file__).parents[2] / "shared" / "tokenizer"
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
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return path


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    return train_model(path, normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(params=["json_file", "model_file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of its own with a tokenizer of either kind."""
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


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    stream = tokenizer.decode_stream()
    return [stream.feed(i) for i in ids], stream.flush()


@pytest.fixture(scope="session")
def original() -> Tokenizer:
    if not SHARED.is_dir():
        pytest.skip("the original tokenizer's files (../shared/tokenizer) are not here")
    return Tokenizer.from_pretrained(SHARED)


def test_original_encodes_its_raw_vectors(original: Tokenizer):
    vectors = json.loads((SHARED / "vectors_raw.json").read_text())

    got = {v["text"]: original.encode(v["text"], add_special_tokens=False) for v in vectors}

    assert len(vectors) == 47
    assert got == {v["text"]: v["ids"] for v in vectors}


def test_original_adds_its_bos_and_decodes_as_transformers_does(original: Tokenizer):
    vectors = json.loads((SHARED / "vectors_with_bos.json").read_text())["vectors"]

    assert len(vectors) == 16
    for v in vectors:
        assert original.encode(v["text"]) == v["ids"]
        assert original.encode(v["text"], add_special_tokens=False) == v["ids_no_bos"]
        assert original.decode(v["ids"]) == v["decoded"]
        pieces, rest = streamed(original, v["ids"])
        assert "".join(pieces) + rest == v["decoded"]


@pytest.mark.parametrize("with_config", [True, False], ids="config={}".format)
def test_original_chats_come_out_equal(original: Tokenizer, with_config: bool, tmp_path: Path):
    vectors = json.loads((SHARED / "vectors_with_bos.json").read_text())["chat"]
    if not with_config:  # Then our own template and knowledge of the special tokens serve.
        (tmp_path / "tokenizer.json").symlink_to(SHARED / "tokenizer.json")
        original = Tokenizer.from_pretrained(tmp_path)

    assert len(vectors) == 4
    for v in vectors:
        options = {"add_generation_prompt": v["add_generation_prompt"]}
        assert original.render_chat(v["messages"], **options) == v["text"]
        assert original.apply_chat_template(v["messages"], **options) == v["ids"]


def test_original_has_its_sizes_and_special_tokens(original: Tokenizer):
    assert original.vocab_size == 100015
    assert (original.bos_token, original.eos_token) == (BOS, EOS)
    assert (original.bos_token_id, original.eos_token_id, original.pad_token_id) == (100000, 100001, 100001)
    assert original.decode([17464, 100015, 102399, 1843]) == "Hello world"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_what_was_encoded_decodes_to_itself(folder: Path, text: str):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("special", [True, False], ids="special={}".format)
@pytest.mark.parametrize("config", [{}, {"add_eos_token": True, "add_bos_token": False}], ids=["bos", "eos"])
def test_texts_encoded_together_are_those_encoded_one_by_one(folder: Path, config: dict[str, bool], special: bool):
    tokenizer = configure(folder, **config)
    texts = [*TEXTS, tokenizer.eos_token or "", f"{tokenizer.bos_token}a {tokenizer.eos_token}b", "fox " * 500, *TEXTS]

    found = tokenizer.encode_batch(iter(texts), add_special_tokens=special)

    assert found == [tokenizer.encode(text, add_special_tokens=special) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_bos_stands_first_even_without_a_config(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    with_bos, without = tokenizer.encode("the fox"), tokenizer.encode("the fox", add_special_tokens=False)

    assert with_bos == [tokenizer.bos_token_id, *without]
    assert tokenizer.bos_token_id not in without


def test_config_decides_about_bos_and_eos(folder: Path):
    plain = Tokenizer.from_pretrained(folder).encode("the fox", add_special_tokens=False)

    tokenizer = configure(folder, add_bos_token=False, add_eos_token=True)

    assert tokenizer.encode("the fox") == [*plain, tokenizer.eos_token_id]


def test_bos_of_the_post_processor_is_not_doubled(json_folder: Path):
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


def test_truncation_and_padding_of_the_file_are_not_applied(json_folder: Path):
    whole = Tokenizer.from_pretrained(json_folder).encode("the quick brown fox")
    content = json.loads((json_folder / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (json_folder / "tokenizer.json").write_text(json.dumps(content))

    assert Tokenizer.from_pretrained(json_folder).encode("the quick brown fox") == whole


def test_special_tokens_may_be_written_as_dicts_and_pad_may_be_its_own(json_folder: Path):
    tokenizer = configure(json_folder, bos_token={"content": EOS, "special": True}, pad_token=BOS, eos_token=None)

    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, None, None)
    assert tokenizer.decode([tokenizer.pad_token_id or 0], skip_special_tokens=False) == BOS


def test_pad_falls_back_to_eos(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_special_string_in_a_text_becomes_its_token(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    fox, dog = (tokenizer.encode(text, add_special_tokens=False) for text in ("fox", "dog"))

    ids = tokenizer.encode(f"fox{tokenizer.eos_token}dog")

    assert ids == [tokenizer.bos_token_id, *fox, tokenizer.eos_token_id, *dog]
    assert EOS not in tokenizer.decode(ids)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == f"{tokenizer.bos_token}fox{tokenizer.eos_token}dog"


def test_tokens_added_after_the_pieces_of_a_model_are_honoured(model_folder: Path):
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


def test_ids_past_the_vocabulary_decode_to_nothing(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("the fox")

    assert tokenizer.decode([tokenizer.vocab_size, *ids, tokenizer.vocab_size + 99, 2**40]) == "the fox"


def test_arrays_of_ids_decode_too(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.decode(np.array(tokenizer.encode("the fox"), np.int32)) == "the fox"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_stream_never_splits_a_character(folder: Path, text: str):
    tokenizer = Tokenizer.from_pretrained(folder)

    pieces, rest = streamed(tokenizer, tokenizer.encode(text))

    assert "".join(pieces) + rest == text
    assert rest == ""
    assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_stream_of_any_ids_equals_decoding_them_at_once(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    chance = random.Random(0)

    for _ in range(300):
        ids = [chance.randrange(tokenizer.vocab_size + 3) for _ in range(chance.randrange(40))]
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids), ids


def test_stream_keeps_the_spaces_that_sentencepiece_would_drop(tmp_path: Path):
    train_model(tmp_path / "tokenizer.model")  # Here it removes extra spaces as well.
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    the, space = (tokenizer.encode(text, add_special_tokens=False) for text in ("the", "␠"))
    ids = [*the, *space[:1], *space[:1], *the, *the]

    pieces, rest = streamed(tokenizer, ids)

    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_stream_speaks_at_once_and_flush_gives_the_unfinished_rest(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    stream = tokenizer.decode_stream()
    *ids, _ = tokenizer.encode("fox 你")

    pieces = [stream.feed(i) for i in ids]

    assert "".join(pieces) == "fox "
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_stream_survives_an_id_it_refuses(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    stream = tokenizer.decode_stream()

    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        stream.feed(-1)

    assert "".join(map(stream.feed, tokenizer.encode("fox"))) == "fox"


def test_chat_reads_as_deepseek_writes_it(json_folder: Path):
    tokenizer = Tokenizer.from_pretrained(json_folder)

    text = f"{BOS}Be brief.\n\nUser: Hi\n\nAssistant: Hello 100%{EOS}User: Bye\n\n"
    assert tokenizer.render_chat(CHAT) == text
    assert tokenizer.render_chat(CHAT, add_generation_prompt=True) == text + "Assistant:"


def test_chat_ids_carry_bos_once_and_eos_after_each_answer(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    before = tokenizer.encode("Be brief.\n\nUser: Hi\n\nAssistant: Hello 100%", add_special_tokens=False)
    after = tokenizer.encode("User: Bye\n\nAssistant:", add_special_tokens=False)

    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)

    assert ids == [tokenizer.bos_token_id, *before, tokenizer.eos_token_id, *after]


def test_template_file_goes_before_the_config_and_the_config_before_ours(folder: Path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "listed"}]

    assert configure(folder, chat_template="config").render_chat(CHAT) == "config"
    assert configure(folder, chat_template=named).render_chat(CHAT) == "listed"
    (folder / "chat_template.jinja").write_text("{{ messages[1].content }} & {{ messages[1] | tojson }}")
    assert configure(folder, chat_template="no").render_chat(CHAT) == 'Hi & {"role": "user", "content": "Hi"}'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(999) %}{{ 'x' * 99999 }}{% endfor %}", "it wrote more than 16000000 characters"),
    ],
)
def test_failing_template_is_refused_in_one_line(json_folder: Path, template: str, reason: str):
    tokenizer = configure(json_folder, chat_template=template)

    with pytest.raises(ValueError, match=r"^the chat template failed: ") as caught:
        tokenizer.render_chat(CHAT)

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_those_that_must_travel(folder: Path):
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


def test_importing_the_module_loads_no_heavy_library():
    heavy = {"jax", "tokenizers", "sentencepiece", "jinja2"}
    program = f"import sys, dsmoe_jax.tokenizer; print({heavy} & set(sys.modules))"

    got = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True)

    assert (got.stdout.strip(), got.stderr) == ("set()", "")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in .*: it holds neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read: EOF while parsing"),
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be read: Model missing"),
        ({"tokenizer.model": "junk"}, "tokenizer.model is no sentencepiece model"),
        ({"tokenizer.model": ""}, "tokenizer.model is no sentencepiece model"),
    ],
    ids=["nothing", "cut json", "empty json", "junk model", "empty model"],
)
def test_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path, files: dict[str, str], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: is not JSON"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: holds a list"),
        (
            "tokenizer_config.json",
            '{"bos_token": "<no>"}',
            "bos_token '<no>' is not in the tokenizer's vocabulary",
        ),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token 7 is not in the tokenizer's vocabulary"),
        ("tokenizer_config.json", '{"add_bos_token": "no"}', "add_bos_token must be true or false, got 'no'"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag"}]}',
            "chat_template is neither a string nor",
        ),
    ],
)
def test_broken_config_is_refused_by_name(folder: Path, name: str, content: str, message: str):
    (folder / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)


def test_template_file_that_is_not_text_is_refused(json_folder: Path):
    (json_folder / "chat_template.jinja").write_bytes(b"\xff\xfe")

    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
        Tokenizer.from_pretrained(json_folder)


@pytest.mark.parametrize("added", [["<|end|>"], {"x": {"content": "y"}}, {"999": "y"}, {"999": {}}], ids=repr)
def test_malformed_added_tokens_are_refused(model_folder: Path, added: Any):
    with pytest.raises(ValueError, match="added_tokens_decoder must map ids to tokens"):
        configure(model_folder, added_tokens_decoder=added)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "text": (lambda t: t.encode(b"x"), "text to encode must be a string, got bytes"),
    "surrogate": (lambda t: t.encode("ab\ud800"), "half a surrogate pair at character 2"),
    "text of several": (lambda t: t.encode_batch(["a", b"x"]), "text to encode must be a string, got bytes"),
    "surrogate of several": (lambda t: t.encode_batch(["a", "ab\ud800"]), "half a surrogate pair at character 2"),
    "one text for several": (lambda t: t.encode_batch("ab"), "texts to encode must be several strings, got one"),
    "negative": (lambda t: t.decode([3, -2]), "token ids cannot be negative, got -2"),
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
def test_bad_input_is_refused_by_name(folder: Path, call: Callable[[Any], Any], message: str):
    tokenizer = Tokenizer.from_pretrained(folder)

    with pytest.raises(ValueError, match=message):
        call(tokenizer)
