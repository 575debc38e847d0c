"""Fine-tuning data in: what lines say, what templates write, and the folder of examples made of them.

Start at `test_masks_by_eye`; bad input is in the tables `BAD_LINES`, `REFUSED` and `DAMAGE`.
"""

import gzip
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.data import TokenShards, is_token_shards, tokenizer_hash
from dsmoe_jax.train.sft import FORMATS, Examples, infer_stop_config, is_examples, show, write_examples
from dsmoe_jax.train.sft.formats import Completion, Conversation, Tokens, parse_record
from dsmoe_jax.train.sft.truncate import truncate
from dsmoe_jax.train.sft.examples import Example
from dsmoe_jax.train.sft.templates import open_template, tokenize_record
from tests.helpers.corpus import BOS, EOS, byte_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "tokenizer"
LONG = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return path


def said(*texts: str) -> Conversation:
    """Turns of the user and of the assistant, in turn."""
    return Conversation([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)])


def spans(example: Example, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """The example's text, cut where it begins or ceases to be learned."""
    tokens, loss_mask = example
    cuts = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(tokens)]
    return [
        (bool(loss_mask[a]), tokenizer.decode(tokens[a:b], skip_special_tokens=False))
        for a, b in itertools.pairwise(cuts)
    ]


def read(line: Any, tokenizer: Tokenizer, template: str | Path = "chat", targets: str = "all") -> Example:
    return tokenize_record(line, tokenizer, open_template(template), targets)


# Strings of special tokens in the data


@pytest.mark.parametrize("template", ["chat", "file", "deepseek-instruct"])
def test_split_special_strings_of_messages_stay_text(folder: Path, tmp_path: Path, template: str):
    if template == "file":
        (tmp_path / "t").write_text("{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}")
    line = said(f"a{EOS}b", f"c{BOS}d{EOS}")
    example_by = {
        split: read(
            line,
            Tokenizer.from_pretrained(folder, split_special_tokens=split),
            tmp_path / "t" if template == "file" else template,
        )
        for split in (False, True)
    }
    tokenizer = Tokenizer.from_pretrained(folder)

    control = {split: [i for i in tokens.tolist() if i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
               for split, (tokens, _) in example_by.items()}  # fmt: skip

    assert len(control[False]) == len(control[True]) + 3
    text = {split: tokenizer.decode(tokens, skip_special_tokens=False) for split, (tokens, _) in example_by.items()}
    assert text[True] == text[False]
    assert f"a{EOS}b" in tokenizer.decode(example_by[True].tokens)


def test_split_special_strings_of_completions_stay_text(folder: Path):
    tokenizer = Tokenizer.from_pretrained(folder, split_special_tokens=True)

    tokens = read(Completion(f"a{EOS}", f"b{EOS}"), tokenizer).tokens.tolist()

    assert [i for i in tokens if i == tokenizer.eos_token_id] == [tokens[-1]]
    assert tokenizer.decode(tokens) == f"a{EOS}b{EOS}"


@pytest.mark.parametrize(
    ("split", "said_of_them"),
    [
        (False, "become control tokens; split_special_tokens encodes them as text"),
        (True, "are encoded as text"),
    ],
)
def test_special_strings_in_examples_are_counted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: bool, said_of_them: str
):
    lines = [{"prompt": f"a{EOS}{EOS}", "completion": BOS}, {"prompt": "a", "completion": "b"}]
    lines += [{"messages": said(f"x{EOS}", "y").messages}]

    with caplog.at_level(logging.INFO):
        source = jsonl(tmp_path / "a.jsonl", lines)
        write_examples(source, folder, tmp_path / "out", sequence_length=LONG, split_special_tokens=split)

    assert f"4 special-token strings in the text of 2 examples {said_of_them}" in caplog.text
    assert json.loads((tmp_path / "out" / "examples.json").read_text())["split_special_tokens"] is split


# Masks


def test_masks_by_eye(tokenizer: Tokenizer):
    line = said("Hi", "Hello", "Bye", "See you")

    assert spans(read(line, tokenizer), tokenizer) == [
        (False, f"{BOS}User: Hi\n\nAssistant:"),
        (True, f" Hello{EOS}"),
        (False, "User: Bye\n\nAssistant:"),
        (True, f" See you{EOS}"),
    ]
    assert spans(read(line, tokenizer, train_on="last"), tokenizer) == [
        (False, f"{BOS}User: Hi\n\nAssistant: Hello{EOS}User: Bye\n\nAssistant:"),
        (True, f" See you{EOS}"),
    ]
    assert spans(read(Completion("1 + 1 =", " 2"), tokenizer), tokenizer) == [
        (False, f"{BOS}1 + 1 ="),
        (True, f" 2{EOS}"),
    ]
    assert spans(read(said("Hi", "Hello"), tokenizer, "deepseek-instruct"), tokenizer) == [
        (
            False,
            f"{BOS}You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, "
            "security and privacy issues, you will refuse to answer.\n### Instruction:\nHi\n### Response:\n",
        ),
        (True, "Hello\n<|EOT|>"),
    ]
    given = Tokens([0, 70, 71, 72, 73, 1], [False, True, True, False, True, True])
    assert read(given, tokenizer).loss_mask.tolist() == given.loss_mask
    assert read(given, tokenizer, train_on="last").loss_mask.tolist() == [False] * 4 + [True] * 2


def test_a_chat_is_cut_where_inference_will_begin(tokenizer: Tokenizer):
    line = said("Hi", "Hello", "Bye", "See you")
    tokens, loss_mask = read(line, tokenizer)

    for turn, begin in zip((1, 3), np.flatnonzero(np.diff(loss_mask.astype(int)) == 1) + 1, strict=True):
        prompt = tokenizer.apply_chat_template(line.messages[:turn], add_generation_prompt=True)
        assert tokens[:begin].tolist() == prompt


