"""`Generation`: the outputs of one request, as the event loop sees them; `Delta`: what is new of one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from dsmoe_jax.generate import SamplingParams
from dsmoe_jax.generate.programs import Experts
from dsmoe_jax.generate.request import TokenLogprob
from dsmoe_jax.serve.api_error import ApiError

Tokens = Sequence[int]


class Delta(NamedTuple):
    """What is new of one output."""

    index: int  # prompt · n + output
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    routing: list[Experts]
    finish_reason: str | None
    stop_reason: int | str | None
    num_reused: int

    def merge(self, later: "Delta") -> "Delta":
        """Return both as one."""
        sums = {
            name: getattr(self, name) + getattr(later, name) for name in ("text", "token_ids", "logprobs", "routing")
        }
        return later._replace(**sums)


class Generation:
    """The outputs of one request, an async iterator of their deltas; `cancel` it when it is not read to the end."""

    def __init__(self, prompts: Sequence[Tokens], params: SamplingParams, cancel: Callable[["Generation"], None]):
        """Create it without tokens; `cancel` is called once."""
        self.prompts, self.params = prompts, params
        self.unfinished = len(prompts) * params.n
        self._cancel: Callable[[Generation], None] | None = cancel
        self._deltas: dict[int, Delta] = {}
        self._error: ApiError | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()

    @classmethod
    def empty(cls, prompts: Sequence[Tokens], params: SamplingParams) -> "Generation":
        """Return a finished generation without tokens."""
        generation = cls(prompts, params, lambda _: None)
        generation.put([Delta(index, "", [], [], [], "length", None, 0) for index in range(generation.unfinished)])
        return generation

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield the deltas since the last ones; a slow reader gets longer ones.

        Raises:
            ApiError: The engine refused the request or failed.
        """
        while self.unfinished or self._deltas:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            deltas, self._deltas = [*self._deltas.values()], {}
            yield deltas

    def cancel(self) -> None:
        """Release the rows of unfinished outputs; without effect afterwards."""
        if self.deadline is not None:
            self.deadline.cancel()
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel(self)

    def put(self, deltas: Sequence[Delta]) -> None:
        """Add deltas."""
        for delta in deltas:
            earlier = self._deltas.get(delta.index)
            self._deltas[delta.index] = delta if earlier is None else earlier.merge(delta)
            self.unfinished -= delta.finish_reason is not None
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """Raise an error where the deltas are read."""
        self._error = error
        self._changed.set()
