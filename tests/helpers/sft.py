"""Fine-tuning records and how tests read them."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.sft.examples import Example
from dsmoe_jax.train.sft.formats import Completion, Conversation, Tokens
from dsmoe_jax.train.sft.templates import open_template, tokenize_record


def jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return path


def chat(*texts: str) -> Conversation:
    """Alternating user and assistant turns."""
    return Conversation([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)])


def spans(example: Example, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """Text of an example, split where the loss mask changes."""
    tokens, loss_mask = example
    cuts = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(tokens)]
    return [
        (bool(loss_mask[a]), tokenizer.decode(tokens[a:b], skip_special_tokens=False))
        for a, b in itertools.pairwise(cuts)
    ]


def read(line: Any, tokenizer: Tokenizer, template: str | Path = "chat", train_on: str = "all") -> Example:
    return tokenize_record(line, tokenizer, open_template(template), train_on)


RECORDS: dict[str, tuple[dict[str, Any], Any]] = {
    "instruction": ({"instruction": "Hi", "output": "Hello"}, chat("Hi", "Hello")),
    "with an input": ({"instruction": "Add", "input": "1, 2", "output": "3"}, chat("Add\n\n1, 2", "3")),
    "with an empty input": ({"instruction": "Hi ", "input": " ", "output": "Hello"}, chat("Hi ", "Hello")),
    "with no input": ({"instruction": "Hi", "input": None, "output": "Hello"}, chat("Hi", "Hello")),
    "an input alone": ({"instruction": "", "input": "1, 2", "output": "3"}, chat("1, 2", "3")),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "id": 3}]},
        chat("Hi", "Hello"),
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        chat("Hi", "Hello"),
    ),
    "sharegpt by other names": (
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        chat("Hi", "Hello"),
    ),
    "completion": ({"prompt": "1 + 1 =", "completion": " 2"}, Completion("1 + 1 =", " 2")),
    "tokens": (
        {"input_ids": [0, 7, 8], "labels": [-100, -100, 8], "attention_mask": [1, 1, 1]},
        Tokens([0, 7, 8], [False, False, True]),
    ),
    "columns of nothing": ({"messages": None, "prompt": "a", "completion": "b"}, Completion("a", "b")),
}


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


A = "assistant"


CHAT = [{"role": "user", "content": "q"}, {"role": A, "content": "a"}]


CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
