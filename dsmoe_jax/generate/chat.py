"""`Chat`: a conversation with a chat model, turn by turn."""

from collections.abc import Iterator
from typing import Any

from dsmoe_jax.generate.generator import Generator


class Chat:
    """Keeps the history and streams the answers."""

    def __init__(self, generator: Generator, **params: Any):
        """`params` are those of `SamplingParams`, for every turn."""
        self.generator, self.params = generator, params
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def send(self, text: str) -> Iterator[str]:
        """Say something and stream the answer.

        Both enter the history once the answer is complete, or as far as it came when the iterator is closed early.
        Raises `ValueError` as `Generator.stream` does; the history is then as before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces = self.generator.stream(asked, **self.params)
        return self._answer(asked, pieces)

    def _answer(self, asked: list[dict[str, str]], pieces: Iterator[str]) -> Iterator[str]:
        answer = ""
        try:
            for piece in pieces:
                # The template writes "Assistant:", and the model answers " Hello": the blank is not the answer's.
                piece = piece if answer else piece.lstrip()
                answer += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
