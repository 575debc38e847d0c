"""Formats of fine-tuning records (`FORMATS`, at the end). Error messages follow the record's location."""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.chat_template import ROLES

AUTO: Final = "auto"
_IGNORED: Final = -100  # label without loss, as in Hugging Face
_OPENAI: Final = ("role", "content", {role: role for role in (*ROLES, "tool")})
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
# Fields of a turn that select whether it is in the loss.
_LOSS_FIELDS: Final = ("weight", "train", "training", "trainable", "learn", "loss", "loss_mask")
# fmt: off
# Metadata of a turn.
_TURN_METADATA: Final = frozenset((
    "id", "uuid", "turn_id", "message_id", "parent_id", "index", "timestamp", "created_at", "date",
    "source", "lang", "language", "model", "score", "rating",
))
# Model input, normalized by `_plain`: an error if the format does not read the field.
_MODEL_INPUT: Final = frozenset((
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
# Fields of a record that select the loss: an error if the format does otherwise.
_LOSS_ON: Final = re.compile(r"(.*_)?(mask|weight)s?|train(ing|able)?|learn|loss|mask_prompt")
_LOSS_OFF: Final = re.compile(r"train_on_(input|prompt)s?|mask_history")
_SYSTEM: Final = ("system", "system_prompt")
# fmt: on


Fields = Mapping[str, Any]
Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages rendered by a template; assistant turns have a loss."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    turn_mask: tuple[bool, ...] = ()  # whether each assistant turn has a loss; empty: all

    @property
    def variables(self) -> dict[str, Any]:
        """Further variables of the template."""
        return {name: value for name in ("tools", "documents") if (value := getattr(self, name))}


class Completion(NamedTuple):
    """A prompt and its completion, which has a loss, without a template."""

    prompt: str
    completion: str


class Tokens(NamedTuple):
    """Token ids and their loss mask."""

    ids: list[int]
    loss_mask: list[bool]


Record = Conversation | Completion | Tokens


class Format(NamedTuple):
    """The fields that identify a format, its parser, and its optional fields."""

    fields: tuple[str, ...]
    parse: Callable[[Fields], Record]
    optional: tuple[str, ...] = ()


def parse_record(fields: Fields, format: str = AUTO) -> Record:
    """Parse a record; raise `DSMoEError` if it is malformed or has model input that its format does not read."""
    for field, value in fields.items():
        if (why := _UNSUPPORTED.get(_plain(field))) and not _is_blank(value):
            raise DSMoEError(f"has {field!r}: {why}")
    name = _format_of(fields, format)
    entry = FORMATS[name]
    # With a named format, fields of the others are ignored.
    skipped = () if format == AUTO else [field for other in FORMATS.values() for field in other.fields]
    known = (*entry.fields, *entry.optional, *skipped)
    others = {field: value for field, value in fields.items() if field not in known}
    for field, value in others.items():
        if (required := _required(field, value)) is None:
            continue
        if any(one != required for one in (value if isinstance(value, list) else [value])):
            raise DSMoEError(f"has {field} {value!r:.80}; only {required:d} is supported")
    if isinstance(fields.get("label"), bool):
        raise DSMoEError("has a bool as 'label': preference data is not supported")
    record = entry.parse(fields)
    texts = {text.strip() for text in texts_of(record)}
    for field, value in others.items():
        repeated = isinstance(value, str) and value.strip() in texts  # e.g. the first question again
        if _plain(field) in _MODEL_INPUT and not _is_blank(value) and not repeated:
            raise DSMoEError(f"has {field!r}, which the format {name} does not read")
    return record


def _plain(field: str) -> str:
    """Normalize the spelling of a field: system_prompt, systemPrompt, System-Prompt."""
    return re.sub(r"[^a-z0-9]", "", field.lower())


def _required(field: str, value: Any) -> bool | None:
    """Return the required value of a field that selects the loss; None for others."""
    if value is None or field == "special_tokens_mask" or (field == "loss" and isinstance(value, float)):
        return None
    return True if _LOSS_ON.fullmatch(field) else False if _LOSS_OFF.fullmatch(field) else None


def _format_of(fields: Fields, format: str) -> str:
    """Return the name of the record's format."""
    # Parquet rows have every column, None if missing.
    present = {name for name, value in fields.items() if value is not None}
    if format != AUTO:
        if missing := [name for name in FORMATS[format].fields if name not in present]:
            raise DSMoEError(f"has no field {missing[0]!r}")
        return format
    found = [name for name, entry in FORMATS.items() if present.issuperset(entry.fields)]
    if not found:
        known = ", ".join(" and ".join(entry.fields) for entry in FORMATS.values())
        raise DSMoEError(f"has none of the fields {known}")
    if len(found) > 1:
        raise DSMoEError(f"matches the formats {' and '.join(found)}; set format")
    return found[0]


def ignored_fields(fields: Fields, format: str = AUTO) -> set[str]:
    """Return the names of the fields that `parse_record` neither reads nor refuses."""
    entry = FORMATS[_format_of(fields, format)]
    known = (*entry.fields, *entry.optional)
    filled = {name: value for name, value in fields.items() if name not in known and not _is_blank(value)}
    ignored = {name for name, value in filled.items() if _required(name, value) is None}
    for field in ("messages", "conversations"):
        for turn in fields[field] if isinstance(fields.get(field), list) else ():
            if isinstance(turn, Mapping):
                ignored |= {f"{field}[].{name}" for name in turn if name in _TURN_METADATA and turn[name] is not None}
    return ignored


def _is_blank(value: Any) -> bool:
    """Return whether a value is null, blank or an empty list or object."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def texts_of(record: Record) -> list[str]:
    """Return all strings in a record."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return [text for one in inner for text in strings(one)]

    return [] if isinstance(record, Tokens) else strings(tuple(record))


def _instruction(fields: Fields) -> Conversation:
    # Alpaca's `input` follows the instruction after a blank line.
    context = _text(fields, "input") if fields.get("input") is not None else ""
    prompt = [text for text in (_text(fields, "instruction"), context) if text.strip()]
    output = _filled(fields, "output")
    turns = [message for pair in _history(fields) for message in pair]
    turns += [_message("user", "\n\n".join(prompt)), _message("assistant", output)]
    return Conversation(_with_system(fields, turns), _objects(fields, "tools"))


def _history(fields: Fields) -> list[tuple[Message, Message]]:
    """Return earlier rounds, [[prompt, response], …] as in LLaMA-Factory."""
    history = fields.get("history")
    if _is_blank(history):
        return []
    pairs: Any = history if isinstance(history, list) else [None]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise DSMoEError("must have a list of pairs of strings as 'history'")
    return [(_message("user", prompt), _message("assistant", response)) for prompt, response in pairs]


def _completion(fields: Fields) -> Record:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # messages, as in TRL
        before, after = (_turns(fields, name) for name in ("prompt", "completion"))
        turns = [*((message, False) for message, _ in before), *after]
        return _with_mask(turns, [message for message, _ in turns], fields)
    for name in ("tools", "documents"):
        if not _is_blank(fields.get(name)):
            raise DSMoEError(f"has {name!r}, which the format completion does not read for strings")
    return Completion(_text(fields, "prompt"), _filled(fields, "completion"))


def _tokens(fields: Fields) -> Tokens:
    ids, labels = fields["input_ids"], fields["labels"]
    for name, numbers in (("input_ids", ids), ("labels", labels)):
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise DSMoEError(f"must have a list of integers as {name!r}")
    if len(ids) != len(labels):
        raise DSMoEError(f"has {len(ids)} input_ids and {len(labels)} labels")
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (_IGNORED, token):
            raise DSMoEError(f"has label {label} at token {at}; it must be {token} or {_IGNORED}")
    loss_mask = [label != _IGNORED for label in labels]
    for name in _TOKEN_MASKS:
        if (mask := _mask(fields, name, len(ids))) is not None:
            loss_mask = [has_loss and one == 1 for has_loss, one in zip(loss_mask, mask, strict=True)]
    if any(kind != fields["token_type_ids"][0] for kind in _mask(fields, "token_type_ids", len(ids)) or ()):
        raise DSMoEError("has several token_type_ids; the model has one")
    valid = _valid(fields, ids, loss_mask)
    positions = fields.get("position_ids")
    if positions is not None:
        if not isinstance(positions, list) or len(positions) != len(ids):
            raise DSMoEError(f"must have {len(ids)} integers as 'position_ids'")
        if any(b - a != 1 for a, b in itertools.pairwise(positions[valid])):
            raise DSMoEError("has position_ids that do not increase by 1: a record must be one example")
    return Tokens(ids[valid], loss_mask[valid])


def _mask(fields: Fields, name: str, length: int) -> list[int] | None:
    """Return a mask of zeros and ones, one per token; None if missing."""
    if (mask := fields.get(name)) is None:
        return None
    if not isinstance(mask, list) or len(mask) != length or any(one not in (0, 1) for one in mask):
        raise DSMoEError(f"must have {length} zeros and ones as {name!r}")
    return mask


def _valid(fields: Fields, ids: list[int], loss_mask: list[bool]) -> slice:
    """Return the slice of tokens that `attention_mask` does not mark as padding."""
    mask = _mask(fields, "attention_mask", len(ids)) or [1] * len(ids)
    if 1 not in mask:
        raise DSMoEError("has no 1 in its attention_mask")
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:last]:
        raise DSMoEError(f"has a 0 within its attention_mask at token {mask.index(0, first)}")
    if any(loss_mask[:first] + loss_mask[last:]):
        raise DSMoEError("has labels where its attention_mask is 0")
    return slice(first, last)


def _conversation(field: str, fields: Fields) -> Conversation:
    turns = _turns(fields, field)
    if all(message["role"] != "assistant" for message, _ in turns):
        raise DSMoEError(f"has no assistant turn in {field!r}")
    return _with_mask(turns, _with_system(fields, [message for message, _ in turns]), fields)


def _with_mask(turns: list[tuple[Message, bool]], messages: list[Message], fields: Fields) -> Conversation:
    """Return the messages as a conversation, with the loss of each assistant turn."""
    mask = tuple(has_loss for message, has_loss in turns if message["role"] == "assistant")
    return Conversation(messages, _objects(fields, "tools"), _objects(fields, "documents"), () if all(mask) else mask)


def _turns(fields: Fields, field: str) -> list[tuple[Message, bool]]:
    """Return each message, and whether it may have a loss."""
    if not isinstance(turns := fields[field], list):
        raise DSMoEError(f"must have a list as {field!r}, got {type(turns).__name__}")
    return [_turn(number, turn, field) for number, turn in enumerate(turns)]


def _turn(number: int, turn: Any, field: str) -> tuple[Message, bool]:
    """Return the message without metadata, and whether it has a loss."""
    role_key, content_key, roles = ("from", "value", _SHAREGPT) if field == "conversations" else _OPENAI
    where = f"turn {number} of {field!r}"
    extra = {} if not isinstance(turn, Mapping) else {k: v for k, v in turn.items() if not _is_blank(v)}
    calls = "tool_calls" in extra or "function_call" in extra
    if not isinstance(turn, Mapping) or role_key not in turn or (content_key not in turn and not calls):
        raise DSMoEError(f"must have {role_key!r} and {content_key!r} in {where}")
    if (role := roles.get(str(turn[role_key]))) is None:
        raise DSMoEError(f"must have turns from {', '.join(roles)}, got {turn[role_key]!r:.80} in turn {number}")
    has_loss = True
    for name in _LOSS_FIELDS:
        if (mark := turn.get(name)) is None:
            continue
        if mark not in (0, 1):
            raise DSMoEError(f"has {name} {mark!r:.80} in {where}; it must be true, false, 1 or 0")
        if mark and role != "assistant":
            sender = f"which is from {turn[role_key]!r}; only assistant turns have a loss"
            raise DSMoEError(f"has {name} {mark!r} in {where}, {sender}")
        has_loss = has_loss and bool(mark)
    known = (role_key, content_key, *_LOSS_FIELDS, *_TURN_METADATA)
    extra = {name: value for name, value in extra.items() if name not in known}
    if clash := [name for name in ("role", "content") if name in extra]:
        raise DSMoEError(f"has both {clash[0]!r} and {content_key!r} in {where}")
    if turn[role_key] == "function_call":
        message = {"role": role, "content": None, "tool_calls": _calls(turn[content_key], where)}
    elif calls and turn.get(content_key) is None:
        message = {"role": role, "content": None}
    else:
        content = turn[content_key] if not isinstance(turn[content_key], list) else _joined(turn[content_key], where)
        filled = role == "assistant" and has_loss and not calls
        message = _message(role, (_filled if filled else _text)({content_key: content}, content_key))
    return message | extra, has_loss


def _joined(parts: list[Any], where: str) -> str:
    """Join the text of a list of text parts."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise DSMoEError(f"has a part of type {kind!r:.80} in {where}; only text is supported")
        if more := [name for name, value in part.items() if name not in ("type", "text") and not _is_blank(value)]:
            raise DSMoEError(f"has {more[0]!r} in a part of {where}; only text is supported")
    return "".join(part["text"] for part in parts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Parse ShareGPT's JSON of one or more function calls."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or any(not isinstance(call, dict) or {*call} != {"name", "arguments"} for call in calls):
        raise DSMoEError(f"must have JSON with name and arguments in {where}, a function_call")
    return [{"type": "function", "function": call} for call in calls]


def _with_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """Prepend the record's system message, if it has one."""
    names = [name for name in _SYSTEM if not _is_blank(fields.get(name))]
    texts = {_text(fields, name) for name in names}
    in_messages = {message["content"] for message in messages if message["role"] == "system"}
    if len(texts | in_messages) > 1 and texts:
        raise DSMoEError(f"has two system messages, one of them as {names[0]!r}")
    return messages if in_messages or not texts else [_message("system", texts.pop()), *messages]


def _objects(fields: Fields, name: str) -> list[dict[str, Any]] | None:
    """Return a list of objects, which may be a JSON string."""
    if _is_blank(value := fields.get(name)):
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DSMoEError(f"must have a list of objects as {name!r}")
    return found or None


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _text(fields: Fields, name: str) -> str:
    if not isinstance(text := fields[name], str):
        raise DSMoEError(f"must have a string as {name!r}, got {type(text).__name__}")
    return text


def _filled(fields: Fields, name: str) -> str:
    if not (text := _text(fields, name)).strip():
        raise DSMoEError(f"has an empty {name!r}")
    return text


_TOKEN_MASKS: Final = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")  # 1 where there is a loss
_PADDING: Final = ("attention_mask", "position_ids", "token_type_ids")
_messages, _sharegpt = partial(_conversation, "messages"), partial(_conversation, "conversations")
# fmt: off
FORMATS: Final[dict[str, Format]] = {
    "instruction": Format(("instruction", "output"), _instruction, ("input", "history", "tools", *_SYSTEM)),
    "messages":    Format(("messages",),             _messages,    ("tools", "documents", *_SYSTEM)),
    "sharegpt":    Format(("conversations",),        _sharegpt,    ("tools", "documents", *_SYSTEM)),
    "completion":  Format(("prompt", "completion"),  _completion,  ("tools", "documents")),
    "tokens":      Format(("input_ids", "labels"),   _tokens,      (*_PADDING, *_TOKEN_MASKS)),
}
# fmt: on
