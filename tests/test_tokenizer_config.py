"""Tokenizer configuration files and flags; the ids are those of transformers 4.57.6."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers import tokenizers
from tests.helpers.tokenizers import BOS, EOS, TEXTS, configure

json_file, model_file, folder = tokenizers.json_file, tokenizers.model_file, tokenizers.folder
json_folder, model_folder = tokenizers.json_folder, tokenizers.model_folder


def pieces_of(folder: Path, text: str, *, dummy_prefix: bool = True) -> list[int]:
    """Encode by sentencepiece alone."""
    import sentencepiece

    suffix = b"" if dummy_prefix else b"\x1a\x02\x18\x00"  # normalizer_spec.add_dummy_prefix = false
    model: Any = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes() + suffix)
    return model.encode(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer; looked for tokenizer.json and tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read: EOF while parsing"),
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be read: Model missing"),
        ({"tokenizer.model": "junk"}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer.model": ""}, "tokenizer.model is not a sentencepiece model"),
    ],
    ids=["nothing", "cut json", "empty json", "junk model", "empty model"],
)
def test_missing_or_unreadable_tokenizer_is_an_error(tmp_path: Path, files: dict[str, str], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: is not JSON"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: must be a JSON object"),
        ("tokenizer_config.json", '{"bos_token": "<no>"}', "bos_token '<no>' is not in the tokenizer's vocabulary"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token 7 is not in the tokenizer's vocabulary"),
        ("tokenizer_config.json", '{"add_bos_token": "no"}', "add_bos_token must be true or false, got 'no'"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag"}, "x"]}',
            "chat_template must be a string or a list of named",
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
def test_malformed_config_error_names_file_and_field(folder: Path, name: str, content: str, message: str):
    (folder / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("added", [["<|end|>"], {"x": {"content": "y"}}, {"999": "y"}, {"999": {}}], ids=repr)
def test_malformed_added_tokens_decoder_is_an_error(model_folder: Path, added: Any):
    with pytest.raises(ValueError, match="added_tokens_decoder must map ids to tokens"):
        configure(model_folder, added_tokens_decoder=added)


@pytest.mark.parametrize(
    ("text", "before", "after", "spaced"),
    [
        ("the</s>fox", "the", "fox", False),
        ("the</s> fox", "the", "fox", True),
        ("</s>fox", "", "fox", False),
        ("the fox</s>", "the fox", "", False),
    ],
)
def test_without_legacy_no_space_follows_a_special_token(
    model_folder: Path, text: str, before: str, after: str, spaced: bool
):
    tokenizer = configure(model_folder, legacy=False, add_bos_token=False)

    before_ids = pieces_of(model_folder, before) if before else []
    after_ids = pieces_of(model_folder, after, dummy_prefix=spaced) if after else []
    assert tokenizer.encode(text) == [*before_ids, tokenizer.eos_token_id, *after_ids]


@pytest.mark.parametrize("legacy", [True, None, "absent"], ids=str)
def test_with_legacy_each_part_gets_a_leading_space(model_folder: Path, legacy: Any):
    config = {} if legacy == "absent" else {"legacy": legacy}
    tokenizer = configure(model_folder, add_bos_token=False, **config)

    the, fox = (pieces_of(model_folder, text) for text in ("the", "fox"))

    assert tokenizer.encode("the</s>fox") == [*the, tokenizer.eos_token_id, *fox]


def test_without_legacy_and_prefix_space_adds_no_space(model_folder: Path):
    tokenizer = configure(model_folder, legacy=False, add_prefix_space=False, add_bos_token=False)

    assert tokenizer.encode("the fox") == pieces_of(model_folder, "the fox", dummy_prefix=False)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_without_legacy_decode_inverts_encode(model_folder: Path, text: str):
    tokenizer = configure(model_folder, legacy=False)

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs enable_sampling True is not supported"),
        ({"sp_model_kwargs": {"reverse": True}}, "sp_model_kwargs reverse True is not supported"),
        ({"add_prefix_space": False}, "add_prefix_space false needs legacy false"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class 'GPT2Tokenizer' does not support"),
    ],
)
def test_unsupported_sentencepiece_flag_is_an_error(model_folder: Path, config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        configure(model_folder, **config)


def test_ignored_flags_do_not_change_ids(folder: Path):
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
def test_added_token_flags_strip_spaces(model_folder: Path, flags: dict[str, bool], text: str, rest: tuple[str, str]):
    decoder = {"2": {"content": "</s>", "special": True, **flags}}
    tokenizer = configure(model_folder, added_tokens_decoder=decoder, eos_token="</s>", add_bos_token=False)

    before, after = (pieces_of(model_folder, part) for part in rest)

    assert tokenizer.encode(text) == [*before, 2, *after]


def test_single_word_token_within_a_word_is_text(model_folder: Path):
    decoder = {"2": {"content": "</s>", "special": True, "single_word": True}}
    tokenizer = configure(model_folder, added_tokens_decoder=decoder, eos_token="</s>", add_bos_token=False)

    parts = pieces_of(model_folder, "the</s>"), pieces_of(model_folder, "fox")
    assert tokenizer.encode("the</s>fox") == [*parts[0], *parts[1]]


def test_config_flags_override_tokenizer_json(json_folder: Path):
    eos = Tokenizer.from_pretrained(json_folder).eos_token_id
    decoder = {str(eos): {"content": EOS, "lstrip": True, "rstrip": True, "special": True}}
    plain = Tokenizer.from_pretrained(json_folder).encode(f"the{EOS}fox")

    assert configure(json_folder, added_tokens_decoder=decoder).encode(f"the  {EOS}\n fox") == plain


@pytest.mark.parametrize("config", [{"eos_token": "<x>"}, {"pad_token": "<x>"}, {"additional_special_tokens": ["<x>"]}])
def test_tokens_named_by_the_config_are_special(json_folder: Path, config: dict[str, Any]):
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


def test_added_tokens_json_and_special_tokens_map_are_read(folder: Path):
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


def test_added_tokens_decoder_overrides_older_files(folder: Path, caplog: pytest.LogCaptureFixture):
    (folder / "added_tokens.json").write_text('{"<|end|>": 900}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')

    with caplog.at_level("INFO"):
        tokenizer = configure(folder, added_tokens_decoder={})

    assert tokenizer.eos_token != "<|end|>"
    assert "Ignoring eos_token of" in caplog.text
    assert "added_tokens.json: tokenizer_config.json has added_tokens_decoder" in caplog.text


def test_added_token_id_mismatch_is_an_error(json_folder: Path):
    with pytest.raises(ValueError, match=r"added token '<x>' has id 999 in the config and 2.. in tokenizer.json"):
        configure(json_folder, added_tokens_decoder={"999": {"content": "<x>"}})


def test_unk_token_string_is_encoded_as_its_token(model_folder: Path):
    tokenizer = Tokenizer.from_pretrained(model_folder)

    assert tokenizer.encode("<unk>", add_special_tokens=False) == [0]


@pytest.mark.parametrize(
    ("single", "around"), [(f"{BOS} $A", (1, 0)), (f"$A {EOS}", (0, 1)), (f"{BOS} $A {EOS}", (1, 1))]
)
@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}])
def test_post_processor_applies_to_generic_classes(
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


def test_dropout_in_tokenizer_json_is_an_error(json_folder: Path):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (json_folder / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(ValueError, match=r"tokenizer.json: dropout 0.1.* makes encoding random; set it to null"):
        Tokenizer.from_pretrained(json_folder)


def test_ambiguous_add_prefix_space_is_an_error(json_folder: Path):
    with pytest.raises(ValueError, match=r"add_prefix_space must be the same in .* got false and true"):
        configure(json_folder, add_prefix_space=True, tokenizer_class="PreTrainedTokenizerFast")


def test_runaway_pattern_is_a_one_line_error(tmp_path: Path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$b|(a|a)*c"}, "behavior": "Isolated", "invert": False}
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tokens = [{"id": 1, "content": "<eos>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False}]  # fmt: skip
    fields = {"version": "1.0", "added_tokens": tokens, "pre_tokenizer": pattern, "model": vocabulary}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')

    with pytest.raises(ValueError, match="the tokenizer failed on a text: Onig: Regex search error"):
        Tokenizer.from_pretrained(tmp_path).encode("a" * 100)
