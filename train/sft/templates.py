"""Chat templates and tokenization of records. Start at `tokenize_record` and `TEMPLATES`."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer

from .examples import Example
from .formats import Completion, Conversation, Record, Tokens
from .template_coverage import check_template_coverage

TRAIN_ON: Final = ("all", "last")
# The prompt of DeepSeek-MoE's finetune.py. No EOS follows <|EOT|>, five tokens of text in DeepSeekMoE's tokenizer:
# `stop_config.py` adds it to the stop strings.
_INSTRUCT: Final = """\
You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, security and privacy \
issues, you will refuse to answer.
### Instruction:
{}
### Response:
"""
_INSTRUCT_COMPLETION: Final = "{}\n<|EOT|>"


class Piece(NamedTuple):
    """Consecutive tokens, all with or all without loss."""

    ids: Sequence[int]
    has_loss: bool


Messages = Sequence[dict[str, Any]]
Template = Callable[..., list[Piece]]  # of (messages, tokenizer, **Jinja variables)


def open_template(name: str | Path) -> Template:
    """Return a template of `TEMPLATES`, or of a Jinja file."""
    if known := TEMPLATES.get(str(name)):
        return known
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DSMoEError(f"template must be one of {', '.join(TEMPLATES)} or a file, got {str(name)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DSMoEError(f"template {name} cannot be read: {error}") from None
    return functools.partial(_jinja, text)


def template_hash(name: str | Path) -> str:
    """Return a template's name in `TEMPLATES`, or the SHA-256 of its file."""
    open_template(name)
    return str(name) if str(name) in TEMPLATES else hashlib.sha256(Path(name).read_bytes()).hexdigest()


def tokenize_record(record: Record, tokenizer: Tokenizer, template: Template, train_on: str = "all") -> Example:
    """Tokenize a record up to its last turn with loss, without a loss for the first token.

    `train_on` "all" selects every assistant turn (or run of labels), "last" the last one.
    """
    match record:
        case Conversation():
            try:
                pieces = template(record.messages, tokenizer, **record.variables)
            except ValueError as error:
                names = [name for message in record.messages for name in message if name not in ("role", "content")]
                if not names or repr(names[0]) in str(error):
                    raise
                raise DSMoEError(f"has {names[0]!r}: {error}") from None  # the likely cause
            if record.turn_mask:
                mask = iter(record.turn_mask)
                pieces = [Piece(piece.ids, piece.has_loss and next(mask)) for piece in pieces]
        case Completion():
            pieces = _completion(record, tokenizer)
        case Tokens():
            pieces = _tokens(record, tokenizer)
    last = max((number for number, piece in enumerate(pieces) if piece.has_loss), default=-1)
    pieces = pieces[: last + 1]
    tokens = np.array([token for piece in pieces for token in piece.ids], np.int32)
    has_loss = [piece.has_loss and (train_on == "all" or number == last) for number, piece in enumerate(pieces)]
    loss_mask = np.repeat(np.array(has_loss, bool), [len(piece.ids) for piece in pieces])
    loss_mask[:1] = False
    if not loss_mask.any():
        raise DSMoEError("has no token with a loss")
    return Example(tokens, loss_mask)


def _chat(messages: Messages, tokenizer: Tokenizer, **variables: Any) -> list[Piece]:
    render = functools.partial(tokenizer.render_chat, split_special_tokens=tokenizer.split_special_tokens)
    return _by_turn(render, messages, tokenizer, variables)


def _jinja(text: str, messages: Messages, tokenizer: Tokenizer, **variables: Any) -> list[Piece]:
    split = tokenizer.split_special_tokens
    render = functools.partial(tokenizer.render_template, text, split_special_tokens=split)
    return _by_turn(render, messages, tokenizer, variables)


def _by_turn(
    render: Callable[..., str], messages: Messages, tokenizer: Tokenizer, variables: dict[str, Any]
) -> list[Piece]:
    """Encode each assistant turn, from generation prompt to end, separately."""
    pieces, written, last = [], "", 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for some, has_loss in ((messages[:number], False), (messages[: number + 1], True)):
            text = render(some, add_generation_prompt=not has_loss, **variables)
            if not text.startswith(written):
                why = "the template renders earlier turns differently with it"
                raise DSMoEError(f"cannot be split at turn {number}: {why}")
            pieces.append(Piece(tokenizer.encode(text[len(written) :], add_special_tokens=False), has_loss))
            written = text
        last = number
    if pieces:
        check_template_coverage(render, messages[: last + 1], variables, written)
    return pieces


def _deepseek_instruct(messages: Messages, tokenizer: Tokenizer, **variables: Any) -> list[Piece]:
    """Tokenize as the original: prompt and completion together, masking the length of the prompt."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise DSMoEError("must be one user turn and one assistant turn for deepseek-instruct")
    if more := [*variables, *(name for message in messages for name in message if name not in ("role", "content"))]:
        raise DSMoEError(f"has {more[0]!r}, which deepseek-instruct ignores")
    instruction, output = (message["content"] for message in messages)
    prompt, completion = _INSTRUCT.format(instruction.strip()), _INSTRUCT_COMPLETION.format(output)
    if tokenizer.split_special_tokens:
        prompt = tokenizer.escape.protect(_INSTRUCT.format(tokenizer.escape(instruction.strip())))
        completion = tokenizer.escape.protect(_INSTRUCT_COMPLETION.format(tokenizer.escape(output)))
    ids = _with_bos(prompt + completion, tokenizer)
    size = len(_with_bos(prompt, tokenizer))
    return [Piece(ids[:size], False), Piece(ids[size:], True)]


def _completion(record: Completion, tokenizer: Tokenizer) -> list[Piece]:
    ids = tokenizer.encode(record.completion, add_special_tokens=False)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]: checked by the writer
    return [Piece(_with_bos(record.prompt, tokenizer), False), Piece(ids, True)]


def _tokens(record: Tokens, tokenizer: Tokenizer) -> list[Piece]:
    if invalid := [token for token in record.ids if not 0 <= token < tokenizer.vocab_size]:
        raise DSMoEError(f"has token id {invalid[0]}; ids must be in [0, {tokenizer.vocab_size})")
    runs = groupby(zip(record.ids, record.loss_mask, strict=True), key=lambda pair: pair[1])
    return [Piece([token for token, _ in run], has_loss) for has_loss, run in runs]


def _with_bos(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a prompt, with BOS if the tokenizer adds one, without EOS."""
    bos = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    return bos + tokenizer.encode(text, add_special_tokens=False)


TEMPLATES: Final[dict[str, Template]] = {"chat": _chat, "deepseek-instruct": _deepseek_instruct}
