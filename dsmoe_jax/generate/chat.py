"""`Chat`: a conversation with a chat model, turn by turn."""

from collections.abc import Iterator
from typing import Any

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.answer import Prefix
from dsmoe_jax.generate.generator import Generator, Stream


class Chat:
    """Keeps the history and streams the answers.

    Every turn reads the history as the chat template renders it now, encoded afresh. Its tokens are compared with those
    in the key-value cache, and only what comes after their longest common prefix is computed.

    Attributes:
      messages: The history, a dict with role and content for each message; the answers as they were streamed.
      tokens: The newest answer as generated.
    """

    def __init__(self, generator: Generator, *, system: str | None = None, **params: Any):
        """`system` is a message before all others; `params` are those of `SamplingParams`, for every turn."""
        self.generator, self.params = generator, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = [*self._system]
        self.tokens: list[int] = []
        self._prefix: Prefix | None = None  # the tokens of the last turn, prompt and answer, with their keys and values

    def reset(self) -> None:
        """Forget the conversation, but not the system's message."""
        self.messages, self.tokens = [*self._system], []
        self._prefix = None

    def send(self, text: str) -> Iterator[str]:
        """Say something and stream the answer.

        Both enter the history once the answer is complete, or as far as it came when the iterator is closed early.
        Raises `ValueError` as `Generator.stream` does; the history is then as before.
        """
        tokenizer = self.generator.tokenizer
        if tokenizer is None:
            raise DSMoEError("a chat needs a tokenizer, and this generator has none")
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
        stream = self.generator.start(ids, prefix=self._prefix, keep=True, **self.params)
        return self._answer(asked, stream)

    def _answer(self, asked: list[dict[str, str]], stream: Stream) -> Iterator[str]:
        answer = ""
        try:
            for piece in Generator.pieces(stream):
                # The template writes "Assistant:", and the model answers " Hello": the blank is not the answer's.
                piece = piece if answer else piece.lstrip()
                answer += piece
                if piece:
                    yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self.tokens = stream.answer.tokens
            self._prefix = stream.answer.prefix or self._prefix  # None where the answer was cancelled before its start
