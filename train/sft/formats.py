"""What a line of fine-tuning data says, whatever its fields are called. Start at `FORMATS`, the table at the end.

Every `ValueError` from here is worded to follow the name of the line.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.chat_template import ROLES

AUTO: Final = "auto"
_IGNORED: Final = -100  # as a label, by Hugging Face's convention
_ROLES: Final = {role: role for role in (*ROLES, "tool")}
_SHAREGPT: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
# Fields of a turn that say whether it is learned.
_MARKS: Final = ("weight", "train", "training", "trainable", "learn", "loss", "loss_mask")
# fmt: off
# Fields that say something about a turn, not in it.
_ABOUT_A_TURN: Final = frozenset((
    "id", "uuid", "turn_id", "message_id", "parent_id", "index", "timestamp", "created_at", "date",
    "source", "lang", "language", "model", "score", "rating",
))
# Fields of a line that speak to the model: refused where the format does not read them. Spelled as `_plain` has them.
_UNREAD: Final = frozenset((
    "system", "systemprompt", "systemmessage", "history", "input", "context", "background", "passage", "knowledge",
    "preamble", "persona", "prefix", "suffix", "instruction", "instructions", "prompt", "query", "question",
    "demonstrations", "fewshot", "tools", "availabletools", "functions", "documents",
    "reasoning", "reasoningcontent", "thinking", "thought", "thoughts", "cot", "chainofthought", "chattemplatekwargs",
    "segmentids", "sequenceids", "seqidx", "seqlens", "seqlengths", "sequencelengths", "cuseqlens", "inputsembeds",
    "decoderinputids",
))
_UNSUPPORTED: Final = {
    **dict.fromkeys(("chosen", "rejected", "ktotag", "chosenresponse", "rejectedresponse", "responsechosen",
                     "responserejected"), "preference data is not supported"),
    **dict.fromkeys((f"{kind}{end}" for kind in ("image", "audio", "video")
                     for end in ("", "s", "path", "paths", "url", "urls", "file", "files")), "only text is supported"),
    **dict.fromkeys(("pixelvalues", "attachments"), "only text is supported"),
}
# Fields of a line that say what is learned: they must say what holds anyway.
_SAYS_LEARNED: Final = re.compile(r"(.*_)?(mask|weight)s?|train(ing|able)?|learn|loss|mask_prompt")
_SAYS_NOT_LEARNED: Final = re.compile(r"train_on_(input|prompt)s?|mask_history")
_SYSTEM: Final = ("system", "system_prompt")
# fmt: on


class Conversation(NamedTuple):
    """Turns, for a template to write out; the assistant's are learned."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    learned: tuple[bool, ...] = ()  # of each turn of the assistant; empty: all are

    @property
    def variables(self) -> dict[str, Any]:
        """What the template sees beside the messages."""
        return {name: value for name in ("tools", "documents") if (value := getattr(self, name))}


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
    """The fields by which a format is known, how they are read, and what else is read where it is there."""

    fields: tuple[str, ...]
    read: Callable[[Fields], Line]
    also: tuple[str, ...] = ()


def read_line(fields: Fields, format: str = AUTO) -> Line:
    """What the fields of a line say; `format` is a name of `FORMATS`, or auto: found from the fields that are there.

    What cannot be read but speaks to the model is refused; `ignored_fields` has the rest.
    """
    for field, value in fields.items():
        if (why := _UNSUPPORTED.get(_plain(field))) and not _is_blank(value):
            raise DSMoEError(f"has {field!r}: {why}")
    name = _find(fields, format)
    entry = FORMATS[name]
    # Who names a format leaves the fields of the other formats.
    left = () if format == AUTO else [field for other in FORMATS.values() for field in other.fields]
    others = {field: value for field, value in fields.items() if field not in (*entry.fields, *entry.also, *left)}
    for field, value in others.items():
        if (wanted := _wanted(field, value)) is None:
            continue
        if any(one != wanted for one in (value if isinstance(value, list) else [value])):
            raise DSMoEError(f"has {field} {value!r:.80}; only {wanted:d} is supported")
    if isinstance(fields.get("label"), bool):
        raise DSMoEError("has a bool as 'label': preference data is not supported")
    line = entry.read(fields)
    said = {text.strip() for text in texts_of(line)}
    for field, value in others.items():
        again = isinstance(value, str) and value.strip() in said  # as some data sets have the first question
        if _plain(field) in _UNREAD and not _is_blank(value) and not again:
            raise DSMoEError(f"has {field!r}: the format {name} does not read it")
    return line


