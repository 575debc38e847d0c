"""Tokenizing prompts and (prompt, continuation) pairs: `encode_prompt`, `encode_pair`."""

import numbers
from collections.abc import Mapping, Sequence

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import check_token_ids
from dsmoe_jax.text.tokenizer import Tokenizer

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Prompt = str | Sequence[int] | Sequence[Message]


def is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Return whether this is one prompt: text, token ids or a chat; False for a non-empty list of prompts."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes | Mapping) or not hasattr(prompts, "__getitem__") or not len(prompts):
        kinds = "text, token ids, a chat, or a non-empty list of these"
        raise DSMoEError(f"prompts must be {kinds}, got {' '.join(repr(prompts).split()):.80}")
    first = prompts[0]
    return isinstance(first, Mapping | numbers.Number) or getattr(first, "ndim", None) == 0


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, split_special_tokens: bool | None = None
) -> list[int]:
    """Return the token ids of a prompt; `Generator.encode` documents the errors."""
    if not len(prompt):
        raise DSMoEError("the prompt is empty")
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        tokenizer = _required(tokenizer, "a text prompt")
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt, split_special_tokens=split_special_tokens)
        else:
            options = {"add_generation_prompt": True, "split_special_tokens": split_special_tokens}
            ids = tokenizer.apply_chat_template(prompt, **options)  # type: ignore[arg-type]
            _check_roles(prompt)  # type: ignore[arg-type]
        if not ids:
            raise DSMoEError("the prompt has no tokens")
        if (highest := max(ids)) >= vocab_size:  # the tokenizer of another model
            raise DSMoEError(f"token id {highest} is outside the vocabulary of {vocab_size}")
        return ids
    try:
        array = np.asarray(prompt)[None]
    except ValueError:  # ragged
        raise DSMoEError("a prompt of token ids must be a flat list of integers") from None
    return check_token_ids(array, vocab_size)[0].tolist()


def encode_pair(
    prompt: Prompt, continuation: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int, prefix: int | None
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and a continuation, as `Generator.score`; `prefix` replaces an empty prompt."""
    if not isinstance(continuation, str):
        context = encode_prompt(prompt, tokenizer, vocab_size) if len(prompt) else _empty_context(prefix)
        return context, list(continuation)
    tokenizer = _required(tokenizer, "a text continuation")
    if isinstance(prompt, str) and (context := prompt.rstrip()):
        before = encode_prompt(context, tokenizer, vocab_size)
        return before, encode_prompt(prompt + continuation, tokenizer, vocab_size)[len(before) :]
    if len(prompt) and not isinstance(prompt, str):
        before = encode_prompt(prompt, tokenizer, vocab_size)
        return before, tokenizer.encode(continuation, add_special_tokens=False)
    blank = prompt if isinstance(prompt, str) else ""
    before = _empty_context(prefix)
    after = tokenizer.encode(blank + continuation, add_special_tokens=False)
    return before, after[1:] if len(after) > 1 and after[:1] == before else after  # the text starts with BOS itself


def _empty_context(prefix: int | None) -> list[int]:
    if prefix is None:
        raise DSMoEError("an empty prompt needs a BOS or EOS token, and this model has neither")
    return [prefix]


def _required(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise DSMoEError(f"{what} needs a tokenizer, and this generator has none: pass token ids")
    return tokenizer


def _check_roles(messages: Sequence[Message]) -> None:
    """Raise `DSMoEError` unless user and assistant alternate after an optional system message, the user last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    for index, role in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            position = index + len(roles) - len(turns)
            raise DSMoEError(f"message {position} of the chat must have role {expected!r}, got {role!r}")
    if not turns or turns[-1] != "user":
        raise DSMoEError(f"the last message of a chat must have role 'user', got {roles[-1]!r}")
