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

from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

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
    program = f"import sys, dsmoe_jax.text.tokenizer; print({heavy} & set(sys.modules))"

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
            '{"chat_template": [{"name": "rag"}, "x"]}',
            "chat_template is neither a string nor a list of named templates",
        ),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BertTokenizer"}',
            "tokenizer_class 'BertTokenizer' is not supp",
        ),
        ("tokenizer_config.json", '{"add_eos_token": true, "eos_token": null}', "add_eos_token is true, but the"),
        ("tokenizer_config.json", '{"additional_special_tokens": ["<x>"]}', "additional special token '<x>' is not in"),
        ("tokenizer_config.json", '{"split_special_tokens": 1}', "split_special_tokens must be true or false, got 1"),
        ("added_tokens.json", '{"<x>": "1"}', "added_tokens.json: must map tokens to ids"),
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


# --- flags of a folder: the ids are those of transformers 4.57.6 ---


def row_chunks(folder: Path, text: str, *, dummy_prefix: bool = True) -> list[int]:
    """What sentencepiece alone makes of a text."""
    import sentencepiece

    suffix = b"" if dummy_prefix else b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false
    model: Any = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes() + suffix)
    return model.encode(text)


@pytest.mark.parametrize(
    ("text", "before", "after", "spaced"),
    [
        ("the</s>fox", "the", "fox", False),
        ("the</s> fox", "the", "fox", True),
        ("</s>fox", "", "fox", False),
        ("the fox</s>", "the fox", "", False),
    ],
)
def test_without_legacy_no_space_goes_before_text_after_a_token(
    model_folder: Path, text: str, before: str, after: str, spaced: bool
):
    tokenizer = configure(model_folder, legacy=False, add_bos_token=False)

    before_ids = row_chunks(model_folder, before) if before else []
    after_ids = row_chunks(model_folder, after, dummy_prefix=spaced) if after else []
    assert tokenizer.encode(text) == [*before_ids, tokenizer.eos_token_id, *after_ids]


@pytest.mark.parametrize("legacy", [True, None, "absent"], ids=str)
def test_with_legacy_each_part_begins_with_a_space(model_folder: Path, legacy: Any):
    config = {} if legacy == "absent" else {"legacy": legacy}
    tokenizer = configure(model_folder, add_bos_token=False, **config)

    the, fox = (row_chunks(model_folder, text) for text in ("the", "fox"))

    assert tokenizer.encode("the</s>fox") == [*the, tokenizer.eos_token_id, *fox]


def test_without_legacy_and_prefix_space_a_text_begins_as_it_is(model_folder: Path):
    tokenizer = configure(model_folder, legacy=False, add_prefix_space=False, add_bos_token=False)

    assert tokenizer.encode("the fox") == row_chunks(model_folder, "the fox", dummy_prefix=False)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_without_legacy_what_was_encoded_decodes_to_itself(model_folder: Path, text: str):
    tokenizer = configure(model_folder, legacy=False)

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs enable_sampling True is not supported"),
        ({"sp_model_kwargs": {"reverse": True}}, "sp_model_kwargs reverse True is not supported"),
        ({"add_prefix_space": False}, "add_prefix_space false needs legacy false"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class 'GPT2Tokenizer' does not read a tokenizer.model"),
    ],
)
def test_flag_that_would_change_ids_is_refused(model_folder: Path, config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        configure(model_folder, **config)


def test_neutral_flags_change_nothing(folder: Path):
    plain = Tokenizer.from_pretrained(folder).encode("the fox")

    tokenizer = configure(
        folder,
        sp_model_kwargs={"enable_sampling": False, "nbest_size": -1, "alpha": 0.1},
        clean_up_tokenization_spaces=True,
        use_default_system_prompt=True,
        spaces_between_special_tokens=True,
        model_max_length=2,
    )

    assert tokenizer.encode("the fox") == plain
    assert tokenizer.decode(tokenizer.encode("fox .")) == "fox ."


def test_null_flags_are_false(folder: Path):
    plain = Tokenizer.from_pretrained(folder).encode("fox", add_special_tokens=False)

    assert configure(folder, add_bos_token=None, add_eos_token=None).encode("fox") == plain


@pytest.mark.parametrize(
    ("flags", "text", "rest"),
    [
        ({"lstrip": True}, "the </s>fox", ("the", "fox")),
        ({"rstrip": True}, "the</s> fox", ("the", "fox")),
        ({"single_word": True}, "the </s> fox", ("the ", " fox")),
    ],
)
def test_flags_of_added_tokens_are_obeyed(model_folder: Path, flags: dict[str, bool], text: str, rest: tuple[str, str]):
    decoder = {"2": {"content": "</s>", "special": True, **flags}}
    tokenizer = configure(model_folder, added_tokens_decoder=decoder, eos_token="</s>", add_bos_token=False)

    before, after = (row_chunks(model_folder, part) for part in rest)

    assert tokenizer.encode(text) == [*before, 2, *after]


def test_single_word_token_within_a_word_is_text(model_folder: Path):
    decoder = {"2": {"content": "</s>", "special": True, "single_word": True}}
    tokenizer = configure(model_folder, added_tokens_decoder=decoder, eos_token="</s>", add_bos_token=False)

    parts = row_chunks(model_folder, "the</s>"), row_chunks(model_folder, "fox")
    assert tokenizer.encode("the</s>fox") == [*parts[0], *parts[1]]


def test_flags_of_the_config_win_over_those_of_tokenizer_json(json_folder: Path):
    eos = Tokenizer.from_pretrained(json_folder).eos_token_id
    decoder = {str(eos): {"content": EOS, "lstrip": True, "rstrip": True, "special": True}}
    plain = Tokenizer.from_pretrained(json_folder).encode(f"the{EOS}fox")

    assert configure(json_folder, added_tokens_decoder=decoder).encode(f"the  {EOS}\n fox") == plain


@pytest.mark.parametrize("config", [{"eos_token": "<x>"}, {"pad_token": "<x>"}, {"additional_special_tokens": ["<x>"]}])
def test_tokens_that_the_config_names_are_special(json_folder: Path, config: dict[str, Any]):
    """As in transformers: whatever their flag in tokenizer.json says."""
    path = json_folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    number = Tokenizer.from_pretrained(json_folder).vocab_size
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    fields["added_tokens"].append({"id": number, "content": "<x>", **flags})
    path.write_text(json.dumps(fields), encoding="utf-8")

    tokenizer = configure(json_folder, **config)

    ids = tokenizer.encode("fox<x>", add_special_tokens=False)
    assert ids[-1] == number
    assert tokenizer.decode(ids) == "fox"
    assert number not in tokenizer.encode("fox<x>", split_special_tokens=True)


def test_tokens_of_an_old_folder_are_read(folder: Path):
    size = Tokenizer.from_pretrained(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": size, "<|tool|>": size + 1}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|end|>", "pad_token": {"content": "<|tool|>"}})
    )

    tokenizer = configure(folder, eos_token=None, add_bos_token=False)

    assert tokenizer.vocab_size == size + 2
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (size, size + 1)
    fox = tokenizer.encode("fox")
    assert tokenizer.encode("fox<|end|>fox<|tool|>") == [*fox, size, *fox, size + 1]
    assert tokenizer.decode([*fox, size]) == "fox"


