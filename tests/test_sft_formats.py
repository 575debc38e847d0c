"""Formats of fine-tuning records. Malformed and unsupported ones are in the tables `MALFORMED` and `UNSUPPORTED`."""

from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.train.sft import FORMATS, write_examples
from dsmoe_jax.train.sft.formats import Completion, Conversation, Tokens, parse_record
from tests.helpers.sft import CALL, CHAT, RECORDS, TOOL, A, jsonl, turns

LONG = 10_000


@pytest.mark.parametrize(("fields", "want"), RECORDS.values(), ids=RECORDS)
def test_format_is_detected_or_named(fields: dict[str, Any], want: Any):
    names = [name for name, entry in FORMATS.items() if all(fields.get(field) is not None for field in entry.fields)]

    assert parse_record(fields) == want
    assert [parse_record(fields, name) for name in names] == [want]


def test_system_turn_keeps_its_role():
    fields = {"conversations": [{"from": "system", "value": "S"}, {"from": "gpt", "value": "Hello"}]}

    assert [message["role"] for message in parse_record(fields).messages] == ["system", "assistant"]  # pyright: ignore


def test_record_of_two_formats_requires_a_named_format():
    fields = {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}

    assert parse_record(fields, "completion") == Completion("a", "b")
    with pytest.raises(ValueError, match="matches the formats instruction and completion; set format"):
        parse_record(fields)


# fmt: off
MALFORMED: dict[str, tuple[Any, str]] = {
    "another format":   ({"text": "a"}, "has none of the fields instruction and output, messages, conversations"),
    "no object":        (["a"], "is not a JSON object"),
    "empty output":     ({"instruction": "a", "output": " \n"}, "has an empty 'output'"),
    "empty completion": ({"prompt": "a", "completion": ""}, "has an empty 'completion'"),
    "not a text":       ({"instruction": 3, "output": "a"}, "must have a string as 'instruction', got int"),
    "input":            ({"instruction": "a", "input": [], "output": "a"}, "must have a string as 'input', got list"),
    "half a surrogate": ({"prompt": "\ud83d", "completion": "a"}, "surrogate"),
    "not a list":       ({"messages": "a"}, "must have a list as 'messages', got str"),
    "no turns":         ({"messages": []}, "has no assistant turn in 'messages'"),
    "no answer":        (turns(("user", "a")), "has no assistant turn in 'messages'"),
    "empty answer":     (turns(("user", "a"), ("assistant", "")), "has an empty 'content'"),
    "role":             (turns(("user", "a"), ("bot", "b")), "got 'bot' in turn 1"),
    "list as a role":   (turns((["user"], "a")), "got ['user'] in turn 0"),
    "no content":       (turns(("user", None)), "must have a string as 'content', got NoneType"),
    "no role":          ({"messages": [{"from": "user"}]}, "must have 'role' and 'content' in turn 0 of 'messages'"),
    "lengths":          ({"input_ids": [1, 2], "labels": [1]}, "has 2 input_ids and 1 labels"),
    "ids":              ({"input_ids": "ab", "labels": [1]}, "must have a list of integers as 'input_ids'"),
    "truth as an id":   ({"input_ids": [1], "labels": [True]}, "must have a list of integers as 'labels'"),
    "shifted labels":   ({"input_ids": [1, 2], "labels": [2, 3]}, "has label 2 at token 0; it must be 1 or -100"),
    "nothing learned":  ({"input_ids": [1, 2], "labels": [-100, -100]}, "has no token with a loss"),
    "strange id":       ({"input_ids": [1, 999], "labels": [1, 999]}, "has token id 999; ids must be in [0, 258)"),
    "negative id":      ({"input_ids": [1, -1], "labels": [1, -1]}, "has token id -1; ids must be in [0, 258)"),
}