def test_what_stands_after_the_last_answer_is_left_out(tokenizer: Tokenizer):
    assert np.array_equal(read(said("a", "b", "c"), tokenizer).tokens, read(said("a", "b"), tokenizer).tokens)


def test_the_first_token_is_no_target_since_nothing_stands_before_it(tokenizer: Tokenizer):
    assert read(Tokens([5, 6], [True, True]), tokenizer).loss_mask.tolist() == [False, True]
    with pytest.raises(ValueError, match="has nothing to learn: no token of it is a target"):
        read(Tokens([5, 6], [True, False]), tokenizer)


def test_a_tokenizer_without_bos_or_with_eos_of_its_own_adds_neither_twice(tmp_path: Path):
    bare = byte_tokenizer(tmp_path / "bare", bos=False)
    eager = byte_tokenizer(tmp_path / "eager")
    config = json.loads((eager / "tokenizer_config.json").read_text()) | {"add_eos_token": True}
    (eager / "tokenizer_config.json").write_text(json.dumps(config))

    for home, bos in ((bare, ""), (eager, BOS)):
        tokenizer = Tokenizer.from_pretrained(home)
        for completion in (" 2", f" 2{EOS}"):
            example = read(Completion("1 + 1 =", completion), tokenizer)
            assert spans(example, tokenizer) == [(False, f"{bos}1 + 1 ="), (True, f" 2{EOS}")]


# Templates


ODD_PAIRS = [  # instruction, output
    ("Hi", "Hello"),
    ("  spaces  ", "  spaces  "),
    ("\n\nlines\n", "\n\nlines\n"),
    ("tab\t", "\ttab"),
    ("\u3000wide\u2003blanks\x1c", "\u3000wide\u2003blanks\x1c"),
    ("", "to nothing"),
    (" \n ", "to blanks"),
    ("你好 世界。", "你好。"),
    ("Führer ø ö ú ÿ", "õ ÷ û ý À ù Á þ ü"),
    ("👩‍👧 zwj", "👍🏽"),
    ("e\u0301 combining", "\u202eright to left"),
    ("### Response:", "### Response:\n"),
    ("a\n### Response:\nb", "### Instruction:\nc"),
    ("<|EOT|>", "<|EOT|>"),
    ("x <|EOT|> y", "x\n<|EOT|>\n<|EOT|>"),
    (f"{BOS}{EOS}", f"a{EOS}b{BOS}"),
    ("{} {0} {instruction}", "{} {output}"),
    ("%s %(a)s \\n", "\\n {{ messages }} {% raw %}"),
    ("1234567890", "3.14159"),
    ("\r\nCRLF\r\n", "a\r\nb\r\n"),
    ("nul\0", "\0nul"),
]


def original(tokenizer: Tokenizer, instruction: str, output: str) -> tuple[list[int], list[bool]]:
    """The slow obvious twin: finetune.py's source and target, both tokenized with BOS, the source's length masked."""
    source = "".join(
        [
            "You are an AI assistant, developed by DeepSeek Company. ",
            "For politically sensitive questions, security and privacy issues, you will refuse to answer.",
            "\n",
            "### Instruction:",
            "\n",
            instruction.strip(),
            "\n",
            "### Response:",
            "\n",
        ]
    )
    both = tokenizer.encode(source + output + "\n<|EOT|>")
    masked = len(tokenizer.encode(source))
    return both, [at >= masked for at in range(len(both))]


@pytest.mark.parametrize("which", ["bytes", "deepseek"])
def test_deepseek_instruct_is_the_original_token_for_token(tokenizer: Tokenizer, which: str):
    if which == "deepseek":
        if not (SHARED / "tokenizer.json").is_file():
            pytest.skip("../shared/tokenizer, the original's tokenizer, is not here")
        tokenizer = Tokenizer.from_pretrained(SHARED)

    for instruction, output in ODD_PAIRS:
        tokens, loss_mask = read(said(instruction, output), tokenizer, "deepseek-instruct")

        assert (tokens.tolist(), loss_mask.tolist()) == original(tokenizer, instruction, output)


@pytest.mark.skipif(not (SHARED / "tokenizer.json").is_file(), reason="../shared/tokenizer is not here")
def test_the_chats_of_the_original_tokenizer_are_the_same_in_one_piece():
    tokenizer = Tokenizer.from_pretrained(SHARED)

    for asked, answer in ODD_PAIRS[:15]:
        line = said(asked, answer, asked, answer)
        tokens, _ = read(line, tokenizer)

        assert tokenizer.decode(tokens, skip_special_tokens=False) == tokenizer.decode(
            tokenizer.apply_chat_template(line.messages), skip_special_tokens=False
        )
    assert read(line, tokenizer).tokens.tolist() == tokenizer.apply_chat_template(line.messages)


def test_deepseek_instruct_refuses_what_it_cannot_write(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="is not one turn of the user and one of the assistant"):
        read(said("a", "b", "c", "d"), tokenizer, "deepseek-instruct")


def test_a_template_may_be_a_file(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )

    found = spans(read(said("Hi", " Hello"), tokenizer, path), tokenizer)

    assert found == [(False, f"{BOS}[user]Hi[assistant]"), (True, f" Hello{EOS}")]


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}", 1),
        ("{{ messages | length }}{{ '!' if add_generation_prompt }}", 1),
        ("{% for m in messages[-2:] %}{{ m.content }};{% endfor %}", 3),
    ],
)
def test_a_template_that_does_not_write_on_where_it_stopped_is_refused(
    tmp_path: Path, folder: Path, template: str, turn: int
):
    (tmp_path / "bad.jinja").write_text(template)
    source = jsonl(tmp_path / "a.jsonl", [{"messages": said("a", "b", "c", "d").messages}])

    with pytest.raises(ValueError, match=rf"a.jsonl:1 cannot be cut at turn {turn}: the template writes") as refused:
        write_examples(source, folder, tmp_path / "out", template=tmp_path / "bad.jinja", sequence_length=LONG)

    assert "\n" not in str(refused.value)