def _plain(field: str) -> str:
    """The name of a field in one of its spellings: system_prompt, systemPrompt, System-Prompt."""
    return re.sub(r"[^a-z0-9]", "", field.lower())


def _wanted(field: str, value: Any) -> bool | None:
    """What a field of a line must say because it is about what is learned; None if it is not."""
    if value is None or field == "special_tokens_mask" or (field == "loss" and isinstance(value, float)):
        return None
    return True if _SAYS_LEARNED.fullmatch(field) else False if _SAYS_NOT_LEARNED.fullmatch(field) else None


def _find(fields: Fields, format: str) -> str:
    """The name of the line's format."""
    # Rows of parquet have every column: what a row does not have is None.
    there = {name for name, value in fields.items() if value is not None}
    if format != AUTO:
        if missing := [name for name in FORMATS[format].fields if name not in there]:
            raise DSMoEError(f"has no field {missing[0]!r}")
        return format
    found = [name for name, entry in FORMATS.items() if there.issuperset(entry.fields)]
    if not found:
        known = ", ".join(" and ".join(entry.fields) for entry in FORMATS.values())
        raise DSMoEError(f"has none of the fields {known}")
    if len(found) > 1:
        raise DSMoEError(f"has the fields of {' and of '.join(found)}; name the format")
    return found[0]


def ignored_fields(fields: Fields, format: str = AUTO) -> set[str]:
    """The names of the fields that `read_line` does not read and that say nothing to the model."""
    entry = FORMATS[_find(fields, format)]
    known = (*entry.fields, *entry.also)
    ignored = {
        name
        for name, value in fields.items()
        if name not in known and not _is_blank(value) and _wanted(name, value) is None
    }
    for field in ("messages", "conversations"):
        for turn in fields[field] if isinstance(fields.get(field), list) else ():
            if isinstance(turn, Mapping):
                ignored |= {f"{field}[].{name}" for name in turn if name in _ABOUT_A_TURN and turn[name] is not None}
    return ignored


def _is_blank(value: Any) -> bool:
    """Whether a field says nothing: null, or an empty text, list or object."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


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
    turns = [message for pair in _history(fields) for message in pair]
    turns += [_message("user", "\n\n".join(asked)), _message("assistant", answer)]
    return Conversation(_with_system(fields, turns), _objects(fields, "tools"))


def _history(fields: Fields) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Earlier rounds, [[asked, answered], …] as LLaMA-Factory has them; their answers are learned, too."""
    history = fields.get("history")
    if _is_blank(history):
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise DSMoEError("has something other than a list of pairs of texts as 'history'")
    return [(_message("user", asked), _message("assistant", answered)) for asked, answered in history]


def _messages(fields: Fields) -> Conversation:
    return _conversation(fields, "messages", "role", "content", _ROLES)


def _sharegpt(fields: Fields) -> Conversation:
    return _conversation(fields, "conversations", "from", "value", _SHAREGPT)


def _completion(fields: Fields) -> Line:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # of messages, as in TRL
        before, after = (_turns(fields, name, "role", "content", _ROLES) for name in ("prompt", "completion"))
        learned = [*(False for _ in before), *(mark for _, mark in after)]
        messages = [message for message, _ in (*before, *after)]
        marks = [mark for message, mark in zip(messages, learned, strict=True) if message["role"] == "assistant"]
        return Conversation(messages, _objects(fields, "tools"), _objects(fields, "documents"), _marks(marks))
    for name in ("tools", "documents"):
        if not _is_blank(fields.get(name)):
            raise DSMoEError(f"has {name!r}: the format completion does not read it beside texts")
    return Completion(_text(fields, "prompt"), _filled(fields, "completion"))


