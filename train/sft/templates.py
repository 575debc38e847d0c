"""What a line says as tokens, and which of them are targets. Start at `example_of`; `TEMPLATES` is the table.

A template turns a conversation into pieces, each learned or not. It raises a `ValueError`, worded to follow the name of
the line, for a conversation that it cannot write.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer

from .all_read import check_all_read
from .formats import Completion, Conversation, Line, Tokens

TARGETS: Final = ("all", "last")
# The prompt of DeepSeek-MoE's finetune.py. Its <|EOT|> is no token of DeepSeekMoE's tokenizer but five of text, and no
# eos follows: `ending.py` makes a stop string of it.
_INSTRUCT: Final = """\
You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, security and privacy \
issues, you will refuse to answer.
### Instruction:
{}
### Response:
"""
_INSTRUCT_ANSWER: Final = "{}\n<|EOT|>"


class Example(NamedTuple):
    """What the model reads."""

    tokens: np.ndarray  # int32 [tokens]
    is_target: np.ndarray  # bool [tokens]: whether the token before has this one as its label


class Piece(NamedTuple):
    """Some tokens that follow one another."""

    ids: Sequence[int]
    learned: bool


Messages = Sequence[dict[str, Any]]
Template = Callable[..., list[Piece]]  # of messages, tokenizer, and as keywords what a template of Jinja sees beside


def open_template(name: str | Path) -> Template:
    """The template of that name in `TEMPLATES`, else of that file (Jinja, as a tokenizer's chat template)."""
    if known := TEMPLATES.get(str(name)):
        return known
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DSMoEError(f"template {str(name)!r} is not one of {', '.join(TEMPLATES)}, nor a file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DSMoEError(f"template {name} cannot be read: {error}") from None
    return functools.partial(_of_file, text)


def template_hash(name: str | Path) -> str:
    """A template's identity: its name in `TEMPLATES`, or the SHA-256 of its file; `ValueError` as `open_template`."""
    open_template(name)
    return str(name) if str(name) in TEMPLATES else hashlib.sha256(Path(name).read_bytes()).hexdigest()


def example_of(line: Line, tokenizer: Tokenizer, template: Template, targets: str = "all") -> Example:
    """The line's tokens, and which are targets: of every learned piece, or only of the last one.

    Turns after the last learned piece are not there: nothing could be learned from them. Raises `ValueError` where
    no token is a target. The first token never is one, as nothing stands before it.
    """
    match line:
        case Conversation():
            try:
                pieces = template(line.messages, tokenizer, **line.variables)
            except ValueError as error:
                names = [name for message in line.messages for name in message if name not in ("role", "content")]
                if not names or repr(names[0]) in str(error):
                    raise
                raise DSMoEError(f"has {names[0]!r}: {error}") from None  # why it failed, most likely
            if line.learned:
                marks = iter(line.learned)
                pieces = [Piece(piece.ids, piece.learned and next(marks)) for piece in pieces]
        case Completion():
            pieces = _completed(line, tokenizer)
        case Tokens():
            pieces = _given(line, tokenizer)
    last = max((number for number, piece in enumerate(pieces) if piece.learned), default=-1)
    pieces = pieces[: last + 1]
    tokens = np.array([token for piece in pieces for token in piece.ids], np.int32)
    learned = [piece.learned and (targets == "all" or number == last) for number, piece in enumerate(pieces)]
    is_target = np.repeat(np.array(learned, bool), [len(piece.ids) for piece in pieces])
    is_target[:1] = False
    if not is_target.any():
        raise DSMoEError("has nothing to learn: no token of it is a target")
    return Example(tokens, is_target)


def _chat(messages: Messages, tokenizer: Tokenizer, **variables: Any) -> list[Piece]:
    render = functools.partial(tokenizer.render_chat, split_special_tokens=tokenizer.split_special_tokens)
    return _turn_by_turn(render, messages, tokenizer, variables)


def _of_file(text: str, messages: Messages, tokenizer: Tokenizer, **variables: Any) -> list[Piece]:
    split = tokenizer.split_special_tokens
    render = functools.partial(tokenizer.render_template, text, split_special_tokens=split)
    return _turn_by_turn(render, messages, tokenizer, variables)


def _turn_by_turn(
    render: Callable[..., str], messages: Messages, tokenizer: Tokenizer, variables: dict[str, Any]
) -> list[Piece]:
    """Each turn of the assistant is encoded by itself, from where a model begins to answer to what ends the turn."""
    pieces, written, last = [], "", 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for some, learned in ((messages[:number], False), (messages[: number + 1], True)):
            text = render(some, add_generation_prompt=not learned, **variables)
            if not text.startswith(written):
                raise DSMoEError(
                    f"cannot be cut at turn {number}: the template writes what is before it otherwise once it is there"
                )
            pieces.append(Piece(tokenizer.encode(text[len(written) :], add_special_tokens=False), learned))
            written = text
        last = number
    if pieces:
        check_all_read(render, messages[: last + 1], variables, written)
    return pieces


def _deepseek_instruct(messages: Messages, tokenizer: Tokenizer, **variables: Any) -> list[Piece]:
    """As the original: the whole is tokenized at once, and as many tokens as the prompt alone has are not learned."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise DSMoEError("is not one turn of the user and one of the assistant, all that deepseek-instruct knows")
    if more := [*variables, *(name for message in messages for name in message if name not in ("role", "content"))]:
        raise DSMoEError(f"has {more[0]!r}, which deepseek-instruct ignores")
    asked, answer = (message["content"] for message in messages)
    prompt, completion = _INSTRUCT.format(asked.strip()), _INSTRUCT_ANSWER.format(answer)
    if tokenizer.split_special_tokens:
        prompt = tokenizer.protect(_INSTRUCT.format(tokenizer.escape(asked.strip())))
        completion = tokenizer.protect(_INSTRUCT_ANSWER.format(tokenizer.escape(answer)))
    ids = _with_bos(prompt + completion, tokenizer)
    size = len(_with_bos(prompt, tokenizer))
    return [Piece(ids[:size], False), Piece(ids[size:], True)]


def _completed(line: Completion, tokenizer: Tokenizer) -> list[Piece]:
    answer = tokenizer.encode(line.completion, add_special_tokens=False)
    if answer[-1:] != [tokenizer.eos_token_id]:
        answer.append(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]: the writer wants one
    return [Piece(_with_bos(line.prompt, tokenizer), False), Piece(answer, True)]


def _given(line: Tokens, tokenizer: Tokenizer) -> list[Piece]:
    if strange := [token for token in line.ids if not 0 <= token < tokenizer.vocab_size]:
        raise DSMoEError(f"has token id {strange[0]}; the tokenizer's are below {tokenizer.vocab_size}")
    runs = groupby(zip(line.ids, line.is_target, strict=True), key=lambda pair: pair[1])
    return [Piece([token for token, _ in run], learned) for learned, run in runs]


def _with_bos(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text as a prompt: with BOS if the tokenizer adds one, without the EOS that it may add, too."""
    bos = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    return bos + tokenizer.encode(text, add_special_tokens=False)


TEMPLATES: Final[dict[str, Template]] = {
    "chat": _chat,
    "deepseek-instruct": _deepseek_instruct,
}