def test_old_files_are_ignored_beside_added_tokens_decoder(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "added_tokens.json").write_text('{"<|end|>": 900}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')

    with caplog.at_level("INFO"):
        tokenizer = configure(folder, added_tokens_decoder={})

    assert tokenizer.eos_token != "<|end|>"
    assert "special_tokens_map.json: ignored eos_token" in caplog.text
    assert "added_tokens.json: ignored, tokenizer_config.json has added_tokens_decoder" in caplog.text


def test_added_token_with_another_id_is_refused(json_folder: Path):
    with pytest.raises(ValueError, match=r"added token '<x>' has id 999 in the config and 2.. in tokenizer.json"):
        configure(json_folder, added_tokens_decoder={"999": {"content": "<x>"}})


def test_unknown_token_in_a_text_is_that_token(model_folder: Path):
    tokenizer = Tokenizer.from_pretrained(model_folder)

    assert tokenizer.encode("<unk>", add_special_tokens=False) == [0]


@pytest.mark.parametrize(
    ("single", "around"), [(f"{BOS} $A", (1, 0)), (f"$A {EOS}", (0, 1)), (f"{BOS} $A {EOS}", (1, 1))]
)
@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}])
def test_post_processor_decides_where_no_llama_class_does(
    json_folder: Path, single: str, around: tuple[int, int], config: dict[str, Any] | None
):
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_file(str(json_folder / "tokenizer.json"))
    special = [(name, library.token_to_id(name)) for name in (BOS, EOS)]
    library.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)  # pyright: ignore
    library.save(str(json_folder / "tokenizer.json"))

    tokenizer = Tokenizer.from_pretrained(json_folder) if config is None else configure(json_folder, **config)

    (_, bos), (_, eos) = special
    fox = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox") == [*[bos] * around[0], *fox, *[eos] * around[1]]
    assert configure(json_folder, tokenizer_class="LlamaTokenizerFast").encode("fox") == [bos, *fox]