def _tokens(fields: Fields) -> Tokens:
    ids, labels = fields["input_ids"], fields["labels"]
    for name, numbers in (("input_ids", ids), ("labels", labels)):
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise DSMoEError(f"has something other than a list of integers as {name!r}")
    if len(ids) != len(labels):
        raise DSMoEError(f"has {len(ids)} input_ids and {len(labels)} labels")
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (_IGNORED, token):
            raise DSMoEError(f"has label {label} at token {at}, which is {token}; it must be that or {_IGNORED}")
    is_target = [label != _IGNORED for label in labels]
    for name in _TOKEN_MASKS:
        if (mask := _mask(fields, name, len(ids))) is not None:
            is_target = [target and one == 1 for target, one in zip(is_target, mask, strict=True)]
    if any(kind != fields["token_type_ids"][0] for kind in _mask(fields, "token_type_ids", len(ids)) or ()):
        raise DSMoEError("has several token_type_ids; the model knows one")
    valid = _valid(fields, ids, is_target)
    positions = fields.get("position_ids")
    if positions is not None:
        if not isinstance(positions, list) or len(positions) != len(ids):
            raise DSMoEError(f"has something other than {len(ids)} integers as 'position_ids'")
        if any(b - a != 1 for a, b in itertools.pairwise(positions[valid])):
            raise DSMoEError("has position_ids that do not count up by 1: one line is one example")
    return Tokens(ids[valid], is_target[valid])


def _mask(fields: Fields, name: str, length: int) -> list[int] | None:
    """A list of zeros and ones, one a token; None if it is not there."""
    if (mask := fields.get(name)) is None:
        return None
    if not isinstance(mask, list) or len(mask) != length or any(one not in (0, 1) for one in mask):
        raise DSMoEError(f"has something other than {length} zeros and ones as {name!r}")
    return mask


def _valid(fields: Fields, ids: list[int], is_target: list[bool]) -> slice:
    """Where the tokens are that `attention_mask` does not call padding."""
    mask = _mask(fields, "attention_mask", len(ids)) or [1] * len(ids)
    if 1 not in mask:
        raise DSMoEError("has nothing to learn: its attention_mask has no 1")
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:last]:
        raise DSMoEError(f"has a 0 in its attention_mask at token {mask.index(0, first)}, between others")
    if any(is_target[:first] + is_target[last:]):
        raise DSMoEError("has labels where its attention_mask is 0")
    return slice(first, last)


def _conversation(fields: Fields, field: str, who: str, what: str, roles: Mapping[str, str]) -> Conversation:
    found = _turns(fields, field, who, what, roles)
    marks = [learned for message, learned in found if message["role"] == "assistant"]
    if not marks:
        raise DSMoEError(f"has no turn of the assistant in {field!r}")
    messages = _with_system(fields, [message for message, _ in found])
    return Conversation(messages, _objects(fields, "tools"), _objects(fields, "documents"), _marks(marks))


def _marks(marks: list[bool]) -> tuple[bool, ...]:
    return () if all(marks) else tuple(marks)


def _turns(
    fields: Fields, field: str, who: str, what: str, roles: Mapping[str, str]
) -> list[tuple[dict[str, Any], bool]]:
    """The messages, and which may be learned."""
    if not isinstance(turns := fields[field], list):
        raise DSMoEError(f"has a {type(turns).__name__} as {field!r}, not a list")
    return [_turn(number, turn, field, who, what, roles) for number, turn in enumerate(turns)]


