"""`Engine`: requests in, answers out, many at a time (continuous batching). Read `Engine.step`.

A batch has R rows. Between two decode steps free rows are filled with requests, first come first served: their prompts
are read in pieces of at most `prefill_chunk` tokens, one piece between two steps, so that nobody who is being answered
waits longer than that. A row is free again as soon as its answer has ended. The device is always one step ahead of the
host: a step is asked for before the last one's tokens are looked at, and what it chose for a row that had ended is
thrown away.

Every decision follows from the requests and the tokens alone, so that all processes of a cluster take the same ones.
"""

import collections
import dataclasses
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
from dsmoe_jax.generate.answer import Answer, Prefix, Request, TokenLogprob
from dsmoe_jax.generate.memory_plan import cache_bytes
from dsmoe_jax.generate.programs import Batch, Chosen, bucket, power_of_two
from dsmoe_jax.generate.sampling import Sampler, Tally, adjustments
from dsmoe_jax.generate.sampling_params import SamplingParams
from dsmoe_jax.generate.text import TextStream
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.sharding import mesh_of
from dsmoe_jax.text.tokenizer import Tokenizer

_LOOK_AHEAD: Final = 256  # tokens of an answer that the cache has room for at once; longer ones make it grow
_TOP: Final = 20  # log-probabilities that are computed where anybody asks for some

_log = logging.getLogger("dsmoe_jax")


@dataclasses.dataclass
class Stats:
    """What an engine has done."""

    steps: int = 0  # decode steps
    row_steps: int = 0  # rows of all steps, free ones included
    busy_row_steps: int = 0
    prompt_tokens: int = 0  # that were read
    reused_tokens: int = 0  # that need not be read, from a prefix
    cache_bytes: int = 0  # the most that the batch's cache took

    @property
    def free_rows(self) -> float:
        """The share of rows that did nothing."""
        return 1 - self.busy_row_steps / max(self.row_steps, 1)


@dataclasses.dataclass
class _Reading:
    """Prompts that are being read: several short ones at once, or a long one piece by piece."""

    requests: list[Request]
    cache: KVCache | None = None
    done: int = 0  # tokens of the (only) prompt that the cache holds
    slots: int = 0


class _Ready(NamedTuple):
    """An answer whose prompt has been read and which has no row yet."""

    answer: Answer
    cache: KVCache
    logits: Array
    row: int


