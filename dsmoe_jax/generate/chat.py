"""`Chat`: a conversation with a chat model, turn by turn."""

from collections.abc import Iterator
from typing import Any

from dsmoe_jax.generate.engine import Prefix
from dsmoe_jax.generate.generator import Generator, Stream


class Chat:
    """Keeps the history and streams the answers; what was said before is not read again."""

    def __init__(self, generator: Generator, *, system: str | None = None, **params: Any):
        """`system` is a message before all others; `params` are those of `SamplingParams`, for every turn."""
        self.generator, self.params = generator, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = [*self._system]
        self.tokens: list[int] = []  # of the newest answer, as generated
        self._read = ""  # the text of the conversation up to the end of the last answer, as the model had it
        self._prefix: Prefix | None = None  # its tokens, with their keys and values

    def reset(self) -> None:
        """Forget the conversation, but not the system's message."""
        self.messages, self.tokens = [*self._system], []
        self._read, self._prefix = "", None

    def send(self, text: str) -> Iterator[str]:
        """Say something and stream the answer.

        Both enter the history once the answer is complete, or as far as it came when the iterator is closed early.
        Raises `ValueError` as `Generator.stream` does; the history is then as before.
        """
        tokenizer = self.generator.tokenizer
        if tokenizer is None:
            raise ValueError("a chat needs a tokenizer, and this generator has none")
        asked = [*self.messages, {"role": "user", "content": text}]
        written = tokenizer.render_chat(asked, add_generation_prompt=True)
        ids = tokenizer.encode(written, add_special_tokens=False)
        if self._prefix is not None and written.startswith(self._read):
            # The answer's tokens as the model chose them: encoding its text might give others.
            ids = [*self._prefix.ids, *tokenizer.encode(written[len(self._read) :], add_special_tokens=False)]
        stream = self.generator.start(ids, prefix=self._prefix, keep=True, **self.params)
        return self._answer(asked, written, stream)

    def _answer(self, asked: list[dict[str, str]], written: str, stream: Stream) -> Iterator[str]:
        answer = ""
        try:
            for piece in Generator.pieces(stream):
                # The template writes "Assistant:", and the model answers " Hello": the blank is not the answer's.
                piece = piece if answer else piece.lstrip()
                answer += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self.tokens = stream.answer.tokens
            self._prefix, tokenizer = stream.answer.prefix, self.generator.tokenizer
            if self._prefix is not None and tokenizer is not None:
                self._read = written + tokenizer.decode(stream.answer.tokens, skip_special_tokens=False)
