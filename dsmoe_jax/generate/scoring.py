"""`score` and `perplexity`: `loglikelihood` and `loglikelihood_rolling` of EleutherAI's lm-evaluation-harness."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.programs import bucket, power_of_two
from dsmoe_jax.model import merge
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.sharding import mesh_of

Tokens = Sequence[int]

_CHUNK: Final = 128  # positions whose logits exist at once: 52 MB in fp32 at a vocabulary of 102400


class Score(NamedTuple):
    """Log-likelihood of one continuation.

    Attributes:
        logprob: Sum over its tokens, in nats.
        greedy: Whether every token is the most likely one.
        token_logprobs: One per token.
    """

    logprob: float
    greedy: bool
    token_logprobs: list[float]


class Perplexity(NamedTuple):
    """Perplexity of a text.

    Attributes:
        perplexity: exp(nll / num_tokens).
        nll: Negative log-likelihood of all predicted tokens, in nats.
        num_tokens: Predicted tokens.
        bits_per_byte: nll / (ln 2 · bytes of the text); None for token ids.
    """

    perplexity: float
    nll: float
    num_tokens: int
    bits_per_byte: float | None


def score(
    graph: Any,
    params: dict[str, Array],
    config: ModelConfig,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    progress: Meter = silent,
    **options: Any,
) -> list[Score]:
    """Return the log-likelihood of every (context, continuation) in order; `options` are those of `iter_scores`."""
    scores: dict[int, Score] = {}
    results = iter_scores(graph, params, config, pairs, **options)
    with progress("scoring", len(pairs)) as advance:
        for i, one in results:
            scores[i] = one
            advance(1)
    return [scores[i] for i in range(len(pairs))]


def iter_scores(
    graph: Any,
    params: dict[str, Array],
    config: ModelConfig,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    context_length: int,
    max_tokens: int = 2048,
) -> Iterator[tuple[int, Score]]:
    """Check the pairs at once, then yield index and log-likelihood of each (context, continuation) as it is computed.

    The last token of a continuation is predicted but not read: a pair fits if all but one token fit into the context.
    Results do not depend on the other pairs, except for rounding: under dynamic NTK, pairs beyond
    `max_position_embeddings` share a batch only with pairs of the same length.
    """
    for name, value in (("context_length", context_length), ("max_tokens", max_tokens)):
        if value < 1:
            raise DSMoEError(f"{name} must be at least 1, got {value}")
    checked = [_checked(i, pair, config.vocab_size, context_length) for i, pair in enumerate(pairs)]
    batches = _plan([pair.length for pair in checked], config, context_length, max_tokens)
    return _iter_batches(graph, params, checked, batches)


def _iter_batches(
    graph: Any, params: dict[str, Array], pairs: Sequence["_Pair"], batches: Sequence["_Batch"]
) -> Iterator[tuple[int, Score]]:
    results = (_run(graph, params, batch, [pairs[i] for i in batch.pairs]) for batch in batches)
    for batch, (logprobs, greedy) in zip(batches, _prefetch(results), strict=True):
        ends = np.cumsum([pairs[i].predicted for i in batch.pairs])
        logprobs, greedy = np.asarray(logprobs).ravel(), np.asarray(greedy).ravel()
        for i, end in zip(batch.pairs, ends.tolist(), strict=True):
            span = slice(end - pairs[i].predicted, end)
            tokens = logprobs[span].tolist()
            yield i, Score(math.fsum(tokens), bool(greedy[span].all()), tokens)


def perplexity(
    graph: Any,
    params: dict[str, Array],
    config: ModelConfig,
    tokens: Tokens,
    *,
    prefix: int | None,
    context_length: int,
    window: int | None = None,
    stride: int | None = None,
    text_bytes: int | None = None,
    **options: Any,
) -> Perplexity:
    """Return the perplexity of token ids, the first predicted from `prefix` unless None; `options` are for `score`."""
    window = min(context_length, config.max_position_embeddings) if window is None else window
    if window > context_length:
        raise DSMoEError(f"window must be at most context_length {context_length}, got {window}")
    windows = rolling_windows(tokens, prefix=prefix, window=window, stride=stride)
    if not windows:
        raise DSMoEError(f"no token to predict: tokens has length {len(tokens)} and prefix is {prefix}")
    if text_bytes is not None and text_bytes < 1:
        raise DSMoEError(f"text_bytes must be at least 1, got {text_bytes}")
    scores = score(graph, params, config, windows, context_length=context_length, **options)
    nll = -math.fsum(one.logprob for one in scores)
    predicted = sum(len(continuation) for _, continuation in windows)
    bits = None if text_bytes is None else nll / (math.log(2) * text_bytes)
    return Perplexity(math.exp(nll / predicted), nll, predicted, bits)


def rolling_windows(
    tokens: Tokens, *, prefix: int | None, window: int, stride: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Split a text into pairs (context, continuation) for `score`; every token is predicted once.

    The first window predicts `window` tokens from one; each later one predicts the next `stride` with as much context
    as fits into `window + 1` tokens, of which the last is not read. Same windows as lm-evaluation-harness
    (`get_rolling_token_windows`, `make_disjoint_window` in lm_eval/utils.py) with `max_seq_len = window` and
    `context_len = window - stride + 1`.
    """
    stride = window if stride is None else stride
    if window < 1:
        raise DSMoEError(f"window must be at least 1, got {window}")
    if not 1 <= stride <= window:
        raise DSMoEError(f"stride must be in [1, {window}], got {stride}")
    text = [*([] if prefix is None else [prefix]), *tokens]
    pairs, done, new = [], 1, window
    while done < len(text):
        end = min(done + new, len(text))
        pairs.append((text[max(0, end - window - 1) : done], text[done:end]))
        done, new = end, stride
    return pairs


