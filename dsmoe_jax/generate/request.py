"""Generation requests, their outputs in progress, and results: `Request`, `Output`, `Completion`."""

import dataclasses
from typing import NamedTuple

from dsmoe_jax.generate.detokenizer import Detokenizer
from dsmoe_jax.generate.prefix_cache import Prefix
from dsmoe_jax.generate.programs import Experts
from dsmoe_jax.generate.sampling_params import SamplingParams


class TokenLogprob(NamedTuple):
    """Log-probabilities at one position, before temperature, penalties and biases.

    Attributes:
        logprob: Natural logarithm of the probability of the sampled token.
        top: The same of the N most likely tokens, by token id.
    """

    logprob: float
    top: dict[int, float]


class Completion(NamedTuple):
    """One output for a prompt.

    Attributes:
        text: Without the EOS token or stop string; empty if the generator has no tokenizer.
        token_ids: As generated, including a final EOS or stop token.
        finish_reason: "stop" (EOS, a stop token or a stop string), "length", or "error" with `errors="return"`.
        stop_reason: The stop string or stop token id that ended it; None after EOS and for other finish reasons.
        logprobs: One entry per token if requested.
        error: Error message if `finish_reason` is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclasses.dataclass
class Stats:
    """Counters of an engine.

    Attributes:
        steps: Decode steps.
        row_steps: Rows of all steps, idle ones included.
        active_row_steps: Active rows of all steps.
        prompt_tokens: Prefilled tokens.
        reused_tokens: Prompt tokens that were not prefilled, as their keys and values were cached.
        cache_bytes: Largest size of the KV cache.
    """

    steps: int = 0
    row_steps: int = 0
    active_row_steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    cache_bytes: int = 0

    @property
    def idle_fraction(self) -> float:
        """Idle rows over all rows."""
        return 1 - self.active_row_steps / max(self.row_steps, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt and the sampling parameters of its outputs."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    prefix: Prefix | None
    retain_prefix: bool
    routing: bool = False

    @property
    def max_length(self) -> int:
        """Maximum tokens of prompt and output."""
        return len(self.token_ids) + self.params.max_new_tokens


class Output:
    """An output in progress; a request has `params.n` of them, numbered by `index`."""

    def __init__(self, request: Request, index: int, detokenizer: Detokenizer | None):
        self.request, self.index = request, index
        self.token_ids: list[int] = []  # read back from the device
        self.logprobs: list[TokenLogprob] = []
        self.routing: list[Experts] = []  # of all tokens but the last, if requested: the last is not fed to the model
        self.finish_reason: str | None = None  # "stop", "length" or "abort"
        self.stop_reason: int | str | None = None  # as in `Completion`
        self.prefix: Prefix | None = None  # set when finished, with `retain_prefix`
        self.num_reused = 0  # prompt tokens whose keys and values were cached
        self.num_sampled = 0  # on the device; `token_ids` may be one step behind
        self.text = ""
        self._detokenizer = detokenizer
        self._num_emitted = 0  # characters of `text` that `new_text` has returned

    @property
    def finished(self) -> bool:
        """Whether the output is complete."""
        return self.finish_reason is not None

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache: all but the newest."""
        return len(self.request.token_ids) + self.num_sampled - 1

    def new_text(self) -> str:
        """Return the text since the last call."""
        new, self._num_emitted = self.text[self._num_emitted :], len(self.text)
        return new

    def append(self, token: int, logprob: TokenLogprob | None, eos_token_ids: frozenset[int]) -> None:
        """Append a sampled token and check the stopping conditions."""
        params = self.request.params
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in eos_token_ids and not params.ignore_eos:
            self.finish("stop")
        elif token in params.stop_token_ids:
            self.finish("stop", token)
        elif self._detokenize(token):
            self.finish("stop")
        elif len(self.token_ids) >= params.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | None = None) -> None:
        """Mark the output as complete; a stop string in its text takes precedence over `reason`."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._detokenizer is not None:
            self.text += self._detokenizer.flush()
            if self._detokenizer.stop_string is not None:
                self.finish_reason, self.stop_reason = "stop", self._detokenizer.stop_string

    def _detokenize(self, token: int) -> bool:
        """Extend the text; return whether a stop string is complete."""
        if self._detokenizer is None:
            return False
        self.text += self._detokenizer.feed(token)
        return self._detokenizer.stop_string is not None