# Formats


LINES: dict[str, tuple[dict[str, Any], Any]] = {
    "instruction": ({"instruction": "Hi", "output": "Hello"}, said("Hi", "Hello")),
    "with an input": ({"instruction": "Add", "input": "1, 2", "output": "3"}, said("Add\n\n1, 2", "3")),
    "with an empty input": ({"instruction": "Hi ", "input": " ", "output": "Hello"}, said("Hi ", "Hello")),
    "with no input": ({"instruction": "Hi", "input": None, "output": "Hello"}, said("Hi", "Hello")),
    "an input alone": ({"instruction": "", "input": "1, 2", "output": "3"}, said("1, 2", "3")),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "id": 3}]},
        said("Hi", "Hello"),
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        said("Hi", "Hello"),
    ),
    "sharegpt by other names": (
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        said("Hi", "Hello"),
    ),
    "completion": ({"prompt": "1 + 1 =", "completion": " 2"}, Completion("1 + 1 =", " 2")),
    "tokens": (
        {"input_ids": [0, 7, 8], "labels": [-100, -100, 8], "attention_mask": [1, 1, 1]},
        Tokens([0, 7, 8], [False, False, True]),
    ),
    "columns of nothing": ({"messages": None, "prompt": "a", "completion": "b"}, Completion("a", "b")),
}


@pytest.mark.parametrize(("fields", "want"), LINES.values(), ids=LINES)
def test_a_format_is_found_from_the_fields_or_named(fields: dict[str, Any], want: Any):
    names = [name for name, entry in FORMATS.items() if all(fields.get(field) is not None for field in entry.fields)]

    assert parse_record(fields) == want
    assert [parse_record(fields, name) for name in names] == [want]


def test_a_system_turn_keeps_its_role():
    fields = {"conversations": [{"from": "system", "value": "S"}, {"from": "gpt", "value": "Hello"}]}

    assert [message["role"] for message in parse_record(fields).messages] == ["system", "assistant"]  # pyright: ignore


def test_lines_with_the_fields_of_two_formats_want_a_name():
    fields = {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}

    assert parse_record(fields, "completion") == Completion("a", "b")
    with pytest.raises(ValueError, match="has the fields of instruction and of completion; name the format"):
        parse_record(fields)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


# fmt: off
BAD_LINES: dict[str, tuple[Any, str]] = {
    "another format":   ({"text": "a"}, "has none of the fields instruction and output, messages, conversations"),
    "no object":        (["a"], "is not a JSON object"),
    "empty output":     ({"instruction": "a", "output": " \n"}, "has nothing to learn: its 'output' is empty"),
    "empty completion": ({"prompt": "a", "completion": ""}, "has nothing to learn: its 'completion' is empty"),
    "not a text":       ({"instruction": 3, "output": "a"}, "must have a string as 'instruction', got int"),
    "input":            ({"instruction": "a", "input": [], "output": "a"}, "must have a string as 'input', got list"),
    "half a surrogate": ({"prompt": "\ud83d", "completion": "a"}, "lone surrogate"),
    "not a list":       ({"messages": "a"}, "must have a list as 'messages', got str"),
    "no turns":         ({"messages": []}, "has no turn of the assistant in 'messages'"),
    "no answer":        (turns(("user", "a")), "has no turn of the assistant in 'messages'"),
    "empty answer":     (turns(("user", "a"), ("assistant", "")), "has nothing to learn: its 'content' is empty"),
    "role":             (turns(("user", "a"), ("bot", "b")), "has turn 1 from 'bot'; known are system, user"),
    "list as a role":   (turns((["user"], "a")), "has turn 0 from ['user']"),
    "no content":       (turns(("user", None)), "must have a string as 'content', got NoneType"),
    "no role":          ({"messages": [{"from": "user"}]}, "has no 'role' and 'content' in turn 0 of 'messages'"),
    "lengths":          ({"input_ids": [1, 2], "labels": [1]}, "has 2 input_ids and 1 labels"),
    "ids":              ({"input_ids": "ab", "labels": [1]}, "something other than a list of integers as 'input_ids'"),
    "truth as an id":   ({"input_ids": [1], "labels": [True]}, "something other than a list of integers as 'labels'"),
    "shifted labels":   ({"input_ids": [1, 2], "labels": [2, 3]}, "has label 2 at token 0, which is 1"),
    "nothing learned":  ({"input_ids": [1, 2], "labels": [-100, -100]}, "no token of it is a target"),
    "strange id":       ({"input_ids": [1, 999], "labels": [1, 999]}, "has token id 999; the tokenizer's are below"),
    "negative id":      ({"input_ids": [1, -1], "labels": [1, -1]}, "has token id -1; the tokenizer's are below 258"),
}
# fmt: on


@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_broken_line_is_named_left_out_and_refused_where_there_are_too_many(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture, line: Any, problem: str
):
    good = {"instruction": "Hi", "output": "Hello"}
    source = jsonl(tmp_path / "a.jsonl", [good, line, good])

    found = write_examples(source, folder, tmp_path / "out", sequence_length=LONG, max_malformed_fraction=0.5)

    assert found.examples == 2
    assert f"{source}:2 " in caplog.text
    assert problem in caplog.text
    with pytest.raises(
        ValueError, match=r"1 of 3 lines are malformed, at most 1 % may be; the first: .*a.jsonl:2 "
    ) as refused:
        write_examples(source, folder, tmp_path / "other", sequence_length=LONG)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "other").exists()


def test_a_named_format_takes_no_other_line(tmp_path: Path, folder: Path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])

    with pytest.raises(ValueError, match=r"a.jsonl:1 has no field 'instruction'"):
        write_examples(source, folder, tmp_path / "out", format="instruction", sequence_length=LONG)


