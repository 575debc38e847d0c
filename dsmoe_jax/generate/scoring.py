"""How likely the model finds given tokens: continuations after their contexts, and whole texts in rolling windows.

Start at `score`: it plans batches (`_plan`), runs them (`_run`, on the device `_scored`) and brings the results back in
order. `perplexity` is `score` over `rolling_windows`. Both mean what EleutherAI's lm-evaluation-harness means by
`loglikelihood` and `loglikelihood_rolling`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.programs import bucket, power_of_two
from dsmoe_jax.model import merge
from dsmoe_jax.sharding import mesh_of

Tokens = Sequence[int]
Progress = Callable[[int, int], object]  # told of (pairs done, pairs in all) after every batch

_CHUNK: Final = 128  # positions whose logits exist at once: 52 MB of fp32 with a vocabulary of 102400


class Score(NamedTuple):
    """What the model makes of one continuation."""

    logprob: float  # of the whole continuation: the sum of its tokens', in nats
    greedy: bool  # every token of it is the one that the model finds likeliest there
    token_logprobs: list[float]  # one for each token of the continuation


class Perplexity(NamedTuple):
    """How well the model predicts a text."""

    perplexity: float  # exp(nll / tokens)
    nll: float  # the negative log-likelihood of all predicted tokens, in nats
    tokens: int  # that were predicted
    bits_per_byte: float | None  # nll / (ln 2 · bytes of the text); None where no text was given


def score(
    graph: Any,
    params: dict[str, Array],
    config: ModelConfig,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    context_length: int,
    max_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[Score]:
    """The log-probability of every continuation after its context, in the order given.

    Args:
      graph, params, config: a model, taken apart by `model.split`.
      pairs: (context, continuation), both non-empty lists of token ids. The context is used as it is: no token is put
        before it, none is cut off.
      context_length: the most tokens of a pair that the model may read. The last token of a continuation is predicted
        and never read: a pair fits if len(context) + len(continuation) - 1 <= context_length.
      max_tokens: the most tokens of a batch, padding included. A longer pair is a batch of its own.
      progress: is told of (pairs done, pairs in all) after every batch; the longest pairs come first.

    No result depends on the other pairs, but for rounding. Pairs that dynamic NTK scaling stretches (longer than
    `max_position_embeddings`) share a batch with pairs of their own length only.

    Raises `ValueError` for a `context_length` or `max_tokens` below 1 and, naming the pair, where a context or a
    continuation is empty or no list of ids of the vocabulary, and where the pair does not fit.
    """
    for name, value in (("context_length", context_length), ("max_tokens", max_tokens)):
        if value < 1:
            raise DSMoEError(f"{name} must be at least 1, not {value}")
    checked = [_checked(i, pair, config.vocab_size, context_length) for i, pair in enumerate(pairs)]
    batches = _plan([pair.length for pair in checked], config, context_length, max_tokens)
    results = (_run(graph, params, batch, [checked[i] for i in batch.pairs]) for batch in batches)
    scores: dict[int, Score] = {}
    for batch, (logprobs, greedy) in zip(batches, _one_ahead(results), strict=True):
        ends = np.cumsum([checked[i].predicted for i in batch.pairs])
        logprobs, greedy = np.asarray(logprobs).ravel(), np.asarray(greedy).ravel()
        for i, end in zip(batch.pairs, ends.tolist(), strict=True):
            own = slice(end - checked[i].predicted, end)
            tokens = logprobs[own].tolist()
            scores[i] = Score(math.fsum(tokens), bool(greedy[own].all()), tokens)
        if progress is not None:
            progress(len(scores), len(checked))
    return [scores[i] for i in range(len(checked))]


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
    max_tokens: int = 2048,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a text, every token predicted once, from the windows of `rolling_windows`.

    Args:
      graph, params, config: a model, taken apart by `model.split`.
      tokens: the ids of the text.
      prefix: what the first token is predicted from, as a rule the begin-of-sequence token. None: the first token is
        not predicted; right for models without such a token and for `tokens` that begin with it already.
      context_length, max_tokens, progress: as in `score`, where a window is a pair.
      window: the most tokens that are read at once; default what the model was trained for without any scaling
        (`max_position_embeddings`), or `context_length` if that is less.
      stride: new tokens in each window after the first; default `window`.
      text_bytes: the length of the text in UTF-8, for the bits per byte.

    Raises `ValueError` as `rolling_windows` and `score` do, for a window above `context_length`, for `text_bytes` below
    1, and where there is nothing to predict.
    """
    window = min(context_length, config.max_position_embeddings) if window is None else window
    if window > context_length:
        raise DSMoEError(f"window {window} is above the context_length of {context_length}")
    windows = rolling_windows(tokens, prefix=prefix, window=window, stride=stride)
    if not windows:
        raise DSMoEError(f"there is nothing to predict: tokens has length {len(tokens)} and prefix is {prefix}")
    if text_bytes is not None and text_bytes < 1:
        raise DSMoEError(f"text_bytes must be at least 1, not {text_bytes}")
    limits = {"context_length": context_length, "max_tokens": max_tokens}
    scores = score(graph, params, config, windows, **limits, progress=progress)
    nll = -math.fsum(one.logprob for one in scores)
    predicted = sum(len(continuation) for _, continuation in windows)
    bits = None if text_bytes is None else nll / (math.log(2) * text_bytes)
    return Perplexity(math.exp(nll / predicted), nll, predicted, bits)


