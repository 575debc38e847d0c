"""The jitted functions of generation. Start at `prefill`, `extend`, `insert` and `step`.

Lengths are padded to buckets (`bucket`) and batch sizes to powers of two, so that few programs are compiled. A `Batch`
has R rows; idle rows are not routed, and their cache does not grow.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate.sampling import Logprobs, PenaltyState, Sampler, log_probabilities, sample_tokens
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import merge
from dsmoe_jax.sharding import constrain


class Batch(NamedTuple):
    """State of R rows, donated to `step`; `penalties` is None while no request has any."""

    cache: KVCache
    penalties: PenaltyState | None


class Experts(NamedTuple):
    """The top-k experts of a token in the L MoE layers, and the weights of their outputs."""

    ids: Int[Array, "L *R K"]
    weights: Float[Array, "L *R K"]


class SampledTokens(NamedTuple):
    """The newest token of each row; not in `Batch`, which is donated while the host reads the tokens."""

    token: Int[Array, "R"]
    logprobs: Logprobs | None  # if any request has `logprobs`
    experts: Experts | None = None  # of the token before, if any request has `routing`


def bucket(length: int) -> int:
    """Round up to 2ᵏ or 1.5·2ᵏ, at least 16: two programs per octave, at most a third padding."""
    power = 16
    while power < length:
        if length <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def power_of_two(count: int) -> int:
    """Round up to a power of two."""
    return 1 << max(count - 1, 0).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(
    graph: Any,
    max_length: int,
    dtype: Any,
    params: dict[str, Any],
    token_ids: Int[Array, "P T"],
    counts: Int[Array, "P"],
) -> tuple[Float[Array, "P V"], KVCache]:
    """Run the model on right-padded prompts or their first chunks; return logits of the last tokens and the cache."""
    model = merge(graph, params)
    cache = KVCache.empty(model.config, len(token_ids), max_length, dtype)
    # Dynamic NTK depends on the longest prompt of the batch, as in transformers, not on the bucket.
    return _prefill(model, cache, token_ids, counts, counts.max(), first=True)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    graph: Any, params: dict[str, Any], cache: KVCache, token_ids: Int[Array, "P T"], counts: Int[Array, "P"]
) -> tuple[Float[Array, "P V"], KVCache]:
    """Run the model on the next chunks of prompts; otherwise as `prefill`."""
    model = merge(graph, params)
    return _prefill(model, cache, token_ids, counts, (cache.lengths + counts).max(), first=False)


def _prefill(
    model: Any, cache: KVCache, token_ids: Array, counts: Array, rope_length: Array, *, first: bool
) -> tuple[Float[Array, "P V"], KVCache]:
    valid = jnp.arange(token_ids.shape[1])[None, :] < counts[:, None]
    hidden = model.hidden(token_ids, valid, cache=cache.placed(), prefill=first, rope_length=rope_length)
    last = jnp.take_along_axis(hidden.last_hidden_state, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    assert hidden.cache is not None
    return model.logits(last), hidden.cache.placed()


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="routing", donate_argnums=3)
def step(
    graph: Any,
    top: int | None,
    params: dict[str, Any],
    batch: Batch,
    token: Int[Array, "R"],
    active: Bool[Array, "R"],
    sampler: Sampler | None,
    num_sampled: Int[Array, "R"],
    *,
    routing: bool = False,
) -> tuple[SampledTokens, Batch]:
    """Decode one token per active row from `token`, the newest; the batch is donated, no sampler means greedy.

    `num_sampled` counts the tokens sampled before. `top` log-probabilities are computed, none at all if None. With
    `routing` the experts of `token` are returned, too.
    """
    model = merge(graph, params)
    cache = batch.cache
    longest = jnp.where(active, cache.lengths, 0).max() + 1
    hidden = model.hidden(token[:, None], active[:, None], cache=cache.placed(), rope_length=longest)
    assert hidden.cache is not None
    logits = model.logits(hidden.last_hidden_state[:, 0])
    sampled, penalties = _sample(logits, batch.penalties, top, active, sampler, num_sampled)
    if routing and hidden.routing:
        layers = hidden.routing.values()
        parts = (jnp.stack([one.ids[:, 0] for one in layers]), jnp.stack([one.weights[:, 0] for one in layers]))
        sampled = sampled._replace(experts=Experts(*(constrain(part, (None,) * 3) for part in parts)))
    return sampled, Batch(hidden.cache.placed(), penalties)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    top: int | None,
    batch: Batch,
    token: Int[Array, "R"],
    row: Int[Array, ""],
    prompt_cache: KVCache,
    logits: Float[Array, "P V"],
    prompt_row: Int[Array, ""],
    sampler: Sampler | None,
    penalty_row: tuple[Array, ...] | None,
) -> tuple[SampledTokens, Batch]:
    """Insert row `prompt_row` of a prefilled cache into an idle row, sample its first token, and donate the batch."""
    one, cache = row[None], batch.cache.put(row, prompt_cache, prompt_row)
    penalties = batch.penalties
    penalties = None if penalties is None or penalty_row is None else penalties.reset_row(row, *penalty_row)
    new = None if penalties is None else penalties.take(one)
    num_sampled, active = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    sampled, new = _sample(logits[prompt_row][None], new, top, active, sampler, num_sampled)
    if penalties is not None and new is not None:
        penalties = jax.tree.map(lambda rows, value: rows.at[row].set(value[0]), penalties, new)
    return SampledTokens(token.at[row].set(sampled.token[0]), sampled.logprobs), Batch(cache.placed(), penalties)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(config: ModelConfig, rows: int, max_length: int, dtype: Any) -> KVCache:
    """Return an empty cache."""
    return KVCache.empty(config, rows, max_length, dtype).placed()


@functools.partial(jax.jit, static_argnums=0)
def copy_rows(max_length: int, cache: KVCache, rows: Int[Array, "N"], lengths: Int[Array, "N"]) -> KVCache:
    """Copy the first `lengths` tokens of rows into a new cache of `max_length` tokens."""
    return cache.rows(rows, max_length)._replace(lengths=lengths).placed()


@functools.partial(jax.jit, static_argnums=0)
def gather_rows(max_length: int, batch: Batch, token: Int[Array, "R"], rows: Int[Array, "N"]) -> tuple[Array, Batch]:
    """Return newest tokens and state of `rows`, with a cache of `max_length` tokens."""
    penalties = None if batch.penalties is None else batch.penalties.take(rows)
    return constrain(token[rows], (None,)), Batch(batch.cache.rows(rows, max_length).placed(), penalties)


def _sample(
    logits: Float[Array, "R V"],
    penalties: PenaltyState | None,
    top: int | None,
    active: Bool[Array, "R"],
    sampler: Sampler | None,
    num_sampled: Int[Array, "R"],
) -> tuple[SampledTokens, PenaltyState | None]:
    # Replicated: every device and process needs the tokens.
    token = constrain(sample_tokens(logits, sampler, penalties, num_sampled), (None,))
    logprobs = None if top is None else log_probabilities(logits, token, top)
    logprobs = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), logprobs)
    return SampledTokens(token, logprobs), None if penalties is None else penalties.add_tokens(token, active)