def test_dropout_of_a_tokenizer_json_is_refused(json_folder: Path):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (json_folder / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(ValueError, match=r"tokenizer.json: dropout 0.1.* gives random ids; set it to null"):
        Tokenizer.from_pretrained(json_folder)


def test_prefix_space_that_transformers_4_and_5_read_differently_is_refused(json_folder: Path):
    with pytest.raises(ValueError, match=r"add_prefix_space is false, and tokenizer_config.json has it as true"):
        configure(json_folder, add_prefix_space=True, tokenizer_class="PreTrainedTokenizerFast")


# --- chat templates and special tokens ---


def test_templates_see_all_special_tokens(json_folder: Path):
    template = "{{ eos_token + pad_token + unk_token }}{{ additional_special_tokens[0] }}{{ sep_token is defined }}"
    special = {"pad_token": EOS, "additional_special_tokens": [BOS], "eos_token": EOS}

    tokenizer = configure(json_folder, chat_template=template, **special)

    assert tokenizer.render_chat(CHAT) == f"{EOS}{EOS}<unk>{BOS}False"
    assert tokenizer.render_chat(CHAT, pad_token="P") == f"{EOS}P<unk>{BOS}False"


def test_named_templates_are_chosen_as_transformers_does(json_folder: Path):
    named = [{"name": name, "template": name} for name in ("default", "tool_use", "rag")]
    tokenizer = configure(json_folder, chat_template=named)

    assert tokenizer.render_chat(CHAT) == "default"
    assert tokenizer.render_chat(CHAT, tools=[]) == "tool_use"
    assert tokenizer.render_chat(CHAT, chat_template="rag", tools=[]) == "rag"
    assert tokenizer.render_chat(CHAT, chat_template="{{ 1 + 1 }}") == "2"
    only = configure(json_folder, chat_template=named[1:])
    with pytest.raises(ValueError, match="chat_template must be one of rag, tool_use: none is the default"):
        only.render_chat(CHAT)


def test_split_special_tokens_makes_text_of_their_strings(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    text = f"fox{tokenizer.eos_token} dog"

    ids = tokenizer.encode(text, split_special_tokens=True)

    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in tokenizer.encode(text)
    assert Tokenizer.from_pretrained(folder, split_special_tokens=True).encode(text) == ids
    assert configure(folder, split_special_tokens=True).encode(text) == ids
    assert Tokenizer.from_pretrained(folder, split_special_tokens=False).encode_batch([text]) != [ids]


def test_split_ids_are_those_of_the_library(json_folder: Path):
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(json_folder / "tokenizer.json"))
    library.encode_special_tokens = True
    texts = [*TEXTS, f"a{EOS}b {BOS}", f"{EOS}{EOS}", EOS[:-1]]

    found = configure(json_folder, split_special_tokens=True, add_bos_token=False).encode_batch(texts)

    assert found == [library.encode(text, add_special_tokens=False).ids for text in texts]


def test_messages_cannot_forge_the_tokens_of_a_template(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    halves = [{"role": "user", "content": eos[:3]}, {"role": "user", "content": eos[3:]}]
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    chat = [{"role": "user", "content": f"{eos}a <b> {bos}"}, *halves]

    ids = tokenizer.apply_chat_template(chat, split_special_tokens=True, chat_template=template)

    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [i for i in ids if i in (bos_id, eos_id)] == [ids[0], ids[-1]] == [bos_id, eos_id]
    assert tokenizer.decode(ids) == f"{eos}a <b> {bos}{eos}"
    assert [i for i in tokenizer.apply_chat_template(chat, chat_template=template) if i == eos_id] == [eos_id] * 3


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "{{ messages[0].arguments | tojson }}"])
def test_keys_and_roles_cannot_forge_tokens(folder: Path, template: str):
    tokenizer = Tokenizer.from_pretrained(folder)
    chat = [{"role": tokenizer.eos_token, "content": "", "arguments": {tokenizer.eos_token: 1}}]
    options = {"chat_template": template + "{{ eos_token }}", "split_special_tokens": True}

    ids = tokenizer.apply_chat_template(chat, **options)

    assert [at for at, i in enumerate(ids) if i == tokenizer.eos_token_id] == [len(ids) - 1]


def test_split_changes_no_chat_without_special_strings(folder: Path):
    plain, split = (Tokenizer.from_pretrained(folder, split_special_tokens=split) for split in (False, True))
    chat = [*CHAT, {"role": "assistant", "content": "if a < b > c: | 你好"}]

    assert split.apply_chat_template(chat) == plain.apply_chat_template(chat)
    assert split.render_chat(chat) == plain.render_chat(chat)


def test_template_that_rewrites_messages_cannot_be_split(folder: Path):
    tokenizer = configure(folder, chat_template="{{ messages[1].content | length }}")
    chat = [CHAT[0], {"role": "user", "content": tokenizer.eos_token}]

    with pytest.raises(ValueError, match="the chat template changes the text of messages, and split_special_tokens"):
        tokenizer.apply_chat_template(chat, split_special_tokens=True)


def test_special_strings_are_counted(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder)

    assert tokenizer.count_special_tokens("the quick fox") == 0
    assert tokenizer.count_special_tokens(f"{tokenizer.eos_token}a{tokenizer.bos_token}{tokenizer.eos_token}") == 3


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


def test_a_pattern_that_does_not_end_is_refused_in_one_line(tmp_path: Path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$b|(a|a)*c"}, "behavior": "Isolated", "invert": False}
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tokens = [{"id": 1, "content": "<eos>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False}]  # fmt: skip
    fields = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": pattern, "model": vocabulary}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')

    with pytest.raises(ValueError, match="the tokenizer failed on a text: Onig: Regex search error"):
        Tokenizer.from_pretrained(tmp_path).encode("a" * 100)
