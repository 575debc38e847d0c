"""`Job`: a request as the thread of the engine sees it. Start at `Job.collect`."""

import time
from typing import Any, Final

from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.request import Output
from dsmoe_jax.serve.generation import Delta, Generation
from dsmoe_jax.serve.metrics import Metrics

_FINISHED: Final = -1


class Job:
    """The outputs of a generation in the engine, and what was delivered of them."""

    def __init__(self, generation: Generation, *, stream: bool, **options: Any):
        """Create a job without outputs; `options` are those of `Engine.submit`."""
        self.generation, self._stream, self._options = generation, stream, options
        self._submitted = time.perf_counter()
        self.outputs: list[Output] = []
        self._counted: list[int] = []  # tokens of each output
        self._delivered: list[int] = []
        self._times: list[float] = []  # of the newest token of each output

    def submit(self, generator: Generator, engine: Engine) -> None:
        """Submit the prompts; none if one is refused."""
        try:
            for prompt in self.generation.prompts:
                self.outputs += generator.submit(engine, prompt, self.generation.params, **self._options)
        except Exception:
            for output in self.outputs:
                engine.cancel(output)
            raise
        count = len(self.outputs)
        self._counted, self._delivered, self._times = [0] * count, [0] * count, [0.0] * count

    @property
    def unfinished(self) -> int:
        """Outputs that are not delivered to the end."""
        return sum(count != _FINISHED for count in self._delivered)

    def collect(self, generator: Generator, metrics: Metrics, now: float, *, due: bool) -> list[Delta]:
        """Count new tokens, and return what is to be delivered now: first tokens, ends, and what is `due`."""
        deltas = []
        for index, output in enumerate(self.outputs):
            delivered = self._delivered[index]
            if delivered == _FINISHED or len(output.token_ids) == delivered:
                continue
            self._count(index, metrics, now)
            if output.finished or (self._stream and (due or not delivered)):
                deltas.append(self._delta(index, generator))
                self._delivered[index] = _FINISHED if output.finished else len(output.token_ids)
        return deltas

    def _count(self, index: int, metrics: Metrics, now: float) -> None:
        output = self.outputs[index]
        new, before = len(output.token_ids) - self._counted[index], self._times[index]
        if not new:
            return
        metrics.add_tokens(new, now)
        if before:
            metrics.between_tokens.observe((now - before) / new)
        else:
            metrics.first_token.observe(now - self._submitted)
            metrics.reused_tokens.inc(output.num_reused if output.index == 0 else 0)
        if output.finished:
            metrics.duration.observe(now - self._submitted)
            metrics.finished.labels(output.finish_reason).inc()
        self._counted[index], self._times[index] = len(output.token_ids), now

    def _delta(self, index: int, generator: Generator) -> Delta:
        output, start = self.outputs[index], self._delivered[index]
        return Delta(
            index,
            output.new_text() if self._stream else generator.completion(output).text,
            output.token_ids[start:],
            output.logprobs[start:],
            output.routing[max(start - 1, 0) :],  # the experts of a token are known one step later
            output.finish_reason,
            output.stop_reason,
            output.num_reused,
        )