# What the model shall read is read, or refused by name


A = "assistant"
CHAT = [{"role": "user", "content": "q"}, {"role": A, "content": "a"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def chat(*messages: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in messages]


# fmt: off
READ: dict[str, tuple[dict[str, Any], list[tuple[str, Any]]]] = {
    "alpaca's history": (
        {"instruction": "and now?", "input": "", "output": "yes", "history": [["q1", "a1"], ["q2", ""]]},
        [("user", "q1"), (A, "a1"), ("user", "q2"), (A, ""), ("user", "and now?"), (A, "yes")]),
    "alpaca's system": (
        {"instruction": "q", "output": "a", "system": "S", "history": []}, [("system", "S"), *chat(*CHAT)]),
    "sharegpt's system": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system_prompt": "S"},
        [("system", "S"), *chat(*CHAT)]),
    "messages' system": ({"messages": CHAT, "system": "S"}, [("system", "S"), *chat(*CHAT)]),
    "the same system twice": (
        {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "S"}, [("system", "S"), *chat(*CHAT)]),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}, CHAT[1]]},
        [("user", "ab"), (A, "a")]),
    "trl's messages": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, chat(*CHAT)),
    "a call of a tool": (
        {"messages": [CHAT[0], {"role": A, "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "5"},
                      {"role": A, "content": "5!"}]},
        [("user", "q"), (A, None), ("tool", "5"), (A, "5!")]),
    "sharegpt's call": (
        {"conversations": [{"from": "human", "value": "q"},
                           {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
                           {"from": "observation", "value": "5"}, {"from": "gpt", "value": "5!"}]},
        [("user", "q"), (A, None), ("tool", "5"), (A, "5!")]),
    "the first question again": ({"messages": CHAT, "prompt": " q", "prompt_id": "7"}, chat(*CHAT)),
    "marks of what holds anyway": (
        {"messages": CHAT, "train": True, "loss_mask": [1], "train_on_inputs": False, "mask_prompt": True, "loss": 2.5},
        chat(*CHAT)),
    "fields of nothing": (
        {"messages": [CHAT[0], {**CHAT[1], "tool_calls": [], "name": None, "refusal": ""}], "tools": "[]", "image": ""},
        chat(*CHAT)),
}
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "preference": ({"messages": CHAT, "chosen": "a"}, "has 'chosen': preference data is not supported"),
    "preference without a format": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has 'chosen': preference data"),
    "kto": ({"prompt": "a", "completion": "b", "label": True}, "has a bool as 'label': preference data"),
    "images": ({"messages": CHAT, "images": ["a.png"]}, "has 'images': only text is supported"),
    "a part that is an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT[1]]},
        "has a part of type 'image_url' in turn 0 of 'messages'; only text is supported"),
    "a completion's system": (
        {"prompt": "a", "completion": "b", "system": "S"}, "has 'system': the format completion does not read it"),
    "a completion's tools": ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "does not read it beside texts"),
    "context": ({"instruction": "q", "output": "a", "context": "c"}, "has 'context': the format instruction does not"),
    "a question": ({"messages": CHAT, "question": "c"}, "has 'question': the format messages does not read it"),
    "another spelling": ({"messages": CHAT, "systemPrompt": "S"}, "has 'systemPrompt': the format messages does not"),
    "a path of an image": ({"messages": CHAT, "image_path": "a.png"}, "has 'image_path': only text is supported"),
    "packed tokens": ({"input_ids": [1, 2], "labels": [1, 2], "cu_seqlens": [0, 1, 2]}, "has 'cu_seqlens': the format"),
    "a line not to learn": ({"messages": CHAT, "train": False}, "has train False; only 1 is supported"),
    "a mask of turns": ({"messages": CHAT, "loss_mask": [0]}, r"has loss_mask \[0\]; only 1 is supported"),
    "weights of tokens": (
        {"input_ids": [1, 2], "labels": [1, 2], "loss_weights": [0, 1]}, r"has loss_weights \[0, 1\]; only 1 is supp"),
    "a masked history": ({"messages": CHAT, "mask_history": True}, "has mask_history True; only 0 is supported"),
    "two systems": (
        {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "T"}, "has two system messages, one of"),
    "history of one": ({"instruction": "q", "output": "a", "history": [["q"]]}, "list of pairs of texts as 'history'"),
    "tools of text": ({"messages": CHAT, "tools": "look"}, "something other than a list of objects as 'tools'"),
    "half a weight": ({"messages": CHAT, "weight": 0.5}, "has weight 0.5; only 1 is supported"),
    "half a mark": ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "has weight 0.5 in turn 1 of 'messages'"),
    "a user to learn": ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "has train True in turn 0 of 'messages'"),
    "inputs to learn": ({"messages": CHAT, "train_on_input": True}, "has train_on_input True"),
    "a call without a name": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "look()"}]},
        "has no JSON of name and arguments in turn 1 of 'conversations', a function_call"),
    "a hole": (
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "has a 0 in its attention_mask"),
    "labels of padding": (
        {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "has labels where its attention_mask is 0"),
    "short mask": ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}, "than 2 zeros and ones as 'atten"),
    "all padding": ({"input_ids": [1], "labels": [-100], "attention_mask": [0]}, "its attention_mask has no 1"),
    "packed positions": (
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]}, "position_ids that do not count up"),
    "token types": (
        {"input_ids": [1, 2], "labels": [1, 2], "token_type_ids": [0, 1]}, "has several token_type_ids"),
}
# fmt: on


@pytest.mark.parametrize(("fields", "want"), READ.values(), ids=READ)
def test_every_turn_of_a_line_is_read(fields: dict[str, Any], want: list[tuple[str, Any]]):
    line = parse_record(fields)

    assert isinstance(line, Conversation)
    assert chat(*line.messages) == want