@pytest.mark.parametrize(("line", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_record_is_logged_and_skipped_or_refused(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, line: Any, problem: str
):
    good = {"instruction": "Hi", "output": "Hello"}
    source = jsonl(tmp_path / "a.jsonl", [good, line, good])

    found = write_examples(source, tokenizer_folder, tmp_path / "out", sequence_length=LONG, max_malformed_fraction=0.5)

    assert found.train.documents == 2
    assert f"{source}:2 " in caplog.text
    assert problem in caplog.text
    with pytest.raises(
        ValueError, match=r"1 of 3 lines are malformed, at most 1 % may be; the first: .*a.jsonl:2 "
    ) as refused:
        write_examples(source, tokenizer_folder, tmp_path / "other", sequence_length=LONG)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "other").exists()


def test_named_format_refuses_other_records(tmp_path: Path, tokenizer_folder: Path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])

    with pytest.raises(ValueError, match=r"a.jsonl:1 has no field 'instruction'"):
        write_examples(source, tokenizer_folder, tmp_path / "out", format="instruction", sequence_length=LONG)


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


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "preference": ({"messages": CHAT, "chosen": "a"}, "has 'chosen': preference data is not supported"),
    "preference without a format": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has 'chosen': preference data"),
    "kto": ({"prompt": "a", "completion": "b", "label": True}, "has a bool as 'label': preference data"),
    "images": ({"messages": CHAT, "images": ["a.png"]}, "has 'images': only text is supported"),
    "a part that is an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT[1]]},
        "has a part of type 'image_url' in turn 0 of 'messages'; only text is supported"),
    "a completion's system": (
        {"prompt": "a", "completion": "b", "system": "S"}, "has 'system', which the format completion does not read"),
    "a completion's tools": ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "completion does not read for str"),
    "context": ({"instruction": "q", "output": "a", "context": "c"}, "has 'context', which the format in"),
    "a question": ({"messages": CHAT, "question": "c"}, "has 'question', which the format messages does not"),
    "another spelling": ({"messages": CHAT, "systemPrompt": "S"}, "has 'systemPrompt', which the format messages does"),
    "a path of an image": ({"messages": CHAT, "image_path": "a.png"}, "has 'image_path': only text is supported"),
    "packed tokens": ({"input_ids": [1, 2], "labels": [1, 2], "cu_seqlens": [0, 1, 2]}, "has 'cu_seqlens', which"),
    "a line not to learn": ({"messages": CHAT, "train": False}, "has train False; only 1 is supported"),
    "a mask of turns": ({"messages": CHAT, "loss_mask": [0]}, r"has loss_mask \[0\]; only 1 is supported"),
    "weights of tokens": (
        {"input_ids": [1, 2], "labels": [1, 2], "loss_weights": [0, 1]}, r"has loss_weights \[0, 1\]; only 1 is supp"),
    "a masked history": ({"messages": CHAT, "mask_history": True}, "has mask_history True; only 0 is supported"),
    "two systems": (
        {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "T"}, "has two system messages, one of"),
    "history of one": ({"instruction": "q", "output": "a", "history": [["q"]]}, "pairs of strings as 'history'"),
    "tools of text": ({"messages": CHAT, "tools": "look"}, "must have a list of objects as 'tools'"),
    "half a weight": ({"messages": CHAT, "weight": 0.5}, "has weight 0.5; only 1 is supported"),
    "half a mark": ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "has weight 0.5 in turn 1 of 'messages'"),
    "a user to learn": ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "has train True in turn 0 of 'messages'"),
    "inputs to learn": ({"messages": CHAT, "train_on_input": True}, "has train_on_input True"),
    "a call without a name": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "look()"}]},
        "must have JSON with name and arguments in turn 1 of 'conversations', a function_call"),
    "a hole": (
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "has a 0 within its attention"),
    "labels of padding": (
        {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "has labels where its attention_mask is 0"),
    "short mask": ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}, "must have 2 zeros and ones as"),
    "all padding": ({"input_ids": [1], "labels": [-100], "attention_mask": [0]}, "has no 1 in its attention_mask"),
    "packed positions": (
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]}, "position_ids that do not increase"),
    "token types": (
        {"input_ids": [1, 2], "labels": [1, 2], "token_type_ids": [0, 1]}, "has several token_type_ids"),
}


@pytest.mark.parametrize(("fields", "want"), READ.values(), ids=READ)
def test_every_turn_of_a_record_is_read(fields: dict[str, Any], want: list[tuple[str, Any]]):
    line = parse_record(fields)

    assert isinstance(line, Conversation)
    assert chat(*line.messages) == want


@pytest.mark.parametrize(("fields", "problem"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unread_fields_are_refused_by_name(fields: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        parse_record(fields)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_of_token_records_is_removed(padding: str):
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