class _Pair(NamedTuple):
    tokens: np.ndarray  # context and continuation
    predicted: int  # tokens of the continuation

    @property
    def length(self) -> int:
        """Tokens read by the model: all but the last."""
        return len(self.tokens) - 1


class _Batch(NamedTuple):
    rows: int  # a power of two; those beyond the pairs are idle
    length: int  # of each row, padding included
    pairs: list[int]  # indices


def _checked(index: int, pair: tuple[Tokens, Tokens], vocab_size: int, context_length: int) -> _Pair:
    if len(pair) != 2:
        raise DSMoEError(f"pair {index} must be (context, continuation), got {len(pair)} entries")
    try:
        context, continuation = map(np.asarray, pair)
    except ValueError:  # ragged
        raise DSMoEError(f"pair {index}: context and continuation must be flat lists of token ids") from None
    for name, ids in (("context", context), ("continuation", continuation)):
        if not ids.size:
            raise DSMoEError(f"pair {index}: the {name} is empty")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DSMoEError(f"pair {index}: the {name} must be token ids [T], got {ids.dtype} {list(ids.shape)}")
        for worst in (ids.min(), ids.max()):
            if not 0 <= worst < vocab_size:
                raise DSMoEError(f"pair {index}: {name} id {worst} is outside the vocabulary of {vocab_size}")
    if len(context) + len(continuation) - 1 > context_length:
        lengths = f"{len(context)} tokens of context and {len(continuation)} of continuation (the last is not read)"
        raise DSMoEError(f"pair {index}: {lengths} exceed the context_length of {context_length}")
    return _Pair(np.concatenate([context, continuation]).astype(np.int32), len(continuation))


def _plan(lengths: Sequence[int], config: ModelConfig, context_length: int, max_tokens: int) -> list[_Batch]:
    """Batch pairs of the same padded length, the longest first, so that running out of memory fails early."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = min(bucket(lengths[i]), context_length)
        groups.setdefault((padded, _ntk_length(lengths[i], config)), []).append(i)
    batches = []
    for (padded, _), pairs in groups.items():
        rows = power_of_two(max_tokens // padded // 2 + 1)  # the largest power of two within the budget, at least 1
        for start in range(0, len(pairs), rows):
            batch = pairs[start : start + rows]
            batches.append(_Batch(power_of_two(len(batch)), padded, batch))
    return batches


def _ntk_length(length: int, config: ModelConfig) -> int | None:
    """Return the length that determines the RoPE angles of a pair under dynamic NTK, else None (`layers.rope`)."""
    scaling = config.rope_scaling
    dynamic = scaling is not None and scaling.type == "dynamic"
    return length if dynamic and length > config.max_position_embeddings else None


def _run(
    graph: Any, params: dict[str, Array], batch: _Batch, pairs: Sequence[_Pair]
) -> tuple[Float[Array, "chunks size"], Bool[Array, "chunks size"]]:
    """Return log-probabilities and greedy flags of all continuations, concatenated and padded."""
    ids = np.zeros((batch.rows, batch.length), np.int32)
    counts = np.zeros(batch.rows, np.int32)
    size = min(_CHUNK, ids.size)
    positions, targets = np.zeros((2, -(-ids.size // size) * size), np.int32)
    end = 0
    for row, pair in enumerate(pairs):
        ids[row, : pair.length] = pair.tokens[:-1]
        counts[row] = pair.length
        start, end = end, end + pair.predicted
        positions[start:end] = row * batch.length + np.arange(pair.length - pair.predicted, pair.length)
        targets[start:end] = pair.tokens[-pair.predicted :]
    shape, used = (-1, size), np.int32(-(-end // size))
    with mesh_of(params):
        return _score_batch(graph, params, ids, counts, positions.reshape(shape), targets.reshape(shape), used)


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(
    graph: Any,
    params: dict[str, Array],
    token_ids: Int[Array, "B T"],
    counts: Int[Array, "B"],
    positions: Int[Array, "chunks size"],
    targets: Int[Array, "chunks size"],
    used: Int[Array, ""],
) -> tuple[Float[Array, "chunks size"], Bool[Array, "chunks size"]]:
    """Return log-probability and greedy flag of each target at its position (row · T + column)."""
    model = merge(graph, params)
    B, T = token_ids.shape
    valid = jnp.arange(T)[None, :] < counts[:, None]
    # Dynamic NTK depends on the longest row, not on the bucket.
    states = model.hidden(token_ids, valid, rope_length=counts.max()).last_hidden_state.reshape(B * T, -1)

    def chunk(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.logits(states[positions[i]])
        vocabulary = jnp.arange(logits.shape[-1])[None, :]
        target = jnp.where(targets[i][:, None] == vocabulary, logits, 0).sum(axis=-1)
        logprobs, greedy = results
        logprobs = logprobs.at[i].set(target - jax.nn.logsumexp(logits, axis=-1))
        return logprobs, greedy.at[i].set(logits.argmax(axis=-1) == targets[i])

    # `used` is a value, not a shape, so that the number of predicted tokens does not recompile.
    empty = jnp.zeros(positions.shape, jnp.float32), jnp.zeros(positions.shape, bool)
    return jax.lax.fori_loop(0, used, chunk, empty)


def _prefetch(results: Iterator[Any]) -> Iterator[Any]:
    """Yield each result after dispatching the next, so that the device does not wait for the host."""
    previous: list[Any] = []
    for result in results:
        yield from previous
        previous = [result]
    yield from previous
