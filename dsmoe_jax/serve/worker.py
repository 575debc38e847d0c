"""`Worker`: the engine in a thread of its own. Start at `Worker.generate`, then `Worker._run`.

The event loop puts commands into a queue, and the thread executes them between two steps of the engine. After each step
it hands the new tokens of all requests to the event loop at once. Nothing else is shared: a `Generation` lives in the
event loop, its `_Job` in the thread.
"""

import asyncio
import collections
import functools
import logging
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.programs import Experts
from dsmoe_jax.generate.request import Output, TokenLogprob
from dsmoe_jax.generate.scoring import Score
from dsmoe_jax.serve.api_error import ApiError, from_refusal, internal_error, timed_out
from dsmoe_jax.serve.metrics import Metrics

_log = logging.getLogger("dsmoe_jax")
_SCORED_AT_ONCE: Final = 64  # prompts
_SCORING_SECONDS: Final = 0.05  # between two steps of the engine
_TOP_LOGPROBS: Final = 20  # computed for any positive number, as each compiles a program

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


class _Job:
    """A generation in the thread of the engine."""

    def __init__(self, generation: Generation, *, stream: bool, **options: Any):
        self.generation, self.stream, self.options = generation, stream, options
        self.submitted = time.perf_counter()
        self.outputs: list[Output] = []
        self.sent: list[int] = []  # tokens of each output; -1: finished
        self.times: list[float] = []  # of the newest token of each output


class _Scoring(NamedTuple):
    """Prompts to score, and the future of their scores."""

    prompts: Sequence[Tokens]
    top: int | None
    future: asyncio.Future[list[Score]]