class Engine:
    """Answers requests until none is left: `submit`, then `step` while `busy`. Not for several threads."""

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
        most_cache_bytes: int | None = None,
    ):
        """An engine of at most `max_batch_size` rows whose cache takes at most so many bytes (None: as they need)."""
        self._graph, self._params, self._config = graph, params, config
        self._context, self._tokenizer, self._eos = context_length, tokenizer, eos_token_ids
        self._most_rows, self._chunk = max_batch_size, prefill_chunk
        self._dtype, self._budget = cache_dtype, most_cache_bytes
        self._mesh = getattr(jax.tree.leaves(dict(params))[0].sharding, "mesh", None)
        self._together = False  # dynamic NTK past what was trained: what came together is answered together
        self._waiting: collections.deque[Request] = collections.deque()
        self._answers: dict[Request, list[Answer]] = {}
        self._reading: _Reading | None = None
        self._ready: collections.deque[_Ready] = collections.deque()
        self._rows: list[Answer | None] = []
        self._batch: Batch | None = None
        self._token: Any = None  # [R], the newest of each row
        self._sampler: Sampler | None = None
        self._changed = True  # the rows, since the sampler was made
        self._unread: collections.deque[tuple[Chosen, list[tuple[int, int, Answer]]]] = collections.deque()
        self.stats = Stats()

    # --- for the caller ---

    @property
    def busy(self) -> bool:
        """Whether any answer is unfinished."""
        return bool(self._waiting or self._reading or self._ready or self._unread or any(self._rows))

    def submit(
        self,
        ids: Sequence[int],
        asked: SamplingParams,
        *,
        seed: int = 0,
        text: bool = False,
        prefix: Prefix | None = None,
        keep: bool = False,
    ) -> list[Answer]:
        """Queue a prompt of token ids; returns its `asked.n` answers, which fill as `step` is called.

        `seed` counts where `asked.seed` is None. With `text` answers give out text as it comes. Raises `ValueError`
        for a prompt that with its answer exceeds the context or the memory for the cache.
        """
        if len(ids) + asked.max_new_tokens > self._context:
            raise DSMoEError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {asked.max_new_tokens} "
                f"exceed the context_length of {self._context}"
            )
        if (text or asked.stop) and self._tokenizer is None:
            raise DSMoEError("text or a stop string needs a tokenizer, and this generator has none")
        request = Request(tuple(ids), asked, seed if asked.seed is None else asked.seed, prefix, keep)
        need = self._bytes(1, bucket(request.most))
        if self._budget is not None and need > self._budget:
            raise DSMoEError(
                f"a prompt of {len(ids)} tokens and max_new_tokens {asked.max_new_tokens} need {need / 1e9:.3g} GB "
                f"of key-value cache, and there are {self._budget / 1e9:.3g} GB"
            )
        answers = [Answer(request, i, self._stream(asked, text)) for i in range(asked.n)]
        scaling = self._config.rope_scaling
        if scaling is not None and scaling.type == "dynamic":
            self._together |= request.most > self._config.max_position_embeddings
        self._answers[request] = answers
        self._waiting.append(request)
        return answers

    def step(self) -> None:
        """Read one piece of the prompts that wait, fill free rows, go one token further in all others."""
        with mesh_of(self._params):
            self._read_prompts()
            self._fill_rows()
            stepped = self._decode()
        self._look(unread=1 if stepped else 0)
        if not self.busy:
            self._rows, self._batch, self._together = [], None, False

    def cancel(self, answer: Answer) -> None:
        """End an answer where it stands; its row is free for others."""
        if not answer.done:
            answer.finish("cancelled")
            self._ended(answer)
            self._ready = collections.deque(one for one in self._ready if one.answer is not answer)
            if answer.request in self._waiting and all(one.done for one in self._answers[answer.request]):
                self._waiting.remove(answer.request)
                del self._answers[answer.request]

    # --- prompts ---

    def _read_prompts(self) -> None:
        """One call of the model over prompts, if there are any to read and a row for them."""
        if self._reading is None and not self._ready and self._waiting:
            self._reading = self._next_prompts()
        if (reading := self._reading) is None:
            return
        piece = [r.ids[reading.done :][: self._piece(reading)] for r in reading.requests]
        counts = np.array([len(ids) for ids in piece], np.int32)
        padded = np.zeros((power_of_two(len(piece)), bucket(int(counts.max()))), np.int32)
        for row, ids in zip(padded, piece, strict=False):
            row[: len(ids)] = ids
        counts = np.pad(counts, (0, len(padded) - len(counts)))
        if reading.cache is None:
            slots = max(reading.slots, padded.shape[1])
            logits, cache = programs.prefill(self._graph, slots, self._dtype, self._params, padded, counts)
        else:
            logits, cache = programs.extend(self._graph, self._params, reading.cache, padded, counts)
        self.stats.prompt_tokens += int(counts.sum())
        reading.cache, reading.done = cache, reading.done + int(counts[0])
        if len(reading.requests) > 1 or reading.done == len(reading.requests[0].ids):
            self._reading = None
            for row, request in enumerate(reading.requests):
                waiting = [one for one in self._answers.pop(request) if not one.done]
                self._ready.extend(_Ready(answer, cache, logits, row) for answer in waiting)

    def _next_prompts(self) -> _Reading | None:
        """The first that wait, as many as may be read at once; None if there is no row for them."""
        if not self._has_room(self._waiting[0]) or (self._together and any(self._rows)):
            return None
        first = self._waiting.popleft()
        reading = _Reading([first])
        if not self._together and (first.prefix is not None or len(first.ids) > self._chunk):
            self._begin_long(reading)
            return reading
        rows, longest = first.asked.n, len(first.ids)
        while self._waiting:
            other = self._waiting[0]
            rows, longest = rows + other.asked.n, max(longest, len(other.ids))
            tokens = power_of_two(len(reading.requests) + 1) * bucket(longest)
            fits = rows <= self._most_rows - sum(row is not None for row in self._rows)
            if not fits or not (self._together or (tokens <= self._chunk and other.prefix is None)):
                break
            reading.requests.append(self._waiting.popleft())
        return reading

    def _begin_long(self, reading: _Reading) -> None:
        """A prompt in pieces: room for all of it, and what of it is known already."""
        (request,) = reading.requests
        known = 0 if request.prefix is None else request.prefix.shared_with(request.ids)
        rest = (len(request.ids) - known - 1) % self._chunk + 1
        reading.slots = bucket(len(request.ids) - rest + bucket(rest))
        if known and request.prefix is not None:
            length = np.int32(known)
            reading.cache = programs.copy_row(reading.slots, request.prefix.cache, np.int32(0), length)
            reading.done = known
            self.stats.reused_tokens += known

    def _piece(self, reading: _Reading) -> int:
        return max(len(request.ids) for request in reading.requests) if self._together else self._chunk

    # --- rows ---

    def _fill_rows(self) -> None:
        """Prompts that were read go into free rows, each with its first token."""
        while self._ready and self._has_room(self._ready[0].answer.request):
            ready = self._ready.popleft()
            self._grow(ready)
            row, answer, asked = self._rows.index(None), ready.answer, ready.answer.request.asked
            assert self._batch is not None
            one = (asked, answer.request.seed, answer.index)
            tally_row = None if self._batch.tally is None else _tally_row(answer.request)
            chosen, self._batch = programs.insert(
                self._top([answer]), self._give_away(), self._token, np.int32(row), ready.cache, ready.logits,
                np.int32(ready.row), Sampler.of([one], self._config.vocab_size), tally_row,
            )  # fmt: skip
            self._rows[row], self._token, self._changed = answer, chosen.token, True
            answer.chosen = 1
            self._unread.append((chosen, [(row, 0, answer)]))
            if answer.chosen == asked.max_new_tokens:
                self._release(answer)

    def _has_room(self, request: Request) -> bool:
        """Whether one more row may be taken, by number and by memory; one alone always may."""
        busy = [answer for answer in self._rows if answer is not None]
        return not busy or (len(busy) < self._most_rows and self._affordable(len(busy) + 1, request, busy))

    def _affordable(self, rows: int, request: Request, busy: Sequence[Answer]) -> bool:
        """Whether the cache of so many rows stays within its bounds to the end of all answers."""
        slots = bucket(max(one.most for one in (request, *(answer.request for answer in busy))))
        rows = max(min(power_of_two(rows), self._most_rows), len(self._rows))
        return self._budget is None or self._bytes(rows, slots) <= self._budget

    def _grow(self, ready: _Ready) -> None:
        """Make the batch large enough for one more row, and for those that will soon follow."""
        busy = [answer for answer in self._rows if answer is not None]
        request = ready.answer.request
        rows = len(busy) + 1 + len(self._ready) + sum(request.asked.n for request in self._waiting)
        while rows > len(busy) + 1 and not self._affordable(rows, request, busy):
            rows = power_of_two(rows) // 2
        length = max([len(request.ids) + _ahead(ready.answer), *(a.held + _ahead(a) for a in busy)])
        slots = max(bucket(length), ready.cache.slots, self._batch.cache.slots if self._batch else 0)
        self._resize(max(min(power_of_two(rows), self._most_rows), len(self._rows)), slots)
        if request.asked.adjusts_logits and self._batch is not None and self._batch.tally is None:
            self._batch = self._batch._replace(tally=Tally.empty(len(self._rows), self._config.vocab_size))

    def _resize(self, rows: int, slots: int) -> None:
        """The batch with so many rows and slots; what it holds is moved."""
        taken = self._bytes(rows, slots)
        if taken > self.stats.cache_bytes:
            self.stats.cache_bytes = taken
            _log.info("key-value cache: %d rows of %d tokens take %.3g GB", rows, slots, taken / 1e9)
        if self._batch is None:
            self._batch = Batch(programs.empty(self._config, rows, slots, self._dtype), None)
            self._rows, self._token = [None] * rows, np.zeros(rows, np.int32)
        elif (rows, slots) != (len(self._rows), self._batch.cache.slots):
            order = [min(row, len(self._rows) - 1) for row in range(rows)]
            self._token, self._batch = programs.move(slots, self._batch, self._token, np.array(order, np.int32))
            self._rows += [None] * (rows - len(self._rows))
        else:
            return
        self._changed = True

    def _give_away(self) -> Batch:
        """The batch, for a program that updates it in place; should that be interrupted, it is gone."""
        batch, self._batch = self._batch, None
        assert batch is not None
        return batch

    def _release(self, answer: Answer) -> None:
        """Its row is free; in what is answered together, only once all have ended."""
        if answer not in self._rows or self._batch is None:
            return
        row = self._rows.index(answer)
        # Keys that dynamic NTK has stretched hold for their own length alone: nobody can go on from them.
        if answer.request.keep and answer.index == 0 and answer.prefix is None and not self._together:
            slots = self._batch.cache.slots
            cache = programs.copy_row(slots, self._batch.cache, np.int32(row), np.int32(answer.held))
            answer.prefix = Prefix((), cache)  # its tokens are known once all have been looked at
        if not self._together:
            self._rows[row] = None
        elif all(one is None or one.done for one in self._rows):
            self._rows = [None] * len(self._rows)
        self._changed = True

    # --- tokens ---

    def _decode(self) -> bool:
        """Ask for one token more in every row; False if there is none."""
        busy = [(row, answer) for row, answer in enumerate(self._rows) if answer is not None]
        if not busy or self._batch is None:
            return False
        if max(answer.held for _, answer in busy) + 1 > self._batch.cache.slots:
            self._resize(len(self._rows), bucket(max(answer.held + _ahead(answer) for _, answer in busy)))
        if self._changed:
            rows = [(None, 0, 0) if a is None else (a.request.asked, a.request.seed, a.index) for a in self._rows]
            self._sampler, self._changed = Sampler.of(rows, self._config.vocab_size), False
        active = np.array([answer is not None for answer in self._rows])
        drawn = np.array([0 if answer is None else answer.chosen for answer in self._rows], np.int32)
        chosen, self._batch = programs.step(
            self._graph, self._top([answer for _, answer in busy]), self._params, self._give_away(), self._token,
            active, self._sampler, drawn,
        )  # fmt: skip
        self._token = chosen.token
        self.stats.steps += 1
        self.stats.row_steps += len(self._rows)
        self.stats.busy_row_steps += len(busy)
        self._unread.append((chosen, [(row, row, answer) for row, answer in busy]))
        for _, answer in busy:
            answer.chosen += 1
            if answer.chosen == answer.request.asked.max_new_tokens:
                self._release(answer)
        return True

    def _look(self, unread: int) -> None:
        """Take what the device has chosen, but for the newest `unread` calls."""
        while len(self._unread) > unread:
            chosen, rows = self._unread.popleft()
            tokens, logprobs = jax.device_get((chosen.token, chosen.logprobs))
            for row, index, answer in rows:
                if not answer.done:
                    answer.take(int(tokens[row]), _logprob(answer, logprobs, index), self._eos)
                    if answer.done:
                        self._ended(answer)

    def _ended(self, answer: Answer) -> None:
        self._release(answer)
        if answer.prefix is not None:
            answer.prefix = answer.prefix._replace(ids=(*answer.request.ids, *answer.tokens))

    # --- small things ---

    def _bytes(self, rows: int, slots: int) -> int:
        return cache_bytes(self._config, rows, slots, dtype=self._dtype, mesh=self._mesh)

    def _stream(self, asked: SamplingParams, wanted: bool) -> TextStream | None:
        if not (wanted or asked.stop) or self._tokenizer is None:
            return None
        return TextStream(self._tokenizer.decode_stream(), asked.stop)

    def _top(self, answers: Sequence[Answer]) -> int | None:
        """How many log-probabilities a call reports: few values, as each is a program."""
        wanted = [answer.request.asked.logprobs for answer in answers]
        known = [most for most in wanted if most is not None]
        return min(_TOP, self._config.vocab_size) if any(known) else 0 if known else None


def _tally_row(request: Request) -> tuple[Any, ...]:
    """The arguments of `Tally.with_row`, the prompt padded."""
    ids = np.zeros(bucket(len(request.ids)), np.int32)
    ids[: len(request.ids)] = request.ids
    return ids, np.int32(len(request.ids)), *adjustments(request.asked)


def _ahead(answer: Answer) -> int:
    """How many tokens more an answer should find room for."""
    return max(1, min(answer.request.asked.max_new_tokens - answer.chosen, _LOOK_AHEAD))


def _logprob(answer: Answer, logprobs: Any, index: int) -> TokenLogprob | None:
    wanted = answer.request.asked.logprobs
    if wanted is None or logprobs is None:
        return None
    top = zip(logprobs.top_ids[index][:wanted].tolist(), logprobs.top[index][:wanted].tolist(), strict=True)
    return TokenLogprob(float(logprobs.token[index]), dict(top))
