"""What is asked and what becomes of it: `Request`, and each of its `Answer`s in the making."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dsmoe_jax.generate.sampling_params import SamplingParams
from dsmoe_jax.generate.text import TextStream
from dsmoe_jax.kv_cache import KVCache


class TokenLogprob(NamedTuple):
    """The log-probability of a token under the model, temperature and penalties apart, and of the N likeliest."""

    logprob: float
    top: dict[int, float]


class Prefix(NamedTuple):
    """Tokens that were read once, with their keys and values: a prompt that begins with them need not read them."""

    ids: tuple[int, ...]
    cache: KVCache  # of one row; holds at least all but the last token

    def shared_with(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read; never its last one, whose logits are wanted."""
        most = min(len(self.ids), len(ids)) - 1
        return next((i for i in range(most) if self.ids[i] != ids[i]), most)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt and what is asked of its answers."""

    ids: tuple[int, ...]
    asked: SamplingParams
    seed: int
    prefix: Prefix | None
    keep: bool  # the first answer leaves a `Prefix` behind

    @property
    def most(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.ids) + self.asked.max_new_tokens


class Answer:
    """One answer in the making; a request for n of them has n."""

    def __init__(self, request: Request, index: int, text: TextStream | None):
        self.request, self.index = request, index
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.prefix: Prefix | None = None
        self.chosen = 0  # tokens that the device was asked for; the last one may not have been looked at
        self.text = ""  # as far as it is final; for those who asked for it
        self._stream = text
        self._given = 0  # characters of it that `new_text` gave out

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def held(self) -> int:
        """Tokens in its row of the cache: all but the newest one."""
        return len(self.request.ids) + self.chosen - 1

    def new_text(self) -> str:
        """The text that has come since the last call."""
        new, self._given = self.text[self._given :], len(self.text)
        return new

    def take(self, token: int, logprob: TokenLogprob | None, eos: frozenset[int]) -> None:
        """The next token has come."""
        asked = self.request.asked
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in eos and not asked.ignore_eos:
            self.finish("eos")
        elif token in asked.stop_token_ids or self._feed(token):
            self.finish("stop")
        elif len(self.tokens) >= asked.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """No further token comes."""
        self.finish_reason = reason
        if self._stream is not None:
            self.text += self._stream.flush()
            if self._stream.stopped:  # what had been held back holds a stop string
                self.finish_reason = "stop"

    def _feed(self, token: int) -> bool:
        """The text of a token; True if it completes a stop string."""
        if self._stream is None:
            return False
        self.text += self._stream.feed(token)
        return self._stream.stopped
