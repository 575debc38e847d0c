"""`Worker`: the engine in a thread of its own. Start at `Worker.generate`, then `Worker._run`.

The event loop puts commands into a queue, and the thread executes them between two steps of the engine. After each step
it hands the new tokens of all requests to the event loop at once. Nothing else is shared: a `Generation` lives in the
event loop, its `Job` in the thread.
"""

import asyncio
import collections
import functools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.scoring import Score
from dsmoe_jax.serve.api_error import ApiError, from_refusal, internal_error, shutting_down, timed_out
from dsmoe_jax.serve.generation import Delta, Generation, Tokens
from dsmoe_jax.serve.job import Job
from dsmoe_jax.serve.metrics import Metrics

_log = logging.getLogger("dsmoe_jax")
_INTERVAL: Final = 0.01  # seconds between two chunks of a stream, which cost as much as a step of a small model
_GAUGE_INTERVAL: Final = 0.1  # seconds
_SCORED_AT_ONCE: Final = 64  # prompts
_SCORING_SECONDS: Final = 0.05  # between two steps of the engine
_TOP_LOGPROBS: Final = 20  # computed for any positive number, as each compiles a program


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
        outstanding: Outputs, and prompts to score, that are running or waiting.
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
        self._jobs: dict[Generation, Job] = {}
        self._delivered = self._measured = 0.0  # times of the last chunks and gauges
        self._scorings: collections.deque[_Scoring] = collections.deque()
        self._scores: Iterator[None] | None = None

    # --- for the event loop ---

    def start(self) -> None:
        """Start the thread, in a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; unfinished requests fail."""
        self.draining = True
        self._stopping.set()
        self._commands.put(None)

    @property
    def running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def check_open(self) -> None:
        """Raise `ApiError` if no request is accepted now."""
        if self.failed:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine has failed; restart the server")
        if self.draining:
            raise shutting_down()

    def _reserve(self, prompts: int, n: int | None = None) -> None:
        """Count outputs, or without `n` prompts to score, as outstanding, or raise `ApiError`."""
        self.check_open()
        count = prompts * (n or 1)
        if count > self.capacity:
            what = f"{count} {'prompts' if n is None else 'outputs'}"
            param = "n" if prompts <= self.capacity else "prompt"
            raise ApiError(400, f"{what} exceed the {self.capacity} that fit the queue", param=param)
        if self.outstanding + count > self.capacity:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"the queue is full: {self.outstanding} outputs are running or waiting",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.outstanding += count

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
        self._reserve(len(prompts), params.n)
        generation = Generation(prompts, params, self._cancel)
        generation.deadline = self._loop.call_later(self._timeout, generation.fail, timed_out(self._timeout))
        self._generations.add(generation)
        options = {"routing": routing, "retain_prefix": retain_prefix}
        options["detokenize"] = stream and self.generator.tokenizer is not None
        self._commands.put(functools.partial(self._submit, Job(generation, stream=stream, **options)))
        return generation

    async def score(self, prompts: Sequence[Tokens], top: int | None) -> list[Score]:
        """Return the log-likelihood of each prompt of at least two tokens, given its first one."""
        self._reserve(len(prompts))
        future = self._loop.create_future()
        self._futures.add(future)
        self._commands.put(lambda: self._scorings.append(_Scoring(prompts, top, future)))
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            raise timed_out(self._timeout) from None
        finally:
            self.outstanding -= len(prompts)
            self._futures.discard(future)

    def _cancel(self, generation: Generation) -> None:
        self._generations.discard(generation)
        self.outstanding -= len(generation.prompts) * generation.params.n
        if generation.unfinished:
            self._commands.put(functools.partial(self._abort, generation))

    def _deliver(self, updates: Sequence[tuple[Generation, list[Delta]]]) -> None:
        for generation, deltas in updates:
            generation.put(deltas)

    def fail_all(self) -> None:
        """End all requests with an error."""
        error = internal_error() if self.failed else shutting_down()
        for generation in [*self._generations]:
            generation.fail(error)
        for future in self._futures:
            _reject(future, error)

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
        self._call(self.fail_all)

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
        if not self._stopping.is_set():
            _log.info("Compiled the common programs in %.1f s", time.perf_counter() - start)

    def _submit(self, job: Job) -> None:
        generation = job.generation
        try:
            job.submit(self.generator, self.engine)
        except DSMoEError as error:
            self._call(generation.fail, from_refusal(error, ()))
        except Exception:
            _log.exception("A request failed")
            self._call(generation.fail, internal_error())
        else:
            self._jobs[generation] = job
            self.metrics.prompt_tokens.inc(sum(map(len, generation.prompts)))

    def _abort(self, generation: Generation) -> None:
        job = self._jobs.pop(generation, None)
        for output in job.outputs if job else ():
            if not output.finished:
                self.engine.cancel(output)
                self.metrics.finished.labels("abort").inc()

    def _publish(self) -> None:
        """Deliver the new tokens of all requests; at high rates several of a request at once."""
        now, updates = time.perf_counter(), []
        due = now - self._delivered >= _INTERVAL
        for generation, job in [*self._jobs.items()]:
            if deltas := job.collect(self.generator, self.metrics, now, due=due):
                updates.append((generation, deltas))
                if not job.unfinished:
                    del self._jobs[generation]
        if due:
            self._delivered = now
        if now - self._measured >= _GAUGE_INTERVAL or not self.engine.busy:
            self._measured = now
            self._set_gauges()
        if updates:
            self._call(self._deliver, updates)

    def _set_gauges(self) -> None:
        running = self.engine.num_running
        unfinished = sum(job.unfinished for job in self._jobs.values())
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
                self._call(_reject, scoring.future, internal_error())


def _resolve(future: asyncio.Future[list[Score]], scores: list[Score]) -> None:
    if not future.done():  # canceled
        future.set_result(scores)


def _reject(future: asyncio.Future[list[Score]], error: ApiError) -> None:
    if not future.done():
        future.set_exception(error)


def top_bucket(logprobs: int | None, vocab_size: int) -> int | None:
    """Return how many log-probabilities to compute for so many requested ones."""
    return min(_TOP_LOGPROBS, vocab_size) if logprobs else None


def random_seed() -> int:
    """Return a seed for a request without one."""
    return secrets.randbits(32)