@pytest.mark.parametrize(("fields", "problem"), UNREAD.values(), ids=UNREAD)
def test_what_is_not_read_is_refused_by_name(fields: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        parse_record(fields)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_of_token_lines_is_taken_off(padding: str):
    before, after = {"left": (3, 0), "right": (0, 2), "both": (2, 1)}[padding]
    fields = {
        "input_ids": [1] * before + [5, 6, 7] + [1] * after,
        "attention_mask": [0] * before + [1, 1, 1] + [0] * after,
        "labels": [-100] * before + [-100, 6, 7] + [-100] * after,
        "position_ids": [1] * before + [0, 1, 2] + [1] * after,
        "token_type_ids": [0] * (before + 3 + after),
    }

    assert parse_record(fields) == Tokens([5, 6, 7], [False, True, True])
    assert parse_record(fields | {"completion_mask": [0] * (before + 2) + [1] * (after + 1)}) == Tokens(
        [5, 6, 7], [False, False, True]
    )


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"learn": 0}, {"loss": False}, {"loss_mask": 0.0}]
)
def test_a_turn_that_is_not_to_be_learned_is_no_target(tokenizer: Tokenizer, mark: dict[str, Any]):
    messages = said("Hi", "Hello", "Bye", "See you").messages
    line = parse_record({"messages": [messages[0], messages[1] | mark, *messages[2:]]})

    want = [(False, f"{BOS}User: Hi\n\nAssistant: Hello{EOS}User: Bye\n\nAssistant:"), (True, f" See you{EOS}")]
    assert spans(read(line, tokenizer), tokenizer) == want


def test_only_the_completion_of_messages_is_learned(tokenizer: Tokenizer):
    messages = said("Hi", "Hello", "Bye", "See you").messages
    line = parse_record({"prompt": messages[:3], "completion": messages[3:]})

    assert spans(read(line, tokenizer), tokenizer)[-1] == (True, f" See you{EOS}")
    assert read(line, tokenizer).loss_mask.sum() == len(f" See you{EOS}") - len(EOS) + 1


TOOLS = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content else '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments }}){% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)
TOOL_LINE = {
    "messages": [
        CHAT[0],
        {"role": A, "content": None, "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": A, "content": "5!"},
    ],
    "tools": json.dumps([TOOL]),
}


def test_a_template_that_knows_tools_writes_them(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "tools.jinja").write_text(TOOLS)

    found = spans(read(parse_record(TOOL_LINE), tokenizer, tmp_path / "tools.jinja"), tokenizer)

    assert found == [
        (False, "<tool>look</tool>[user]q[assistant]"),
        (True, f"<call>look({{}}){EOS}"),
        (False, "[tool]5[assistant]"),
        (True, f"5!{EOS}"),
    ]


IGNORED = {
    "tools": ("tools or []", "[]", TOOL_LINE, "has 'tools', which"),
    "calls": ("m.tool_calls or []", "[]", TOOL_LINE, "has 'tool_calls' in message 1, which"),
    "the second call": ("m.tool_calls or []", "(m.tool_calls or [])[:1]",
                        {"messages": [CHAT[0], {"role": A, "content": "see", "tool_calls": [CALL, CALL]}]},
                        "has 'tool_calls' in message 1, which"),
    "arguments": ("call.function.arguments", "''", TOOL_LINE, "has 'tool_calls' in message 1, which"),
    "a result": ("m.content if m.content", "m.content if m.content and m.role != 'tool'", TOOL_LINE,
                 "has a text from 'tool' in message 2, which"),
    "a system": ("m.content if m.content", "m.content if m.content and m.role != 'system'",
                 {"messages": CHAT, "system": "q"}, "has a text from 'system' in message 0, which"),
    "a field of a turn": ("x", "x", {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "so"}]},
                          "has 'reasoning_content' in message 1, which"),
    "a name": ("x", "x", {"messages": [{**CHAT[0], "name": "Ann"}, CHAT[1]]}, "has 'name' in message 0, which"),
    "a mask of unknown sense": ("x", "x", {"messages": [CHAT[0], {**CHAT[1], "mask": True}]},
                                "has 'mask' in message 1, which"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "fields", "problem"), IGNORED.values(), ids=IGNORED)
def test_what_a_template_ignores_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, old: str, new: str, fields: dict[str, Any], problem: str
):
    (tmp_path / "tools.jinja").write_text(TOOLS.replace(old, new) if old in TOOLS else TOOLS)

    with pytest.raises(ValueError, match=f"{problem} the chat template ignores"):
        read(parse_record(fields), tokenizer, tmp_path / "tools.jinja")


def test_a_template_that_fails_over_a_field_names_it(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="has 'tool_calls': the chat template failed"):
        read(parse_record({"messages": TOOL_LINE["messages"][:2]}), tokenizer)


def test_the_instruct_template_refuses_what_it_ignores(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="has 'tools', which deepseek-instruct ignores"):
        read(parse_record({"messages": CHAT, "tools": [TOOL]}), tokenizer, "deepseek-instruct")


