"""`Chat`: a conversation with a chat model, turn by turn."""

from collections.abc import Iterator
from typing import Any

from dsmoe_jax.generate.answer import Answer, Prefix
from dsmoe_jax.generate.generator import Generator, Stream


class Chat:
    """Keeps the history and streams the answers.

    What was said before is not read again: it stands in the cache, with the tokens that the model chose for its answers
    even where encoding their text would give others.
    """

    def __init__(self, generator: Generator, *, system: str | None = None, **params: Any):
        """`system` is a message before all others; `params` are those of `SamplingParams`, for every turn."""
        self.generator, self.params = generator, params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = [*self._system]
        self.tokens: list[int] = []  # of the newest answer, as generated
        self._prefix: Prefix | None = None  # the tokens up to the end of the last answer, with their keys and values
        self._written, self._closing = "", ""  # the history as the template writes it, what of it is not yet in tokens

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
            raise ValueError("a chat needs a tokenizer, and this generator has none")
        asked = [*self.messages, {"role": "user", "content": text}]
        written = tokenizer.render_chat(asked, add_generation_prompt=True)
        ids = tokenizer.encode(written, add_special_tokens=False)
        if self._prefix is not None and written.startswith(self._written):
            rest = self._closing + written[len(self._written) :]
            ids = [*self._prefix.ids, *tokenizer.encode(rest, add_special_tokens=False)]
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
            self._keep(stream.answer, answer)

    def _keep(self, made: Answer, answer: str) -> None:
        """Remember what has been read, and how the template closes an answer."""
        tokenizer = self.generator.tokenizer
        assert tokenizer is not None
        self._prefix, self._written = made.prefix, tokenizer.render_chat(self.messages)
        _, found, self._closing = self._written.rpartition(answer) if answer else ("", "", "")
        if not found:  # nothing was said, or the template writes something else: the next turn is read as a whole
            self._prefix = None
        elif made.finish_reason == "eos":  # the token that closes it is there already
            self._closing = self._closing.removeprefix(tokenizer.eos_token or "")
