"""`Engine`: continuous batching. Start at `Engine.step`.

Between two decode steps, waiting requests are admitted to idle rows of the batch, first come first served. Prompts are
prefilled in chunks, one per step, which bounds the latency of running requests. The host is one step behind the device:
a step is dispatched before the tokens of the last one are read back, and tokens of finished rows are discarded.

Scheduling depends on requests and tokens alone, so all processes of a cluster make the same decisions.
"""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import programs
from dsmoe_jax.generate.detokenizer import Detokenizer
from dsmoe_jax.generate.memory_plan import cache_bytes
from dsmoe_jax.generate.prefill import Prefill, Prefiller
from dsmoe_jax.generate.prefix_cache import MIN_SHARED, Prefix, PrefixCache
from dsmoe_jax.generate.programs import Batch, Experts, SampledTokens, bucket, power_of_two
from dsmoe_jax.generate.request import Output, Request, Stats, TokenLogprob
from dsmoe_jax.generate.sampling import PenaltyState, Sampler, penalty_arrays
from dsmoe_jax.generate.sampling_params import SamplingParams
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.progress import byte_size
from dsmoe_jax.sharding import concrete_mesh, mesh_of
from dsmoe_jax.text.tokenizer import Tokenizer

_LOOKAHEAD: Final = 256  # output tokens to allocate at once; the cache grows as needed
_SHARING_WINDOW: Final = 64  # waiting prompts that are searched for a shared beginning
_TOP_LOGPROBS: Final = 20  # computed if any request has `logprobs`

_log = logging.getLogger("dsmoe_jax")


@dataclasses.dataclass
class _Admission:
    """Requests being prefilled."""

    requests: list[Request]
    prefill: Prefill
    retain: bool  # add the (only) prompt to the prefix cache


class _Prefilled(NamedTuple):
    """A prefilled output waiting for an idle row."""

    output: Output
    cache: KVCache
    logits: Array
    row: int


