"""Tokenize requests of the harness exactly as its `hf` model does: `Encoder`.

The rules are those of `TemplateLM._encode_pair` and `HFLM.tok_encode` of lm-evaluation-harness 0.4.13; here equal texts
are encoded once, and all in parallel threads.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Token ids of a context and its continuation; `truncated` if the context lost its first tokens."""

    context: list[int]
    continuation: list[int]
    truncated: bool = False


class Encoder:
    """Encodes texts, and pairs of context and continuation.

    Attributes:
        prefix_token_id: Stands in for an empty context; None if the model has neither BOS nor EOS.
        max_length: Tokens that the model reads at most.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_token_id: int | None, max_length: int):
        self._tokenizer, self.prefix_token_id, self.max_length = tokenizer, prefix_token_id, max_length
        self._prefix = "" if prefix_token_id is None else tokenizer.decode([prefix_token_id], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return token ids; None adds BOS as configured, unless the text starts with it."""
        return self.encode_all([text], add_special_tokens)[text]

    def encode_all(self, texts: Iterable[str], add_special_tokens: bool | None = None) -> dict[str, list[int]]:
        """Return the token ids of each distinct text."""
        found: dict[str, list[int]] = {}
        distinct = dict.fromkeys(texts)
        for special in (True, False):
            chosen = [text for text in distinct if self._adds_special(text, add_special_tokens) is special]
            encoded = self._tokenizer.encode_batch(chosen, add_special_tokens=special) if chosen else []
            found |= dict(zip(chosen, encoded, strict=True))
        return found

    def pairs(self, texts: Sequence[tuple[str, str]], names: Sequence[str] = ()) -> list[Pair]:
        """Encode (context, continuation); spaces that end a context belong to the continuation.

        Args:
            texts: Contexts and continuations.
            names: Of each, for messages; default: the continuation.

        Returns:
            Their token ids.

        Raises:
            DSMoEError: A continuation has no tokens, or more than fit into the window.
        """
        moved = [_move_spaces(context, continuation) for context, continuation in texts]
        contexts = self.encode_all(context for context, _ in moved if context)
        wholes = self.encode_all(context + continuation for context, continuation in moved if context)
        bare = self.encode_all((continuation for context, continuation in moved if not context), False)
        encoded: list[tuple[list[int], list[int]]] = []
        for context, continuation in moved:
            if context:
                before = contexts[context]
                encoded.append((before, wholes[context + continuation][len(before) :]))
            else:
                encoded.append(self._without_context(bare[continuation]))
        shown = [f"the continuation {continuation!r:.80}" for _, continuation in texts]
        shown = [f"{name}: {one}" if name else one for name, one in zip(names or [""] * len(shown), shown, strict=True)]
        return [self.truncate(*pair, name) for pair, name in zip(encoded, shown, strict=True)]

    def truncate(self, context: list[int], continuation: list[int], what: str = "the continuation") -> Pair:
        """Drop the first tokens of a context that is too long; the last token of a continuation is not read."""
        if not continuation:
            raise DSMoEError(f"{what} has no tokens of its own after its context")
        if len(continuation) > self.max_length:
            size = f"has {len(continuation)} tokens"
            raise DSMoEError(f"{what} {size}: at most max_length, {self.max_length}, can be scored")
        kept = self.max_length + 1 - len(continuation)
        return Pair(context[-kept:], continuation, len(context) > kept)

    def prompt(self, text: str, max_new_tokens: int) -> Pair:
        """Encode the context of a completion, leaving room for new tokens; the continuation is empty."""
        kept = self.max_length - max_new_tokens
        if kept < 1:
            raise DSMoEError(f"max_gen_toks must be less than max_length, {self.max_length}, got {max_new_tokens}")
        ids = self.encode(text) or [self.required_prefix()]
        return Pair(ids[-kept:], [], len(ids) > kept)

    def required_prefix(self) -> int:
        """Return `prefix_token_id`, or raise `DSMoEError`."""
        if self.prefix_token_id is None:
            raise DSMoEError("an empty context needs a BOS or EOS token, and this model has neither")
        return self.prefix_token_id

    def _adds_special(self, text: str, add_special_tokens: bool | None) -> bool:
        if add_special_tokens is not None:
            return add_special_tokens
        return not (self._prefix and text.startswith(self._prefix))

    def _without_context(self, ids: list[int]) -> tuple[list[int], list[int]]:
        prefix = self.required_prefix()
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation
