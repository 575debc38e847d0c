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
from dsmoe_jax.generate.prefill import Prefiller
from dsmoe_jax.generate.prefix_cache import PrefixCache
from dsmoe_jax.generate.programs import power_of_two
from dsmoe_jax.generate.request import Stats
from dsmoe_jax.generate.score_plan import Batch, Group, Pair, plan
from dsmoe_jax.kernels.attention import CausalMask
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import merge
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.sharding import constrain, mesh_of

Tokens = Sequence[int]

_CHUNK: Final = 128  # positions whose logits exist at once: 52 MB in fp32 at a vocabulary of 102400


class Score(NamedTuple):
    """Log-likelihood of one continuation.

    Attributes:
        logprob: Sum over its tokens, in nats.
        greedy: Whether every token is the most likely one.
        token_logprobs: One per token.
        top_logprobs: Those of the most likely tokens at each position, by token id; None unless requested.
    """

    logprob: float
    greedy: bool
    token_logprobs: list[float]
    top_logprobs: list[dict[int, float]] | None = None


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
    share_prefixes: bool = True,
    prefill_chunk: int = 512,
    prefix_cache: PrefixCache | None = None,
    stats: Stats | None = None,
    top: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """Check the pairs at once, then yield index and log-likelihood of each (context, continuation) as it is computed.

    The last token of a continuation is predicted but not read: a pair fits if all but one token fit into the context.
    Results do not depend on the other pairs, except for rounding: tokens that pairs share are read once (`score_plan`),
    and under dynamic NTK, pairs beyond `max_position_embeddings` share a batch only with pairs of the same length.

    Args:
        graph: Graph of the model.
        params: Parameters of the model.
        config: Config of the model.
        pairs: Token ids of contexts and continuations.
        context_length: Bound on the tokens read of a pair.
        max_tokens: Tokens of a batch with padding; more use more memory.
        share_prefixes: Whether to read the tokens that pairs share only once.
        prefill_chunk: Tokens per call of the model when reading a shared prefix.
        prefix_cache: Prefixes of earlier calls to reuse.
        stats: Counters of tokens.
        top: Most likely tokens to return at each position; each value compiles a program.

    Yields:
        Index of the pair and its score.

    Raises:
        DSMoEError: An option is out of range, or a pair is empty, too long, or has ids outside the vocabulary.
    """
    for name, value in (
        ("context_length", context_length),
        ("max_tokens", max_tokens),
        ("top", 1 if top is None else top),
    ):
        if value < 1:
            raise DSMoEError(f"{name} must be at least 1, got {value}")
    checked = [_checked(i, pair, config.vocab_size, context_length) for i, pair in enumerate(pairs)]
    options = {"context_length": context_length, "max_tokens": max_tokens, "share": share_prefixes}
    stats = Stats() if stats is None else stats
    prefiller = Prefiller(
        graph,
        params,
        dtype=params["norm.weight"].dtype,
        chunk=prefill_chunk,
        prefix_cache=PrefixCache(0) if prefix_cache is None else prefix_cache,
        stats=stats,
    )
    return _iter_groups(_Scorer(graph, params, prefiller, stats, top), checked, plan(checked, config, **options))


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


def _checked(index: int, pair: tuple[Tokens, Tokens], vocab_size: int, context_length: int) -> Pair:
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
    return Pair(np.concatenate([context, continuation]).astype(np.int32), len(continuation))


class _Scorer(NamedTuple):
    graph: Any
    params: dict[str, Array]
    prefiller: Prefiller
    stats: Stats
    top: int | None


def _iter_groups(scorer: _Scorer, pairs: Sequence[Pair], groups: Sequence[Group]) -> Iterator[tuple[int, Score]]:
    for indices, (logprobs, greedy, top) in _prefetch(_run_groups(scorer, pairs, groups)):
        ends = np.cumsum([pairs[i].predicted for i in indices])
        logprobs, greedy = np.asarray(logprobs).ravel(), np.asarray(greedy).ravel()
        top_ids, top_values = (np.asarray(x).reshape(len(logprobs), -1) for x in top or (logprobs, logprobs))
        for i, end in zip(indices, ends.tolist(), strict=True):
            span = slice(end - pairs[i].predicted, end)
            tokens = logprobs[span].tolist()
            rows = zip(top_ids[span].tolist(), top_values[span].tolist(), strict=True)
            most_likely = None if top is None else [dict(zip(*row, strict=True)) for row in rows]
            yield i, Score(math.fsum(tokens), bool(greedy[span].all()), tokens, most_likely)


def _run_groups(scorer: _Scorer, pairs: Sequence[Pair], groups: Sequence[Group]) -> Iterator[tuple[list[int], Any]]:
    """Yield the pairs of each batch with log-probabilities and greedy flags of their continuations, concatenated."""
    for group in groups:
        prefix = None
        for batch in group.batches:
            inputs = _Inputs.of(batch, pairs, group.prefix)
            indices = [i for row in batch.rows for i in row.pairs]
            with mesh_of(scorer.params):
                if group.prefix and prefix is None:
                    prefix = scorer.prefiller.read(pairs[indices[0]].tokens[: group.prefix].tolist()).cache
                results = _score_batch(scorer.graph, scorer.params, prefix, inputs, top=scorer.top)
            read = int(inputs.counts.sum())
            scorer.stats.prompt_tokens += read
            scorer.stats.reused_tokens += sum(pairs[i].length for i in indices) - read
            yield indices, results
        if prefix is not None:  # read once, not reused by the pair that it comes from
            scorer.stats.reused_tokens -= group.prefix


class _Inputs(NamedTuple):
    """Operands of `_score_batch`: rows of T tokens after a prefix."""

    token_ids: Int[Array, "B T"]
    position_ids: Int[Array, "B T"]
    branches: Int[Array, "B T"]  # 0: trunk
    counts: Int[Array, "B"]
    prefix: Int[Array, ""]  # tokens of the prefix
    longest: Int[Array, ""]  # tokens of the longest pair
    positions: Int[Array, "chunks size"]  # of each prediction: row · T + column
    targets: Int[Array, "chunks size"]
    used: Int[Array, ""]  # chunks that are not padding

    @classmethod
    def of(cls, batch: Batch, pairs: Sequence[Pair], prefix: int) -> "_Inputs":
        """Lay out the rows of a batch: the trunk after the prefix, then the branches."""
        token_ids, position_ids, branches = np.zeros((3, batch.size, batch.length), np.int32)
        counts = np.zeros(batch.size, np.int32)
        positions, targets = [], []
        for r, row in enumerate(batch.rows):
            end = row.trunk - prefix
            token_ids[r, :end] = pairs[row.pairs[0]].tokens[prefix : row.trunk]
            position_ids[r, :end] = np.arange(prefix, row.trunk)
            for branch, i in enumerate(row.pairs, start=1):
                pair = pairs[i]
                start, end = end, end + pair.length - row.trunk
                token_ids[r, start:end] = pair.read[row.trunk :]
                position_ids[r, start:end] = np.arange(row.trunk, pair.length)
                branches[r, start:end] = branch
                at = np.arange(pair.context - 1, pair.length)
                columns = np.where(at < row.trunk, at - prefix, start + at - row.trunk)
                positions.append(r * batch.length + columns)
                targets.append(pair.tokens[pair.context :])
            counts[r] = end
        total = sum(map(len, targets))
        size = min(_CHUNK, token_ids.size)
        chunks = max(-(-token_ids.size // size), power_of_two(-(-total // size)))
        padded = np.zeros((2, chunks * size), np.int32)
        padded[:, :total] = np.concatenate(positions), np.concatenate(targets)
        longest = max(pairs[i].length for row in batch.rows for i in row.pairs)
        scalars = np.int32(prefix), np.int32(longest)
        laid_out = token_ids, position_ids, branches, counts, *scalars
        return cls(*laid_out, *padded.reshape(2, chunks, size), np.int32(-(-total // size)))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=0, static_argnames="top")
def _score_batch(
    graph: Any, params: dict[str, Array], prefix: KVCache | None, inputs: _Inputs, *, top: int | None = None
) -> tuple[Float[Array, "chunks size"], Bool[Array, "chunks size"], tuple[Array, Array] | None]:
    """Return log-probability and greedy flag of each target, ids and log-probabilities of the `top` most likely tokens.

    A prefix is a cache of one row.
    """
    model = merge(graph, params)
    B, T = inputs.token_ids.shape
    valid = jnp.arange(T)[None, :] < inputs.counts[:, None]
    cache, branches = None, inputs.branches
    mask = CausalMask(None, valid, branches, branches, branches == 0)
    if prefix is not None:
        cache = prefix.rows(jnp.zeros(B, jnp.int32), prefix.slots + T)
        cache = cache._replace(lengths=jnp.full(B, inputs.prefix, jnp.int32)).placed()
        # The slots of the prefix belong to the trunk.
        keys = jax.lax.dynamic_update_slice(jnp.zeros((B, cache.slots), jnp.int32), branches, (0, inputs.prefix))
        mask = CausalMask(cache.lengths, None, branches, keys, keys == 0)
    # Dynamic NTK depends on the longest pair, not on the bucket.
    options = {"cache": cache, "mask": mask, "rope_length": inputs.longest}
    states = model.hidden(inputs.token_ids, valid, inputs.position_ids, **options).last_hidden_state.reshape(B * T, -1)

    def chunk(i: Array, results: Any) -> Any:
        targets = inputs.targets[i]
        logits = model.logits(states[inputs.positions[i]])
        vocabulary = jnp.arange(logits.shape[-1])[None, :]
        target = jnp.where(targets[:, None] == vocabulary, logits, 0).sum(axis=-1)
        total = jax.nn.logsumexp(logits, axis=-1)
        found: Any = target - total, logits.argmax(axis=-1) == targets, None
        if top is not None:
            values, ids = jax.lax.top_k(logits, top)
            found = (*found[:2], (ids, values - total[:, None]))
        return jax.tree.map(lambda all, one: all.at[i].set(one), results, found)

    # `used` is a value, not a shape, so that the number of predicted tokens does not recompile.
    zeros = lambda dtype, *more: jnp.zeros((*inputs.positions.shape, *more), dtype)  # noqa: E731
    most_likely = None if top is None else (zeros(jnp.int32, top), zeros(jnp.float32, top))
    found = jax.lax.fori_loop(0, inputs.used, chunk, (zeros(jnp.float32), zeros(bool), most_likely))
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), found)  # every process reads them


def _prefetch(results: Iterator[Any]) -> Iterator[Any]:
    """Yield each result after dispatching the next, so that the device does not wait for the host."""
    previous: list[Any] = []
    for result in results:
        yield from previous
        previous = [result]
    yield from previous
