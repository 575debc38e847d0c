"""Bodies of responses, whole and as chunks of a stream: `CompletionFormat`, `ChatFormat`."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsmoe_jax.generate.request import TokenLogprob
from dsmoe_jax.generate.scoring import Score
from dsmoe_jax.serve.generation import Delta
from dsmoe_jax.serve.prompts import EncodedPrompt
from dsmoe_jax.serve.schemas import ChatRequest, CompletionRequest, SamplingRequest
from dsmoe_jax.serve.token_text import TokenTexts, finite


class Echo(NamedTuple):
    """The beginning of an output with `echo`: the text of a prompt, and the scores of all its tokens but the first."""

    text: str
    score: Score | None


class _Format:
    """What both kinds of responses have in common; an instance is for one request."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: SamplingRequest, model: str, prompts: Sequence[EncodedPrompt], texts: TokenTexts):
        self._body, self._texts, self._prompts = body, texts, prompts
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._completion_tokens = 0
        self._reused: dict[int, int] = {}

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the body of a response with these outputs."""
        choices = [self.choice(delta) for delta in sorted(deltas, key=lambda delta: delta.index)]
        return self._head | {"object": self.object, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a chunk of a stream."""
        body = self._head | {"object": self.chunk_object, "choices": [*choices]}
        options = getattr(self._body, "stream_options", None)
        return body | {"usage": usage} if options is not None and options.include_usage else body

    def choice(self, delta: Delta) -> dict[str, Any]:
        """Return an output, or what is new of it."""
        raise NotImplementedError

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """Return what precedes the tokens of a stream of `count` outputs."""
        return []

    def count(self, delta: Delta) -> None:
        """Count the tokens of an output."""
        self._completion_tokens += len(delta.token_ids)
        self._reused[delta.index] = delta.num_reused

    def usage(self) -> dict[str, Any]:
        """Return the number of tokens; cached ones were not read again."""
        prompt, n = sum(len(one.token_ids) for one in self._prompts), self._body.n or 1
        cached = sum(count for index, count in self._reused.items() if index % n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _extras(self, delta: Delta) -> dict[str, Any]:
        """Return the fields that the OpenAI API lacks."""
        fields: dict[str, Any] = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if self._body.return_token_ids:
            fields["token_ids"] = delta.token_ids
            fields["prompt_token_ids"] = self._prompts[delta.index // (self._body.n or 1)].token_ids
        if self._body.routing:
            layers = [zip(one.ids.tolist(), one.weights.tolist(), strict=True) for one in delta.routing]
            fields["routing"] = [[[*zip(*layer, strict=True)] for layer in token] for token in layers]
        return fields


class CompletionFormat(_Format):
    """Responses of /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    _body: CompletionRequest

    def __init__(self, *arguments: Any, echoes: Sequence[Echo] = ()):
        """Create the format of a request; `echoes` are those of the prompts."""
        super().__init__(*arguments)
        self._echoes = echoes
        self._started: dict[int, int] = {}  # characters of each output

    def choice(self, delta: Delta) -> dict[str, Any]:
        """Return an output, or what is new of it."""
        self.count(delta)
        text, logprobs = delta.text, None
        prompt = delta.index // (self._body.n or 1)
        echo = self._echoes[prompt] if self._echoes and delta.index not in self._started else None
        self._started.setdefault(delta.index, 0)
        if echo is not None:
            text = echo.text + text
        if self._body.logprobs is not None:
            tokens = [] if echo is None else self._prompts[prompt].token_ids
            logprobs = self._logprobs(delta, tokens, None if echo is None else echo.score)
        return {"index": delta.index, "text": text, "logprobs": logprobs, **self._extras(delta)}

    def _logprobs(self, delta: Delta, prompt: Sequence[int], score: Score | None) -> dict[str, Any]:
        """Return the log-probabilities of an echoed prompt, its first token without one, and of the output."""
        tokens = [*prompt, *delta.token_ids]
        known: list[TokenLogprob | None] = [None] * (len(tokens) - len(delta.logprobs))
        known += delta.logprobs
        if score is not None:
            top = score.top_logprobs or [{}] * len(score.token_logprobs)
            known[1 : len(prompt)] = map(TokenLogprob, score.token_logprobs, top)
        offsets, at = [], self._started[delta.index]
        for token in tokens:
            offsets.append(at)
            at += len(self._texts.visible(token))
        self._started[delta.index] = at
        count = self._body.logprobs or 0
        return {
            "tokens": [self._texts.of(token) for token in tokens],
            "token_logprobs": [None if one is None else finite(one.logprob) for one in known],
            "top_logprobs": [
                None if one is None else self._texts.by_text(one.top, count, token, one.logprob)
                for token, one in zip(tokens, known, strict=True)
            ],
            "text_offset": offsets,
        }


class ChatFormat(_Format):
    """Responses of /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _body: ChatRequest

    def choice(self, delta: Delta) -> dict[str, Any]:
        """Return an output, or what is new of it."""
        self.count(delta)
        if self._body.stream:
            message = {"delta": {"content": delta.text}}
        else:
            message = {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        logprobs = None
        if self._body.logprobs:
            entries = zip(delta.token_ids, delta.logprobs, strict=True)
            logprobs = {"content": [self._entry(token, one) for token, one in entries], "refusal": None}
        return {"index": delta.index, **message, "logprobs": logprobs, **self._extras(delta)}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """Return the chunk with the role of each output."""
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.chunk([{"index": index, **role}]) for index in range(count)]

    def _entry(self, token: int, one: TokenLogprob) -> dict[str, Any]:
        count = self._body.top_logprobs or 0
        top = [self._texts.entry(*pair) for pair in [*one.top.items()][:count]]
        return {**self._texts.entry(token, one.logprob), "top_logprobs": top}