def test_neutral_fields_are_counted_and_named_once(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    lines = [{"messages": [{**CHAT[0], "id": n}, CHAT[1]], "source": "web", "score": n, "weight": 1} for n in range(3)]

    write_examples(jsonl(tmp_path / "a.jsonl", lines), folder, tmp_path / "out", sequence_length=LONG)

    assert caplog.text.count("ignored fields: messages[].id (3 lines), score (3 lines), source (3 lines)") == 1


def test_a_share_that_comes_to_no_example_is_said(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture):
    source = jsonl(tmp_path / "a.jsonl", CORPUS[:10])

    write_examples(source, folder, tmp_path / "out", sequence_length=LONG, val_fraction=1e-9)

    assert "val_fraction 1e-09 holds out none of 10 examples: no evaluation; 0.5 would hold out about 5" in caplog.text


def test_files_of_a_run_are_left_out_of_its_data(tmp_path: Path, folder: Path):
    jsonl(tmp_path / "a.jsonl", CORPUS)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    jsonl(run / "metrics.jsonl", [{"step": 1}] * 9)

    found = write_examples(tmp_path, folder, run / "examples", sequence_length=LONG, exclude=[run])

    assert found.examples == len(CORPUS)


# The folder


CORPUS = [{"prompt": f"say {n}", "completion": "number " * (n % 7) + str(n)} for n in range(60)]


def examples_of(found: Examples) -> list[tuple[list[int], list[bool]]]:
    return [(tokens.tolist(), loss_mask.tolist()) for tokens, loss_mask in map(found.read, range(len(found)))]


def test_a_folder_gives_back_what_was_written(tmp_path: Path, folder: Path, tokenizer: Tokenizer):
    source = jsonl(tmp_path / "a.jsonl", CORPUS)

    report = write_examples(source, folder, tmp_path / "out", sequence_length=LONG, val_fraction=0.2)

    train, validation = (Examples.open(tmp_path / "out", split, verify=True) for split in ("train", "validation"))
    want = [read(Completion(**line), tokenizer) for line in CORPUS]
    pairs = [(tokens.tolist(), loss_mask.tolist()) for tokens, loss_mask in want]
    assert sorted(examples_of(train) + examples_of(validation)) == sorted(pairs)
    assert examples_of(train) == [pair for pair in pairs if pair in examples_of(train)]  # in their order
    assert 0 < len(validation) < 30
    assert (report.examples, report.tokens) == (len(train), train.tokens) == (len(train), train.lengths.sum())
    assert report.targets == sum(sum(loss_mask) for _, loss_mask in examples_of(train))
    assert (report.validation_examples, report.validation_tokens) == (len(validation), validation.tokens)
    assert train.read(0).tokens.dtype == np.int32
    assert train.read(0).loss_mask.dtype == bool
    assert (train.vocab_size, train.tokenizer_hash) == (tokenizer.vocab_size, tokenizer_hash(folder))


def test_a_folder_is_token_shards_too_and_says_that_it_is_more(tmp_path: Path, folder: Path):
    write_examples(jsonl(tmp_path / "a.jsonl", CORPUS), folder, tmp_path / "out", sequence_length=LONG)

    assert is_examples(tmp_path / "out")
    assert is_token_shards(tmp_path / "out")
    assert TokenShards.open(tmp_path / "out").tokens == Examples.open(tmp_path / "out").tokens
    assert not is_examples(tmp_path)
    with pytest.raises(ValueError, match="out: holds token shards, already tokenized"):
        write_examples(tmp_path / "out", folder, tmp_path / "other", sequence_length=LONG)


def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, folder: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet, zstandard = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("zstandard")
    lines = [*({"messages": said(f"q {n}", f"a {n}").messages} for n in range(9))]
    plain = jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "d.parquet")

    digests = {
        write_examples(path, folder, tmp_path / path.name[0], sequence_length=LONG) and Examples.open(home).digest
        for path in sorted(tmp_path.iterdir())
        for home in [tmp_path / path.name[0]]
    }

    assert len(digests) == 1