class Engine:
    """Runs requests: `submit`, then `step` while `busy`; `stats` has counters. Not thread-safe."""

    def __init__(
        self,
        graph: Any,
        params: Mapping[str, Any],
        config: ModelConfig,
        *,
        context_length: int,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        max_batch_size: int = 8,
        prefill_chunk: int = 512,
        cache_dtype: Any = jnp.float32,
        max_cache_bytes: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ):
        """Create an engine without requests.

        Args:
            graph: Graph of the model (`model.split`).
            params: Parameters of the model.
            config: Config of the model.
            context_length: Maximum tokens of prompt and output together.
            tokenizer: Required for stop strings and incremental text.
            eos_token_ids: Tokens that end an output.
            max_batch_size: Maximum rows of the batch.
            prefill_chunk: Tokens of a prompt per call of the model.
            cache_dtype: Dtype of keys and values.
            max_cache_bytes: Bound on the KV cache of the batch; None: no bound.
            prefix_cache: Prefixes to reuse, shared with other engines of the same model; None: none.
        """
        self._graph, self._params, self._config = graph, params, config
        self._context, self._tokenizer, self._eos = context_length, tokenizer, eos_token_ids
        self._max_rows, self._chunk = max_batch_size, prefill_chunk
        self._dtype, self._max_cache_bytes = cache_dtype, max_cache_bytes
        self._prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
        self._mesh = concrete_mesh(params)
        # Dynamic NTK beyond the trained length: the angles depend on the batch, which must be admitted as one.
        self._static = False
        self._waiting: collections.deque[Request] = collections.deque()
        self._outputs: dict[Request, list[Output]] = {}
        self._admission: _Admission | None = None
        self._prefilled: collections.deque[_Prefilled] = collections.deque()
        self._rows: list[Output | None] = []  # None: idle
        self._batch: Batch | None = None
        self._token: Any = None  # [R], the newest of each row
        self._sampler: Sampler | None = None
        self._sampler_stale = True
        self._in_flight: collections.deque[tuple[SampledTokens, list[tuple[int, int, Output]]]] = collections.deque()
        self.stats = Stats()
        self._prefiller = Prefiller(
            graph, params, dtype=cache_dtype, chunk=prefill_chunk, prefix_cache=self._prefix_cache, stats=self.stats
        )

    @property
    def busy(self) -> bool:
        """Whether any output is unfinished."""
        return bool(self._waiting or self._admission or self._prefilled or self._in_flight or any(self._rows))

    @property
    def num_running(self) -> int:
        """Outputs in a row of the batch."""
        return sum(output is not None for output in self._rows)

    @property
    def kv_cache(self) -> tuple[int, float]:
        """Bytes of the KV cache of the batch, and the fraction of its slots that hold a token."""
        if self._batch is None:
            return 0, 0.0
        slots = self._batch.cache.slots
        used = sum(output.num_cached for output in self._rows if output is not None)
        return self._cache_bytes(len(self._rows), slots), used / (len(self._rows) * slots)

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of the retained prefixes."""
        return self._prefix_cache.nbytes

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        detokenize: bool = False,
        prefix: Prefix | None = None,
        retain_prefix: bool = False,
        routing: bool = False,
    ) -> list[Output]:
        """Queue a prompt.

        Args:
            token_ids: The prompt.
            params: Its sampling parameters.
            seed: Used if `params.seed` is None.
            detokenize: Decode incrementally, for `Output.new_text`.
            prefix: Keys and values of an earlier output to reuse instead of those in the prefix cache.
            retain_prefix: Keep those of the first output as its `prefix` and in the prefix cache.
            routing: Record the experts of the output tokens as `Output.routing`; compiles another decode step.

        Returns:
            `params.n` outputs, which `step` extends.

        Raises:
            DSMoEError: Prompt and output exceed the context or the KV cache, or text needs a tokenizer.
        """
        length = f"a prompt of {len(token_ids)} tokens and max_new_tokens {params.max_new_tokens}"
        if len(token_ids) + params.max_new_tokens > self._context:
            raise DSMoEError(f"{length} exceed the context_length of {self._context}")
        detokenize = detokenize or bool(params.stop)
        if detokenize and self._tokenizer is None:
            raise DSMoEError("a stream or stop string needs a tokenizer, and this generator has none")
        seed = seed if params.seed is None else params.seed
        request = Request(tuple(token_ids), params, seed, prefix, retain_prefix, routing)
        size = self._cache_bytes(1, bucket(request.max_length))
        if self._max_cache_bytes is not None and size > self._max_cache_bytes:
            limit = f"at most {byte_size(self._max_cache_bytes)} are available"
            raise DSMoEError(f"{length} need {byte_size(size)} of KV cache, {limit}")
        tokenizer = self._tokenizer if detokenize else None
        detokenizer = lambda: None if tokenizer is None else Detokenizer(tokenizer.decode_stream(), params.stop)  # noqa: E731
        outputs = [Output(request, i, detokenizer()) for i in range(params.n)]
        scaling = self._config.rope_scaling
        if scaling is not None and scaling.type == "dynamic":
            self._static |= request.max_length > self._config.max_position_embeddings
        self._outputs[request] = outputs
        self._waiting.append(request)
        return outputs

    def step(self) -> None:
        """Prefill one chunk of waiting prompts, fill idle rows, decode one token in every active row."""
        with mesh_of(self._params):
            self._prefill_chunk()
            self._fill_rows()
            stepped = self._decode()
        self._collect_tokens(in_flight=1 if stepped else 0)
        if not self.busy:
            self._rows, self._batch, self._static = [], None, False

    def cancel(self, output: Output) -> None:
        """Finish an output with reason "abort" and release its row; a prompt of such outputs alone is not read on."""
        if not output.finished:
            output.finish("abort")
            self._finish(output)
            self._prefilled = collections.deque(one for one in self._prefilled if one.output is not output)
            canceled = lambda request: all(one.finished for one in self._outputs[request])  # noqa: E731
            if output.request in self._waiting and canceled(output.request):
                self._waiting.remove(output.request)
                del self._outputs[output.request]
            if self._admission is not None and all(map(canceled, self._admission.requests)):
                for request in self._admission.requests:
                    del self._outputs[request]
                self._admission = None

    def _prefill_chunk(self) -> None:
        """Prefill one chunk of the waiting prompts, if they fit."""
        if self._admission is None and not self._prefilled and self._waiting:
            self._admission = self._admit()
        if self._admission is None:
            return
        requests, prefill = self._admission.requests, self._admission.prefill
        self._prefiller.step(prefill)
        if not prefill.done:
            return
        assert prefill.cache is not None
        assert prefill.logits is not None
        if self._admission.retain:
            self._prefix_cache.add(Prefix(requests[0].token_ids, prefill.cache))
        self._admission = None
        for row, request in enumerate(requests):
            outputs = [one for one in self._outputs.pop(request) if not one.finished]
            self._prefilled.extend(_Prefilled(output, prefill.cache, prefill.logits, row) for output in outputs)

    def _admit(self) -> _Admission | None:
        """Take as many waiting requests as fit into one call; None if the first does not fit the batch.

        A long prompt is taken alone, and so is one whose beginning other waiting prompts share: they reuse it.
        """
        if not self._has_room(self._waiting[0]) or (self._static and any(self._rows)):
            return None
        first = self._waiting.popleft()
        prefix = self._find_prefix(first)
        known = 0 if prefix is None else prefix.match(first.token_ids)
        requests, rows, longest, new = [first], first.params.n, len(first.token_ids), len(first.token_ids) - known
        retain = self._is_shared(first, known)
        while self._waiting and not retain:
            other = self._waiting[0]
            known = 0 if prefix is None else prefix.match(other.token_ids)
            rows, longest = rows + other.params.n, max(longest, len(other.token_ids))
            new = max(new, len(other.token_ids) - known)
            tokens = power_of_two(len(requests) + 1) * bucket(new)
            fits = rows <= self._max_rows - sum(row is not None for row in self._rows)
            if not fits or not (self._static or (tokens <= self._chunk and self._find_prefix(other) is prefix)):
                break
            if prefix is not None and not self._fits_prefill(len(requests) + 1, longest):
                break
            requests.append(self._waiting.popleft())
        prefill = self._prefiller.start([one.token_ids for one in requests], prefix, whole=self._static)
        for request, reused in zip(requests, prefill.num_cached, strict=True):
            for output in self._outputs[request]:
                output.num_reused = reused
        return _Admission(requests, prefill, retain)

    def _find_prefix(self, request: Request) -> Prefix | None:
        """Return cached keys and values of the beginning of a prompt; dynamic NTK rotates keys for one batch only."""
        if self._static:
            return None
        prefix = request.prefix or self._prefiller.find_prefix(request.token_ids)
        return prefix if prefix is not None and prefix.match(request.token_ids) else None

    def _is_shared(self, request: Request, known: int) -> bool:
        """Return whether a waiting prompt shares enough tokens beyond the cached ones."""
        if self._static or not self._prefix_cache.max_bytes:
            return False
        shared = request.token_ids[: known + MIN_SHARED]
        waiting = itertools.islice(self._waiting, _SHARING_WINDOW)
        return len(shared) == known + MIN_SHARED and any(one.token_ids[: len(shared)] == shared for one in waiting)

    def _fits_prefill(self, rows: int, longest: int) -> bool:
        """Return whether prompts with a prefix need no more cache during prefill than one of the longest context."""
        size = self._cache_bytes(power_of_two(rows), bucket(longest))
        return self._max_cache_bytes is None or size <= self._cache_bytes(1, bucket(self._context))

    def _fill_rows(self) -> None:
        """Insert prefilled prompts into idle rows and sample the first token of each."""
        while self._prefilled and self._has_room(self._prefilled[0].output.request):
            ready = self._prefilled.popleft()
            self._grow(ready)
            row, output, request = self._rows.index(None), ready.output, ready.output.request
            assert self._batch is not None
            sampler = Sampler.of([(request.params, request.seed, output.index)], self._config.vocab_size)
            penalty_row = None if self._batch.penalties is None else _penalty_row(request)
            sampled, self._batch = programs.insert(
                self._num_logprobs([output]), self._take_batch(), self._token, np.int32(row), ready.cache, ready.logits,
                np.int32(ready.row), sampler, penalty_row,
            )  # fmt: skip
            self._rows[row], self._token, self._sampler_stale = output, sampled.token, True
            output.num_sampled = 1
            self._in_flight.append((sampled, [(row, 0, output)]))
            if output.num_sampled == request.params.max_new_tokens:
                self._release(output)

    def _has_room(self, request: Request) -> bool:
        """Return whether one more row fits into batch and memory; the first one always does."""
        active = [output for output in self._rows if output is not None]
        return not active or (len(active) < self._max_rows and self._fits_memory(len(active) + 1, request, active))

    def _fits_memory(self, rows: int, request: Request, active: Sequence[Output]) -> bool:
        """Return whether the cache of so many rows stays within its bound until all outputs are finished."""
        longest = bucket(max(one.max_length for one in (request, *(output.request for output in active))))
        rows = max(min(power_of_two(rows), self._max_rows), len(self._rows))
        return self._max_cache_bytes is None or self._cache_bytes(rows, longest) <= self._max_cache_bytes

    def _grow(self, ready: _Prefilled) -> None:
        """Resize the batch for one more row and, if memory allows, for the waiting ones."""
        active = [output for output in self._rows if output is not None]
        request = ready.output.request
        rows = len(active) + 1 + len(self._prefilled) + sum(request.params.n for request in self._waiting)
        while rows > len(active) + 1 and not self._fits_memory(rows, request, active):
            rows = power_of_two(rows) // 2
        lengths = [a.num_cached + _lookahead(a) for a in active]
        length = max(len(request.token_ids) + _lookahead(ready.output), *lengths, 0)
        max_length = max(bucket(length), ready.cache.slots, self._batch.cache.slots if self._batch else 0)
        self._resize(max(min(power_of_two(rows), self._max_rows), len(self._rows)), max_length)
        if request.params.adjusts_logits and self._batch is not None and self._batch.penalties is None:
            penalties = PenaltyState.empty(len(self._rows), self._config.vocab_size)
            self._batch = self._batch._replace(penalties=penalties)

    def _resize(self, rows: int, max_length: int) -> None:
        """Copy the batch into a new shape."""
        size = self._cache_bytes(rows, max_length)
        if size > self.stats.cache_bytes:
            self.stats.cache_bytes = size
            _log.info("KV cache: %d × %d tokens, %s", rows, max_length, byte_size(size))
        if self._batch is None:
            self._batch = Batch(programs.empty(self._config, rows, max_length, self._dtype), None)
            self._rows, self._token = [None] * rows, np.zeros(rows, np.int32)
        elif (rows, max_length) != (len(self._rows), self._batch.cache.slots):
            old = np.minimum(np.arange(rows, dtype=np.int32), len(self._rows) - 1)
            self._token, self._batch = programs.gather_rows(max_length, self._batch, self._token, old)
            self._rows += [None] * (rows - len(self._rows))
        else:
            return
        self._sampler_stale = True

    def _take_batch(self) -> Batch:
        """Return the batch for donation; an interrupted call loses it."""
        batch, self._batch = self._batch, None
        assert batch is not None
        return batch

    def _release(self, output: Output) -> None:
        """Make a row idle; those of a static batch only once all are finished."""
        if output not in self._rows or self._batch is None:
            return
        row = self._rows.index(output)
        # Keys rotated by dynamic NTK are valid for their batch only.
        if output.request.retain_prefix and output.index == 0 and output.prefix is None and not self._static:
            max_length = min(bucket(output.num_cached), self._batch.cache.slots)
            place = np.array([row], np.int32), np.array([output.num_cached], np.int32)
            cache = programs.copy_rows(max_length, self._batch.cache, *place)
            output.prefix = Prefix((), cache)  # `_finish` adds the tokens
        if not self._static:
            self._rows[row] = None
        elif all(one is None or one.finished for one in self._rows):
            self._rows = [None] * len(self._rows)
        self._sampler_stale = True

    def _decode(self) -> bool:
        """Dispatch one decode step; return False if no row is active."""
        active = [(row, output) for row, output in enumerate(self._rows) if output is not None]
        if not active or self._batch is None:
            return False
        if max(output.num_cached for _, output in active) + 1 > self._batch.cache.slots:
            self._resize(len(self._rows), bucket(max(output.num_cached + _lookahead(output) for _, output in active)))
        if self._sampler_stale:
            rows = [(None, 0, 0) if o is None else (o.request.params, o.request.seed, o.index) for o in self._rows]
            self._sampler, self._sampler_stale = Sampler.of(rows, self._config.vocab_size), False
        mask = np.array([output is not None for output in self._rows])
        num_sampled = np.array([0 if output is None else output.num_sampled for output in self._rows], np.int32)
        outputs = [output for _, output in active]
        sampled, self._batch = programs.step(
            self._graph, self._num_logprobs(outputs), self._params, self._take_batch(),
            self._token, mask, self._sampler, num_sampled, routing=any(one.request.routing for one in outputs),
        )  # fmt: skip
        self._token = sampled.token
        self.stats.steps += 1
        self.stats.row_steps += len(self._rows)
        self.stats.active_row_steps += len(active)
        self._in_flight.append((sampled, [(row, row, output) for row, output in active]))
        for _, output in active:
            output.num_sampled += 1
            if output.num_sampled == output.request.params.max_new_tokens:
                self._release(output)
        return True

    def _collect_tokens(self, in_flight: int) -> None:
        """Read back the sampled tokens of all but the newest `in_flight` calls."""
        while len(self._in_flight) > in_flight:
            sampled, rows = self._in_flight.popleft()
            tokens, logprobs, experts = jax.device_get((sampled.token, sampled.logprobs, sampled.experts))
            for row, index, output in rows:
                if not output.finished:
                    if experts is not None and output.request.routing:
                        output.routing.append(Experts(*(values[:, row] for values in experts)))
                    output.append(int(tokens[row]), _token_logprob(output, logprobs, index), self._eos)
                    if output.finished:
                        self._finish(output)

    def _finish(self, output: Output) -> None:
        self._release(output)
        if output.prefix is not None:
            output.prefix = output.prefix._replace(token_ids=(*output.request.token_ids, *output.token_ids))
            self._prefix_cache.add(output.prefix)

    def _cache_bytes(self, rows: int, max_length: int) -> int:
        return cache_bytes(self._config, rows, max_length, dtype=self._dtype, mesh=self._mesh)

    def _num_logprobs(self, outputs: Sequence[Output]) -> int | None:
        """Return how many log-probabilities to compute; only three values, as each compiles a program."""
        requested = [one for output in outputs if (one := output.request.params.logprobs) is not None]
        return min(_TOP_LOGPROBS, self._config.vocab_size) if any(requested) else 0 if requested else None


def _penalty_row(request: Request) -> tuple[Any, ...]:
    """Return the arguments of `PenaltyState.reset_row`, the prompt padded."""
    ids = np.zeros(bucket(len(request.token_ids)), np.int32)
    ids[: len(request.token_ids)] = request.token_ids
    return ids, np.int32(len(request.token_ids)), *penalty_arrays(request.params)


def _lookahead(output: Output) -> int:
    """Return how many more tokens of an output to allocate."""
    return max(1, min(output.request.params.max_new_tokens - output.num_sampled, _LOOKAHEAD))


def _token_logprob(output: Output, logprobs: Any, index: int) -> TokenLogprob | None:
    count = output.request.params.logprobs
    if count is None or logprobs is None:
        return None
    top = zip(logprobs.top_ids[index][:count].tolist(), logprobs.top[index][:count].tolist(), strict=True)
    return TokenLogprob(float(logprobs.token[index]), dict(top))
