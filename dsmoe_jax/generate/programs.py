"""What runs on the device: read prompts, put a row into the batch, go one token further, move rows.

Shapes are static: lengths come in buckets (`bucket`), rows in powers of two, so that few programs serve all requests.
A batch is a `Batch` of R rows, of which some may be free: a free row visits no expert and its cache does not grow.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate.sampling import Logprobs, Sampler, Tally, choose, log_probabilities
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import merge
from dsmoe_jax.sharding import constrain


class Batch(NamedTuple):
    """R rows that are being answered: what `step` takes and gives, updated in place."""

    cache: KVCache
    tally: Tally | None  # what penalties and biases need; None while nobody asks for them


class Chosen(NamedTuple):
    """The newest token of each row, and its log-probabilities if anybody asked. Not part of `Batch`: the host reads it
    while the next step runs.
    """

    token: Int[Array, "R"]
    logprobs: Logprobs | None


def bucket(length: int) -> int:
    """The next size of the form 2ᵏ or 1.5·2ᵏ, at least 16: two programs an octave, at most a third of it padding."""
    power = 16
    while power < length:
        if length <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(
    graph: Any, slots: int, dtype: Any, params: dict[str, Any], token_ids: Int[Array, "P T"], counts: Int[Array, "P"]
) -> tuple[Float[Array, "P V"], KVCache]:
    """Read prompts, or their first pieces, into a new cache; returns the logits after each one's last token."""
    model = merge(graph, params)
    cache = KVCache.empty(model.config, len(token_ids), slots, dtype)
    # Dynamic NTK goes by the longest prompt of the batch, as in transformers; the bucket is none of its business.
    return _read(model, cache, token_ids, counts, counts.max(), first=True)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    graph: Any, params: dict[str, Any], cache: KVCache, token_ids: Int[Array, "P T"], counts: Int[Array, "P"]
) -> tuple[Float[Array, "P V"], KVCache]:
    """Read the next pieces of prompts behind what their rows hold."""
    model = merge(graph, params)
    return _read(model, cache, token_ids, counts, (cache.lengths + counts).max(), first=False)


def _read(
    model: Any, cache: KVCache, token_ids: Array, counts: Array, rope_length: Array, *, first: bool
) -> tuple[Float[Array, "P V"], KVCache]:
    real = jnp.arange(token_ids.shape[1])[None, :] < counts[:, None]
    hidden = model.hidden(token_ids, real, cache=cache.placed(), prefill=first, rope_length=rope_length)
    last = jnp.take_along_axis(hidden.last_hidden_state, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    assert hidden.cache is not None
    return model.logits(last), hidden.cache.placed()


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step(
    graph: Any,
    top: int | None,
    params: dict[str, Any],
    batch: Batch,
    token: Int[Array, "R"],
    active: Bool[Array, "R"],
    sampler: Sampler | None,
    drawn: Int[Array, "R"],
) -> tuple[Chosen, Batch]:
    """One token further in every active row; `top` log-probabilities of each are reported, None: none at all."""
    model = merge(graph, params)
    cache = batch.cache
    longest = jnp.where(active, cache.lengths, 0).max() + 1
    hidden = model.hidden(token[:, None], active[:, None], cache=cache.placed(), rope_length=longest)
    assert hidden.cache is not None
    chosen, tally = _choose(model.logits(hidden.last_hidden_state[:, 0]), batch.tally, top, active, sampler, drawn)
    return chosen, Batch(hidden.cache.placed(), tally)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    top: int | None,
    batch: Batch,
    token: Int[Array, "R"],
    row: Int[Array, ""],
    piece: KVCache,
    logits: Float[Array, "P V"],
    piece_row: Int[Array, ""],
    sampler: Sampler | None,
    tally_row: tuple[Array, ...] | None,
) -> tuple[Chosen, Batch]:
    """Put a prompt that was read into a free row and choose its first token; `sampler` is that row's alone."""
    one, cache = row[None], batch.cache.put(row, piece, piece_row)
    tally = None if batch.tally is None or tally_row is None else batch.tally.with_row(row, *tally_row)
    own = None if tally is None else tally.rows(one)
    drawn, active = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    chosen, own = _choose(logits[piece_row][None], own, top, active, sampler, drawn)
    if tally is not None and own is not None:
        tally = jax.tree.map(lambda all_rows, mine: all_rows.at[row].set(mine[0]), tally, own)
    return Chosen(token.at[row].set(chosen.token[0]), chosen.logprobs), Batch(cache.placed(), tally)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(config: ModelConfig, rows: int, slots: int, dtype: Any) -> KVCache:
    """A cache of free rows."""
    return KVCache.empty(config, rows, slots, dtype).placed()


@functools.partial(jax.jit, static_argnums=0)
def copy_row(slots: int, cache: KVCache, row: Int[Array, ""], length: Int[Array, ""]) -> KVCache:
    """The first `length` tokens of one row as a cache of its own, with room for `slots`."""
    return cache.rows(row[None], slots)._replace(lengths=length[None]).placed()


@functools.partial(jax.jit, static_argnums=0)
def move(slots: int, batch: Batch, token: Int[Array, "R"], order: Int[Array, "N"]) -> tuple[Array, Batch]:
    """A batch of the rows `order`, with room for `slots` tokens each."""
    tally = None if batch.tally is None else batch.tally.rows(order)
    return constrain(token[order], (None,)), Batch(batch.cache.rows(order, slots).placed(), tally)


def _choose(
    logits: Float[Array, "R V"],
    tally: Tally | None,
    top: int | None,
    active: Bool[Array, "R"],
    sampler: Sampler | None,
    drawn: Int[Array, "R"],
) -> tuple[Chosen, Tally | None]:
    # Every device and every process learns what was chosen.
    token = constrain(choose(logits, sampler, tally, drawn), (None,))
    logprobs = None if top is None else log_probabilities(logits, token, top)
    logprobs = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), logprobs)
    return Chosen(token, logprobs), None if tally is None else tally.counted(token, active)