def test_rows_of_parquet_with_the_columns_of_several_formats(tmp_path: Path, folder: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = [fields for fields, _ in LINES.values()]
    schema = sorted({name for fields in lines for name in fields} - {"id"})
    rows = [{name: fields.get(name) for name in schema} for fields in lines if "id" not in fields]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    found = write_examples(tmp_path / "a.parquet", folder, tmp_path / "out", sequence_length=LONG)

    assert found.examples == len(rows)


def test_a_folder_of_files_passes_over_what_holds_no_lines(tmp_path: Path, folder: Path, caplog: Any):
    caplog.set_level(logging.INFO)
    home = tmp_path / "data"
    home.mkdir()
    jsonl(home / "a.jsonl", CORPUS)
    (home / "README.md").write_text("about")

    assert write_examples(home, folder, tmp_path / "out", sequence_length=LONG).examples == len(CORPUS)
    assert "skipped 1 files" in caplog.text


def test_what_is_held_out_depends_on_what_an_example_says_alone(tmp_path: Path, folder: Path):
    pairs = [{"instruction": f"say {n}", "output": str(n)} for n in range(30)]
    for name, lines in {"one": pairs, "twice": pairs * 2, "turned": pairs[::-1]}.items():
        write_examples(
            jsonl(tmp_path / f"{name}.jsonl", lines), folder, tmp_path / name, sequence_length=LONG, val_fraction=0.3
        )
    chats = [{"messages": said(line["instruction"], line["output"]).messages} for line in pairs]
    chats = jsonl(tmp_path / "chats.jsonl", chats)
    write_examples(
        chats, folder, tmp_path / "chats", sequence_length=LONG, val_fraction=0.3, template="deepseek-instruct"
    )

    def validation(name: str) -> list[str]:
        found = Examples.open(tmp_path / name, "validation")
        decode = Tokenizer.from_pretrained(folder).decode
        answers = [decode(tokens[loss_mask]) for tokens, loss_mask in map(found.read, range(len(found)))]
        return sorted(answer.removesuffix("\n<|EOT|>").strip() for answer in answers)

    assert validation("twice") == sorted(validation("one") * 2)
    assert validation("turned") == validation("one") == validation("chats")


def test_the_digest_knows_tokens_and_targets(tmp_path: Path, folder: Path):
    chats = jsonl(tmp_path / "a.jsonl", [{"messages": said("a", "b", "c", "d").messages}])
    for name, options in {"one": {}, "same": {}, "last": {"train_on": "last"}, "short": {"sequence_length": 40}}.items():
        write_examples(chats, folder, tmp_path / name, **({"sequence_length": LONG} | options))

    one, same, last, short = (Examples.open(tmp_path / name) for name in ("one", "same", "last", "short"))

    assert one.digest == same.digest
    assert len({one.digest, last.digest, short.digest}) == 3
    assert np.array_equal(one.read(0).tokens, last.read(0).tokens)


def test_examples_of_another_tokenizer_or_a_larger_vocabulary_are_refused(tmp_path: Path, folder: Path):
    write_examples(jsonl(tmp_path / "a.jsonl", CORPUS), folder, tmp_path / "out", sequence_length=LONG)
    found = Examples.open(tmp_path / "out")

    found.check(tokenizer_hash=tokenizer_hash(folder), vocab_size=258)
    with pytest.raises(ValueError, match="out: written with another tokenizer"):
        found.check(tokenizer_hash=tokenizer_hash(byte_tokenizer(tmp_path / "other", fill=1)))
    with pytest.raises(ValueError, match="the model's vocab_size must be at least 258, got 200"):
        found.check(vocab_size=200)


# fmt: off
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sources must name at least one source":      ({"sources": []}, "sources must name at least one source"),
    "no such source":  ({"sources": "nowhere.jsonl"}, "nowhere.jsonl: does not exist"),
    "no file of lines": ({"sources": __file__}, "test_sft.py: is not one of .jsonl, .jsonl.gz"),
    "only other files": ({"sources": f"{Path(__file__).parent}/test_examples*.py"}, "no examples found"),
    "format":          ({"format": "alpaca"}, "format 'alpaca' is not one of auto, instruction, messages, sharegpt"),
    "targets":         ({"targets": "first"}, "targets 'first' is not one of all, last"),
    "excess_length_strategy":        ({"excess_length_strategy": "cut"}, "too_long 'cut' is not one of truncate, drop, refuse"),
    "template":        ({"template": "mine"}, "template 'mine' is not one of chat, deepseek-instruct, nor a file"),
    "template folder": ({"template": "/"}, "template / cannot be read"),
    "length":          ({"sequence_length": 1}, "sequence_length must be at least 2, a token and its label, got 1"),
    "val_fraction":         ({"val_fraction": 1.0}, "val_fraction must be in \[0, 1\), got 1.0"),
    "all held out":    ({"val_fraction": 0.9999999}, "val_fraction 0.9999999 leaves none of 60 examples to train on"),
    "a long example":  ({"sequence_length": 30, "excess_length_strategy": "refuse"}, r"a.jsonl:5 has 36 tokens; sequence_len"),
    "all are long":    ({"sequence_length": 7, "excess_length_strategy": "drop"}, "all of 60 examples have more tokens than"),
}
# fmt: on


@pytest.mark.parametrize(("options", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_gets_one_line_and_leaves_nothing(
    tmp_path: Path, folder: Path, options: dict[str, Any], problem: str
):
    usual = {"sources": jsonl(tmp_path / "a.jsonl", CORPUS), "sequence_length": LONG}

    with pytest.raises(ValueError, match=problem) as refused:
        write_examples(tokenizer_folder=folder, out=tmp_path / "out", **(usual | options))

    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_holds_no_examples(tmp_path: Path, folder: Path, content: bytes):
    (tmp_path / "a.jsonl").write_bytes(content)

    with pytest.raises(ValueError, match=r"a.jsonl: no examples found"):
        write_examples(tmp_path / "a.jsonl", folder, tmp_path / "out", sequence_length=LONG)


def test_a_tokenizer_without_eos_is_refused_and_nothing_is_overwritten(tmp_path: Path, folder: Path):
    source = jsonl(tmp_path / "a.jsonl", CORPUS)

    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        write_examples(source, byte_tokenizer(tmp_path / "t", eos=False), tmp_path / "out", sequence_length=LONG)
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        write_examples(source, folder, tmp_path, sequence_length=LONG)


def change(path: Path, **fields: Any) -> None:
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(kept | fields))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "examples.json").unlink(), r"out: no examples \(no examples.json\)"),
    "format": (lambda f: change(f / "examples.json", format="x"), "format 'x', this version reads 'dsmoe examples 1'"),
    "another digit": (
        lambda f: (f / "examples.json").write_text((f / "examples.json").read_text().replace('"all"', '"oll"')),
        "examples.json: damaged: SHA-256 mismatch",
    ),
    "no splits": (lambda f: change(f / "examples.json", splits=[]), "no SHA-256 of the targets of train"),
    "no sum": (lambda f: change(f / "examples.json", splits={"train": {"sha256": 3}}), "no SHA-256 of the targets"),
    "no shards": (lambda f: (f / "manifest.json").unlink(), "out: no token shards"),
    "no targets": (lambda f: (f / "train.targets").unlink(), "train.targets: is missing"),
    "short": (
        lambda f: (f / "train.targets").write_bytes(b"\1"),
        r"train.targets: has 1 bytes, not \d+",
    ),
    "other bytes": (
        lambda f: (f / "train.targets").write_bytes(bytes((f / "train.targets").stat().st_size)),
        "train.targets: has other bytes than were written",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(
    tmp_path: Path, folder: Path, damage: Callable[[Path], Any], problem: str
):
    write_examples(jsonl(tmp_path / "a.jsonl", CORPUS), folder, tmp_path / "out", sequence_length=LONG)
    damage(tmp_path / "out")

    with pytest.raises(ValueError, match=problem) as refused:
        Examples.open(tmp_path / "out", verify=True)

    assert "\n" not in str(refused.value)


# Too long


def masked(*runs: tuple[bool, int], bos: bool = True) -> Example:
    """Tokens 1, 2 and so on after bos 0, in runs that are targets or not."""
    loss_mask = np.concatenate([np.full(size, learned) for learned, size in runs])
    return Example(np.arange(len(loss_mask), dtype=np.int32) + (not bos), loss_mask)


def test_what_is_cut_by_eye():
    short = truncate(masked((False, 3), (True, 3), (False, 4)), 8, 0)
    assert short.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]

    late = truncate(masked((False, 10), (True, 6)), 6, 0)  # half a row of targets
    assert late.tokens.tolist() == [0, 8, 9, 10, 11, 12]
    assert late.loss_mask.tolist() == [False] * 3 + [True] * 3

    few = truncate(masked((False, 10), (True, 1), (False, 2), (True, 9)), 6, 0)  # the whole of a small answer
    assert few.tokens.tolist() == [0, 6, 7, 8, 9, 10]

    bare = truncate(masked((False, 10), (True, 6), bos=False), 6, 0)
    assert bare.tokens.tolist() == [8, 9, 10, 11, 12, 13]