def rolling_windows(
    tokens: Tokens, *, prefix: int | None, window: int, stride: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Pairs (context, continuation) for `score`; the continuations, one after the other, are the tokens to predict.

    These are all of `tokens`, the first one predicted from `prefix`, or without a prefix all but the first, which then
    takes its place. The first window reads that one token as its context and predicts `window` tokens. Each later one
    predicts the next `stride` (the last one what is left) and has as much context as fits: all tokens before them, but
    no more than `window + 1` tokens with its continuation, since the last token of a pair is predicted and not read.

    With the default, `stride = window`, the context is one token, save for the last window, which takes more. A smaller
    stride gives every token at least `window - stride + 1` tokens of context at the price of more windows. These are
    the windows of lm-evaluation-harness (`get_rolling_token_windows` and `make_disjoint_window` in lm_eval/utils.py),
    with `max_seq_len = window` and `context_len = window - stride + 1`. No tokens to predict: no windows.

    Raises `ValueError` for a window below 1 and a stride that is not between 1 and the window.
    """
    stride = window if stride is None else stride
    if window < 1:
        raise DSMoEError(f"window must be at least 1, not {window}")
    if not 1 <= stride <= window:
        raise DSMoEError(f"stride must be between 1 and the window of {window}, not {stride}")
    text = [*([] if prefix is None else [prefix]), *tokens]
    pairs, done, new = [], 1, window
    while done < len(text):
        end = min(done + new, len(text))
        pairs.append((text[max(0, end - window - 1) : done], text[done:end]))
        done, new = end, stride
    return pairs


# --- pairs and their batches ---


class _Pair(NamedTuple):
    tokens: np.ndarray  # context and continuation
    predicted: int  # tokens of the continuation

    @property
    def length(self) -> int:
        """Tokens that are read: all but the last."""
        return len(self.tokens) - 1


class _Batch(NamedTuple):
    rows: int  # a power of two; those past the pairs are empty
    length: int  # of each row, padding included
    pairs: list[int]  # by index


def _checked(index: int, pair: tuple[Tokens, Tokens], vocab_size: int, context_length: int) -> _Pair:
    if len(pair) != 2:
        raise DSMoEError(f"pair {index} must be (context, continuation), and has {len(pair)} entries")
    context, continuation = map(np.asarray, pair)
    for name, ids in (("context", context), ("continuation", continuation)):
        if not ids.size:
            raise DSMoEError(f"pair {index}: the {name} is empty")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DSMoEError(f"pair {index}: the {name} must be token ids [T], not {ids.dtype} {list(ids.shape)}")
        for worst in (ids.min(), ids.max()):
            if not 0 <= worst < vocab_size:
                raise DSMoEError(f"pair {index}: {name} id {worst} is outside the vocabulary of {vocab_size}")
    read = len(context) + len(continuation) - 1
    if read > context_length:
        raise DSMoEError(
            f"pair {index}: {len(context)} tokens of context and {len(continuation)} of continuation, all but the last "
            f"to be read, exceed the context_length of {context_length}"
        )
    return _Pair(np.concatenate([context, continuation]).astype(np.int32), len(continuation))


def _plan(lengths: Sequence[int], config: ModelConfig, context_length: int, max_tokens: int) -> list[_Batch]:
    """Batches of pairs with the same padded length, the longest first: what does not fit in memory shows at once."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = min(bucket(lengths[i]), context_length)
        groups.setdefault((padded, _stretched(lengths[i], config)), []).append(i)
    batches = []
    for (padded, _), pairs in groups.items():
        rows = power_of_two(max_tokens // padded // 2 + 1)  # the largest power of two within the budget, at least 1
        for start in range(0, len(pairs), rows):
            mine = pairs[start : start + rows]
            batches.append(_Batch(power_of_two(len(mine)), padded, mine))
    return batches


def _stretched(length: int, config: ModelConfig) -> int | None:
    """The length that the angles of a pair depend on, None where they do not: see dynamic NTK in `layers.rope`."""
    scaling = config.rope_scaling
    dynamic = scaling is not None and scaling.type == "dynamic"
    return length if dynamic and length > config.max_position_embeddings else None


# --- on the device ---


def _run(
    graph: Any, params: dict[str, Array], batch: _Batch, pairs: Sequence[_Pair]
) -> tuple[Float[Array, "chunks size"], Bool[Array, "chunks size"]]:
    """Log-probabilities and greedy flags of a batch's continuations, end to end; what follows them means nothing."""
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
        return _scored(graph, params, ids, counts, positions.reshape(shape), targets.reshape(shape), used)


@functools.partial(jax.jit, static_argnums=0)
def _scored(
    graph: Any,
    params: dict[str, Array],
    token_ids: Int[Array, "B T"],
    counts: Int[Array, "B"],
    positions: Int[Array, "chunks size"],
    targets: Int[Array, "chunks size"],
    used: Int[Array, ""],
) -> tuple[Float[Array, "chunks size"], Bool[Array, "chunks size"]]:
    """The log-probability of each target at its position (row · T + column), and whether it is the likeliest token.

    Only the first `used` chunks are looked at. That is a value and no shape: how many tokens are predicted makes no new
    program, and the head, with a large vocabulary a good part of the work, sees no position that nobody asked for.
    """
    model = merge(graph, params)
    B, T = token_ids.shape
    real = jnp.arange(T)[None, :] < counts[:, None]
    # Dynamic NTK goes by the longest row; the bucket is none of its business.
    states = model.hidden(token_ids, real, rope_length=counts.max()).last_hidden_state.reshape(B * T, -1)

    def chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.logits(states[positions[i]])
        vocabulary = jnp.arange(logits.shape[-1])[None, :]
        picked = jnp.where(targets[i][:, None] == vocabulary, logits, 0).sum(axis=-1)
        logprobs, greedy = found
        logprobs = logprobs.at[i].set(picked - jax.nn.logsumexp(logits, axis=-1))
        return logprobs, greedy.at[i].set(logits.argmax(axis=-1) == targets[i])

    nothing = jnp.zeros(positions.shape, jnp.float32), jnp.zeros(positions.shape, bool)
    return jax.lax.fori_loop(0, used, chunk, nothing)


def _one_ahead(results: Iterator[Any]) -> Iterator[Any]:
    """Each result once the next one has been asked for: the device does not wait for the host."""
    waiting: list[Any] = []
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