def _turn(
    number: int, turn: Any, field: str, who: str, what: str, roles: Mapping[str, str]
) -> tuple[dict[str, Any], bool]:
    """A message with all fields of the turn that may speak to the model, and whether it may be learned."""
    where = f"turn {number} of {field!r}"
    extra = {} if not isinstance(turn, Mapping) else {k: v for k, v in turn.items() if not _is_blank(v)}
    calls = "tool_calls" in extra or "function_call" in extra
    if not isinstance(turn, Mapping) or who not in turn or (what not in turn and not calls):
        raise DSMoEError(f"has no {who!r} and {what!r} in {where}")
    if (role := roles.get(str(turn[who]))) is None:
        raise DSMoEError(f"has turn {number} from {turn[who]!r:.80}; known are {', '.join(roles)}")
    learned = True
    for name in _MARKS:
        if (mark := turn.get(name)) is None:
            continue
        if mark not in (0, 1):
            raise DSMoEError(f"has {name} {mark!r:.80} in {where}; allowed are true, false, 1 and 0")
        if mark and role != "assistant":
            raise DSMoEError(f"has {name} {mark!r} in {where}, which is from {turn[who]!r}; only answers are learned")
        learned = learned and bool(mark)
    extra = {name: value for name, value in extra.items() if name not in (who, what, *_MARKS, *_ABOUT_A_TURN)}
    if clash := [name for name in ("role", "content") if name in extra]:
        raise DSMoEError(f"has {clash[0]!r} beside {what!r} in {where}")
    if turn[who] == "function_call":
        message = {"role": role, "content": None, "tool_calls": _calls(turn[what], where)}
    elif calls and turn.get(what) is None:
        message = {"role": role, "content": None}
    else:
        content = turn[what] if not isinstance(turn[what], list) else _joined(turn[what], where)
        filled = role == "assistant" and learned and not calls
        message = _message(role, (_filled if filled else _text)({what: content}, what))
    return message | extra, learned


def _joined(parts: list[Any], where: str) -> str:
    """The text of a list of text parts."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise DSMoEError(f"has a part of type {kind!r:.80} in {where}; only text is supported")
        if more := [name for name, value in part.items() if name not in ("type", "text") and not _is_blank(value)]:
            raise DSMoEError(f"has {more[0]!r} in a part of {where}; only text is supported")
    return "".join(part["text"] for part in parts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's call of a function, or several, as JSON."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or any(not isinstance(call, dict) or {*call} != {"name", "arguments"} for call in calls):
        raise DSMoEError(f"has no JSON of name and arguments in {where}, a function_call")
    return [{"type": "function", "function": call} for call in calls]


def _with_system(fields: Fields, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the line's own system message, if it has one."""
    names = [name for name in _SYSTEM if not _is_blank(fields.get(name))]
    here = {_text(fields, name) for name in names}
    there = {message["content"] for message in messages if message["role"] == "system"}
    if len(here | there) > 1 and here:
        raise DSMoEError(f"has two system messages, one of them as {names[0]!r}")
    return messages if there or not here else [_message("system", here.pop()), *messages]


def _objects(fields: Fields, name: str) -> list[dict[str, Any]] | None:
    """A list of objects, or its JSON."""
    if _is_blank(value := fields.get(name)):
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DSMoEError(f"has something other than a list of objects as {name!r}")
    return found or None


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _text(fields: Fields, name: str) -> str:
    if not isinstance(text := fields[name], str):
        raise DSMoEError(f"has a {type(text).__name__} as {name!r}, not a text")
    return text


def _filled(fields: Fields, name: str) -> str:
    if not (text := _text(fields, name)).strip():
        raise DSMoEError(f"has nothing to learn: its {name!r} is empty")
    return text


_TOKEN_MASKS: Final = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")  # 1 where it is learned
_PADDING: Final = ("attention_mask", "position_ids", "token_type_ids")
# fmt: off
FORMATS: Final[dict[str, Format]] = {
    "instruction": Format(("instruction", "output"), _instruction, ("input", "history", "tools", *_SYSTEM)),
    "messages":    Format(("messages",),             _messages,    ("tools", "documents", *_SYSTEM)),
    "sharegpt":    Format(("conversations",),        _sharegpt,    ("tools", "documents", *_SYSTEM)),
    "completion":  Format(("prompt", "completion"),  _completion,  ("tools", "documents")),
    "tokens":      Format(("input_ids", "labels"),   _tokens,      (*_PADDING, *_TOKEN_MASKS)),
}
# fmt: on