runs = strategies.lists(strategies.tuples(strategies.booleans(), strategies.integers(1, 30)), max_size=6)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(runs=runs, bos=strategies.booleans(), length=strategies.integers(2, 40))
def test_no_example_is_left_without_targets(runs: list[tuple[bool, int]], bos: bool, length: int):
    example = masked((False, 1), *runs, (True, 1), bos=bos)
    first = int(example.loss_mask.argmax())
    run = int(np.append(example.loss_mask[first:], False).argmin())

    tokens, loss_mask = truncate(example, length, 0)

    assert len(tokens) == len(loss_mask) == min(length, len(example.tokens))
    assert loss_mask.sum() >= min(run, length // 2) > 0
    assert not loss_mask[0]
    assert (tokens[0] == 0) == bos
    assert (np.diff(tokens[1:]) == 1).all()  # one stretch of the example
    assert loss_mask.tolist() == example.loss_mask[tokens - (not bos)].tolist()


def test_long_examples_are_cut_or_left_out_and_counted_once(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
):
    source = jsonl(tmp_path / "a.jsonl", CORPUS)
    write_examples(source, folder, tmp_path / "whole", sequence_length=LONG)
    whole = Examples.open(tmp_path / "whole").lengths

    for too_long, done in {"truncate": "were truncated", "drop": "were left out"}.items():
        report = write_examples(source, folder, tmp_path / too_long, sequence_length=40, excess_length_strategy=too_long)
        assert report.too_long == (whole > 40).sum() > 0
        longest = f"{report.too_long} of 60 examples had more than 40 tokens (the longest {whole.max()}) and {done}"
        assert caplog.text.count(longest) == 1

    assert Examples.open(tmp_path / "truncate").lengths.tolist() == np.minimum(whole, 40).tolist()
    assert Examples.open(tmp_path / "drop").lengths.tolist() == whole[whole <= 40].tolist()


# Shown to a person


def test_examples_are_shown_with_what_is_learned(tmp_path: Path, folder: Path, tokenizer: Tokenizer):
    from io import StringIO

    from rich.console import Console

    lines = [{"prompt": "a [bold]\x1b[2J", "completion": "b" * 200}, {"prompt": "c", "completion": "d"}]
    write_examples(jsonl(tmp_path / "a.jsonl", lines), folder, tmp_path / "out", sequence_length=LONG)
    plain, coloured = StringIO(), StringIO()

    show(Examples.open(tmp_path / "out"), tokenizer, 1, Console(file=plain))
    show(Examples.open(tmp_path / "out"), tokenizer, 9, Console(file=coloured, force_terminal=True, no_color=False))

    assert plain.getvalue() == (f"example 0 of 2: 214 tokens, 201 targets\n{BOS}a [bold]\\x1b[2J⟦{'b' * 200}{EOS}⟧\n\n")
    assert f"\x1b[1;32m{'b' * 200}{EOS}\x1b[0m" in coloured.getvalue()
    assert "example 1 of 2" in coloured.getvalue()
    assert "\x1b[2J" not in coloured.getvalue()
    assert "⟦" not in coloured.getvalue()


# --- where answers end ---

TURN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + END }}{% endfor %}"
ENDINGS = {
    "an EOS token": ("eos_token + '\\n'", {}),
    "text": ("'<|im_end|>\\n'", {"stop_strings": ["<|im_end|>"]}),
    "another token": ("'\\n' + bos_token + '\\n'", {"eos_token_id": 0}),
    "nothing": ("'\\n'", {}),
}


@pytest.mark.parametrize(("end", "fields"), ENDINGS.values(), ids=ENDINGS)
def test_a_templates_end_of_an_answer_is_found(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, end: str, fields: dict
):
    (tmp_path / "template").write_text(TURN.replace("END", end))

    found = infer_stop_config(tmp_path / "template", tokenizer)

    assert found == fields
    assert ("does not learn to stop" in caplog.text) == (end == "'\\n'")


def test_end_of_an_answer_is_found_whatever_the_template_writes_of_it(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.content | upper }}###{% endfor %}")

    assert infer_stop_config(tmp_path / "template", tokenizer) == {"stop_strings": ["###"]}


def test_end_token_stays_a_token_where_text_is_split(tmp_path: Path, folder: Path):
    split = Tokenizer.from_pretrained(folder, split_special_tokens=True)
    (tmp_path / "template").write_text(TURN.replace("END", "bos_token"))

    assert infer_stop_config("chat", split) == {}
    assert infer_stop_config(tmp_path / "template", split) == {"eos_token_id": 0}


def test_deepseek_instruct_ends_with_text_and_chat_with_eos(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        instruct, chat = (infer_stop_config(name, tokenizer) for name in ("deepseek-instruct", "chat"))

    assert (instruct, chat) == ({"stop_strings": ["<|EOT|>"]}, {})
    (line,) = [record.message for record in caplog.records if "Template" in record.message]
    assert line == (
        "Template deepseek-instruct: answers end with the text '<|EOT|>', which is not an EOS token: "
        "generation_config.json gets it as a stop string"
    )