class Worker:
    """Runs the requests of a server; all methods but those of the thread are for the event loop.

    Attributes:
        draining: Refuse new requests.
        ready: The common programs are compiled.
        outstanding: Outputs that are running or waiting.
        failed: The thread has ended by an exception.
    """

    def __init__(self, generator: Generator, *, max_queue: int, timeout: float, metrics: Metrics, warm_up: bool = True):
        """Create a worker, whose thread `start` starts."""
        self.generator, self.metrics = generator, metrics
        self.capacity = generator.max_batch_size + max_queue
        self.draining = self.ready = self.failed = False
        self.outstanding = 0
        self._timeout, self._warm_up_first = timeout, warm_up
        self._generations: set[Generation] = set()
        self._futures: set[asyncio.Future[list[Score]]] = set()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = threading.Event()
        # Of the thread:
        self.engine: Engine = generator.engine()
        self._jobs: dict[Generation, _Job] = {}
        self._scorings: collections.deque[_Scoring] = collections.deque()
        self._scores: Iterator[None] | None = None

    # --- for the event loop ---

    def start(self) -> None:
        """Start the thread, in a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; unfinished requests fail."""
        self.draining = True
        self._stopping.set()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def check_open(self) -> None:
        """Raise `ApiError` if no request is accepted now."""
        if self.failed:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine has failed; restart the server")
        if self.draining:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", code="shutting_down")

    def generate(
        self, prompts: Sequence[Tokens], params: SamplingParams, *, stream: bool, routing: bool, retain_prefix: bool
    ) -> Generation:
        """Queue prompts.

        Args:
            prompts: Token ids.
            params: Sampling parameters of all of them.
            stream: Deliver every token instead of whole outputs.
            routing: Deliver the experts of each token.
            retain_prefix: Retain keys and values for prompts that begin alike.

        Returns:
            Their outputs.

        Raises:
            ApiError: The queue is full, or the server is shutting down.
        """
        self.check_open()
        count = len(prompts) * params.n
        if count > self.capacity:
            raise ApiError(400, f"{count} outputs exceed the {self.capacity} that fit the queue", param="n")
        if self.outstanding + count > self.capacity:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"the queue is full: {self.outstanding} outputs are running or waiting",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        generation = Generation(prompts, params, self._cancel)
        generation.deadline = self._loop.call_later(self._timeout, generation.fail, timed_out(self._timeout))
        self._generations.add(generation)
        self.outstanding += count
        options = {"routing": routing, "retain_prefix": retain_prefix, "detokenize": stream}
        self._commands.put(functools.partial(self._submit, _Job(generation, stream=stream, **options)))
        return generation

    async def score(self, prompts: Sequence[Tokens], top: int | None) -> list[Score]:
        """Return the log-likelihood of each prompt of at least two tokens, given its first one."""
        self.check_open()
        future = self._loop.create_future()
        self._futures.add(future)
        self._commands.put(lambda: self._scorings.append(_Scoring(prompts, top, future)))
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            raise timed_out(self._timeout) from None
        finally:
            self._futures.discard(future)

    def _cancel(self, generation: Generation) -> None:
        self._generations.discard(generation)
        self.outstanding -= len(generation.prompts) * generation.params.n
        if generation.unfinished:
            self._commands.put(functools.partial(self._abort, generation))

    def _deliver(self, updates: Sequence[tuple[Generation, list[Delta]]]) -> None:
        for generation, deltas in updates:
            generation.put(deltas)

    def _fail_all(self) -> None:
        for generation in [*self._generations]:
            generation.fail(internal_error())
        for future in self._futures:
            _reject(future)

    # --- the thread ---

    def _run(self) -> None:
        try:
            if self._warm_up_first:
                self._warm_up()
            self.ready = True
            while not self._stopping.is_set():
                self._execute(wait=not (self.engine.busy or self._scorings or self._scores))
                if self.engine.busy:
                    self.engine.step()
                    self._publish()
                self._score()
        except BaseException:
            _log.exception("The engine failed; all requests end")
            self.failed = True
        self.ready = False
        self._call(self._fail_all)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _execute(self, wait: bool) -> None:
        """Execute the commands in the queue, after waiting for one if nothing else is to be done."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            if command is None:
                return
            command()
            wait = False

    def _warm_up(self) -> None:
        """Compile the steps of one row and of all rows, greedy and sampled."""
        start = time.perf_counter()
        prompt = [0] * max(1, min(8, self.generator.context_length - 2))
        tokens = min(2, self.generator.context_length - len(prompt))
        for rows in (1, self.generator.max_batch_size):
            for temperature in (0.0, 1.0):
                engine = self.generator.engine()
                params = SamplingParams(
                    temperature=temperature, max_new_tokens=tokens, n=min(rows, 1024), ignore_eos=True
                )
                self.generator.submit(engine, prompt, params)
                while engine.busy and not self._stopping.is_set():
                    engine.step()
        _log.info("Compiled the common programs in %.1f s", time.perf_counter() - start)

    def _submit(self, job: _Job) -> None:
        generation = job.generation
        try:
            for prompt in generation.prompts:
                outputs = self.generator.submit(self.engine, prompt, generation.params, **job.options)
                job.outputs += outputs
        except Exception as error:
            for output in job.outputs:
                self.engine.cancel(output)
            refusal = isinstance(error, DSMoEError)
            if not refusal:
                _log.exception("A request failed")
            self._call(generation.fail, from_refusal(error, ()) if refusal else internal_error())
            return
        job.sent, job.times = [0] * len(job.outputs), [0.0] * len(job.outputs)
        self._jobs[generation] = job
        self.metrics.prompt_tokens.inc(sum(map(len, generation.prompts)))

    def _abort(self, generation: Generation) -> None:
        job = self._jobs.pop(generation, None)
        for output in job.outputs if job else ():
            if not output.finished:
                self.engine.cancel(output)
                self.metrics.finished.labels("abort").inc()

    def _publish(self) -> None:
        """Deliver the new tokens of all requests."""
        now, updates, tokens = time.perf_counter(), [], 0
        for generation, job in [*self._jobs.items()]:
            deltas = []
            for index, output in enumerate(job.outputs):
                if job.sent[index] >= 0 and (new := len(output.token_ids) - max(job.sent[index], 0)):
                    self._observe(job, index, now, new)
                    tokens += new
                    if job.stream or output.finished:
                        deltas.append(self._delta(job, index, output))
                    job.times[index] = now
                    job.sent[index] = -1 if output.finished else len(output.token_ids)
            if deltas:
                updates.append((generation, deltas))
            if all(sent < 0 for sent in job.sent):
                del self._jobs[generation]
        if tokens:
            self.metrics.add_tokens(tokens, now)
        self._set_gauges()
        if updates:
            self._call(self._deliver, updates)

    def _observe(self, job: _Job, index: int, now: float, new: int) -> None:
        metrics, output = self.metrics, job.outputs[index]
        if not job.times[index]:
            metrics.first_token.observe(now - job.submitted)
            metrics.reused_tokens.inc(output.num_reused if output.index == 0 else 0)
        else:
            metrics.between_tokens.observe((now - job.times[index]) / new)
        if output.finished:
            metrics.duration.observe(now - job.submitted)
            metrics.finished.labels(output.finish_reason).inc()

    def _delta(self, job: _Job, index: int, output: Output) -> Delta:
        start = job.sent[index] if job.stream else 0
        text = output.new_text() if job.stream else self.generator.completion(output).text
        routed = max(start - 1, 0)  # the experts of a token are known one step later
        return Delta(
            index,
            text,
            output.token_ids[start:],
            output.logprobs[start:],
            output.routing[routed:],
            output.finish_reason,
            output.stop_reason,
            output.num_reused,
        )

    def _set_gauges(self) -> None:
        running = self.engine.num_running
        unfinished = sum(sent >= 0 for job in self._jobs.values() for sent in job.sent)
        self.metrics.running.set(running)
        self.metrics.waiting.set(max(unfinished - running, 0))
        size, usage = self.engine.kv_cache
        self.metrics.kv_cache_bytes.set(size)
        self.metrics.kv_cache_usage.set(usage)
        self.metrics.prefix_cache_bytes.set(self.engine.prefix_cache_bytes)

    def _score(self) -> None:
        """Compute scores for a while; requests that wait are scored together."""
        if self._scores is None and self._scorings:
            self._scores = self._run_scorings(self._take_scorings())
        end = time.perf_counter() + _SCORING_SECONDS
        while self._scores is not None and time.perf_counter() < end:
            if next(self._scores, self) is self:
                self._scores = None

    def _take_scorings(self) -> list[_Scoring]:
        together = [self._scorings.popleft()]
        while self._scorings and self._scorings[0].top == together[0].top and len(together) < _SCORED_AT_ONCE:
            together.append(self._scorings.popleft())
        return [one for one in together if not one.future.cancelled()]

    def _run_scorings(self, together: Sequence[_Scoring]) -> Iterator[None]:
        """Yield after each score."""
        owners = [(one, i) for one, scoring in enumerate(together) for i in range(len(scoring.prompts))]
        found: list[dict[int, Score]] = [{} for _ in together]
        pairs = [(together[one].prompts[i][:1], together[one].prompts[i][1:]) for one, i in owners]
        try:
            for pair, score in self.generator.iter_scores(pairs, top=together[0].top) if pairs else ():
                one, i = owners[pair]
                found[one][i] = score
                self.metrics.scored_tokens.inc(len(pairs[pair][1]))
                if len(found[one]) == len(together[one].prompts):
                    self._call(_resolve, together[one].future, [found[one][i] for i in range(len(found[one]))])
                yield
        except Exception:
            _log.exception("Scoring failed")
            for scoring in together:
                self._call(_reject, scoring.future)


def _resolve(future: asyncio.Future[list[Score]], scores: list[Score]) -> None:
    if not future.done():  # canceled
        future.set_result(scores)


def _reject(future: asyncio.Future[list[Score]]) -> None:
    if not future.done():
        future.set_exception(internal_error())


def top_bucket(logprobs: int | None, vocab_size: int) -> int | None:
    """Return how many log-probabilities to compute for so many requested ones."""
    return min(_TOP_LOGPROBS, vocab_size) if logprobs else None


def random_seed() -> int:
    """Return a seed for a request without one."""
    return secrets.randbits(32)
