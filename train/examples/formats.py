"""What a line of fine-tuning data says, whatever its fields are called. Start at `FORMATS`, the table at the end.

Every `ValueError` from here is worded to follow the name of the line.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from dsmoe_jax.chat_template import ROLES

AUTO: Final = "auto"
_IGNORED: Final = -100  # as a label, by Hugging Face's convention
_SHAREGPT: Final = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Conversation(NamedTuple):
    """Turns, for a template to write out; the assistant's are learned."""

    messages: list[dict[str, str]]


class Completion(NamedTuple):
    """A text and how it goes on, which is learned; no template."""

    prompt: str
    completion: str


class Tokens(NamedTuple):
    """Ids of the tokenizer, and which of them are learned."""

    ids: list[int]
    is_target: list[bool]


Line = Conversation | Completion | Tokens
Fields = Mapping[str, Any]


class Format(NamedTuple):
    """The fields by which a format is known, and how they are read."""

    fields: tuple[str, ...]
    read: Callable[[Fields], Line]


def read_line(fields: Fields, format: str = AUTO) -> Line:
    """What the fields of a line say; `format` is a name of `FORMATS`, or auto: found from the fields that are there."""
    # Rows of parquet have every column: what a row does not have is None.
    there = {name for name, value in fields.items() if value is not None}
    if format != AUTO:
        if missing := [name for name in FORMATS[format].fields if name not in there]:
            raise ValueError(f"has no field {missing[0]!r}")
        return FORMATS[format].read(fields)
    found = [name for name, entry in FORMATS.items() if there.issuperset(entry.fields)]
    if not found:
        known = ", ".join(" and ".join(entry.fields) for entry in FORMATS.values())
        raise ValueError(f"has none of the fields {known}")
    if len(found) > 1:
        raise ValueError(f"has the fields of {' and of '.join(found)}; name the format")
    return FORMATS[found[0]].read(fields)


def texts_of(line: Line) -> list[str]:
    """The text in a line, as far as people wrote it."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return [text for one in inner for text in strings(one)]

    return [] if isinstance(line, Tokens) else strings(tuple(line))


def _instruction(fields: Fields) -> Conversation:
    # Alpaca's `input`, what the instruction is about: a blank line and then the text, as a person would paste it.
    about = _text(fields, "input") if fields.get("input") is not None else ""
    asked = [text for text in (_text(fields, "instruction"), about) if text.strip()]
    answer = _filled(fields, "output")
    return Conversation([_message("user", "\n\n".join(asked)), _message("assistant", answer)])


def _messages(fields: Fields) -> Conversation:
    return _turns(fields, "messages", "role", "content", {role: role for role in ROLES})


def _sharegpt(fields: Fields) -> Conversation:
    return _turns(fields, "conversations", "from", "value", _SHAREGPT)


def _completion(fields: Fields) -> Completion:
    return Completion(_text(fields, "prompt"), _filled(fields, "completion"))


def _tokens(fields: Fields) -> Tokens:
    ids, labels = fields["input_ids"], fields["labels"]
    for name, numbers in (("input_ids", ids), ("labels", labels)):
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise ValueError(f"has something other than a list of integers as {name!r}")
    if len(ids) != len(labels):
        raise ValueError(f"has {len(ids)} input_ids and {len(labels)} labels")
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (_IGNORED, token):
            raise ValueError(f"has label {label} at token {at}, which is {token}; it must be that or {_IGNORED}")
    return Tokens(ids, [label != _IGNORED for label in labels])


def _turns(fields: Fields, field: str, who: str, what: str, roles: Mapping[str, str]) -> Conversation:
    if not isinstance(turns := fields[field], list):
        raise ValueError(f"has a {type(turns).__name__} as {field!r}, not a list")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {who, what} <= turn.keys():
            raise ValueError(f"has no {who!r} and {what!r} in turn {number} of {field!r}")
        if (role := roles.get(str(turn[who]))) is None:
            raise ValueError(f"has turn {number} from {turn[who]!r:.80}; known are {', '.join(roles)}")
        messages.append(_message(role, (_filled if role == "assistant" else _text)(turn, what)))
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"has no turn of the assistant in {field!r}")
    return Conversation(messages)


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _text(fields: Fields, name: str) -> str:
    if not isinstance(text := fields[name], str):
        raise ValueError(f"has a {type(text).__name__} as {name!r}, not a text")
    return text


def _filled(fields: Fields, name: str) -> str:
    if not (text := _text(fields, name)).strip():
        raise ValueError(f"has nothing to learn: its {name!r} is empty")
    return text


# fmt: off
FORMATS: Final[dict[str, Format]] = {
    "instruction": Format(("instruction", "output"), _instruction),
    "messages":    Format(("messages",),             _messages),
    "sharegpt":    Format(("conversations",),        _sharegpt),
    "completion":  Format(("prompt", "completion"),  _completion),
    "tokens":      Format(("input_ids", "labels"),   _tokens),
}
# fmt: on
