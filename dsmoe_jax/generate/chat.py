"""`Chat`: a conversation with a chat model."""

import logging
from collections.abc import Iterator
from typing import Any

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.generator import Generator
from dsmoe_jax.generate.request import Output
from dsmoe_jax.generate.sampling_params import SamplingParams, merge_fields
from dsmoe_jax.text.generation_config import GENERATION_CONFIG
from dsmoe_jax.text.tokenizer import Tokenizer

_log = logging.getLogger("dsmoe_jax")


class Chat:
    """A conversation: keeps the history, streams the replies and reuses the KV cache.

    Every turn encodes the whole history; only the tokens after the longest cached prefix are prefilled.

    Attributes:
        messages: The history, as dicts with role and content.
        token_ids: The last reply as generated.
    """

    def __init__(self, generator: Generator, *, system: str | None = None, **params: Any):
        """Start a conversation.

        Args:
            generator: A generator whose tokenizer has a chat template.
            system: System message.
            **params: `SamplingParams` of every turn, by field; default: the generator's `sampling_defaults`.

        Raises:
            DSMoEError: There is no tokenizer or chat template, or a parameter is out of range.
        """
        self._tokenizer = _chat_tokenizer(generator)
        self.generator, self.params = generator, merge_fields(generator.sampling_defaults, params)
        if (n := SamplingParams(**self.params).n) != 1:
            raise DSMoEError(f"n must be 1 for a chat, got {n}")
        if used := [f"{name} {value}" for name, value in self.params.items() if name not in params]:
            _log.info("Sampling defaults from %s: %s", GENERATION_CONFIG, ", ".join(used))
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Clear the history, except for the system message."""
        self.messages: list[dict[str, str]] = [*self._system]
        self.token_ids: list[int] = []

    def send(self, text: str) -> Iterator[str]:
        """Send a user message and stream the reply; both join the history once the iterator is exhausted or closed.

        Raises:
            DSMoEError: As `Generator.stream`; the history is unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        token_ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        engine, output = self.generator.start(token_ids, retain_prefix=True, **self.params)
        return self._reply(messages, engine, output)

    def _reply(self, messages: list[dict[str, str]], engine: Engine, output: Output) -> Iterator[str]:
        reply = ""
        try:
            for piece in Generator.pieces(engine, output):
                # The template ends with "Assistant:" and the model continues " Hello".
                piece = piece if reply else piece.lstrip()
                reply += piece
                if piece:
                    yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": reply}]
            self.token_ids = output.token_ids


def _chat_tokenizer(generator: Generator) -> Tokenizer:
    tokenizer = generator.tokenizer
    if tokenizer is None or "default" not in tokenizer.chat_templates:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise DSMoEError(f"a chat needs a {missing}, and this generator has none; `dsmoe generate` completes prompts")
    return tokenizer
