"""How the next token is chosen, on the device: see `choose`. `SamplingParams` says what it does and in which order.

R is the rows of a batch. Nothing here sorts the vocabulary, which takes longer on a CPU than a small model does.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.generate.sampling_params import MOST_BIASES, SamplingParams

_LEAST: Final = float(np.finfo(np.float32).tiny)  # the least float32 that no processor takes for zero
_DTYPES: Final = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)  # of the arrays of a Sampler


class Sampler(NamedTuple):
    """How each row draws, as arrays, so that other values are no other program."""

    temperature: Float[Array, "R"]  # 0: the row is greedy
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    seed: Array  # [R] uint32
    index: Int[Array, "R"]  # which of the answers to its prompt the row is

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams | None, int, int]], vocab_size: int) -> "Sampler | None":
        """Numpy arrays from each row's parameters (None: the row is free), seed and index; None if all are greedy.

        The seed stands beside the parameters because theirs may be None.
        """
        # What a greedy row asks beside must not make the others wait for it.
        greedy = (0.0, vocab_size, 1.0, 0.0)
        values = [
            (p.temperature, min(p.top_k or vocab_size, vocab_size), max(p.top_p, _LEAST), p.min_p)
            if p and p.temperature and p.top_p
            else greedy
            for p, _, _ in rows
        ]
        if all(value is greedy for value in values):
            return None
        asked = [(*value, seed, index) for value, (_, seed, index) in zip(values, rows, strict=True)]
        columns = zip(*asked, strict=True)
        arrays: list[Any] = [np.array(column, dtype) for column, dtype in zip(columns, _DTYPES, strict=True)]
        return cls(*arrays)


class Tally(NamedTuple):
    """What biases and penalties need to know of each row: 9 bytes a row and token of the vocabulary."""

    prompt: Bool[Array, "R V"]  # which tokens stand in the prompt
    answer: Int[Array, "R V"]  # how often each token stands in the answer
    bias: Float[Array, "R V"]
    repetition: Float[Array, "R"]
    presence: Float[Array, "R"]
    frequency: Float[Array, "R"]

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> "Tally":
        """A tally that changes no logit."""
        shape = (rows, vocab_size)
        # One buffer each: a buffer that is donated twice is an error.
        return cls(
            jnp.zeros(shape, bool),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.ones(rows, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )

    def with_row(
        self,
        row: Int[Array, ""] | int,
        prompt_ids: Int[Array, "T"],
        count: Int[Array, ""] | int,
        bias_ids: Int[Array, "N"],
        bias_values: Float[Array, "N"],
        penalties: Float[Array, "3"],
    ) -> "Tally":
        """A new request in `row`: nothing of the one before it is left, and its answer is empty.

        The first `count` of `prompt_ids` are the prompt. `adjustments` makes the last three arguments; a padded bias
        is one of 0.
        """
        vocab_size = self.bias.shape[1]
        # An id at V is out of bounds, and dropped.
        ids = jnp.where(jnp.arange(prompt_ids.shape[0]) < count, prompt_ids, vocab_size)
        new = Tally(
            jnp.zeros(vocab_size, bool).at[ids].set(True, mode="drop"),
            jnp.zeros(vocab_size, jnp.int32),
            jnp.zeros(vocab_size, jnp.float32).at[bias_ids].add(bias_values, mode="drop"),
            *jnp.asarray(penalties, jnp.float32),
        )
        put = lambda rows, value: jax.lax.dynamic_update_index_in_dim(rows, value, row, 0)  # noqa: E731
        return jax.tree.map(put, self, new)

    def counted(self, token: Int[Array, "R"], active: Bool[Array, "R"]) -> "Tally":
        """One more token in the answers of the active rows."""
        rows = jnp.arange(token.shape[0])
        return self._replace(answer=self.answer.at[rows, token].add(active.astype(jnp.int32)))

    def rows(self, order: Int[Array, "P"]) -> "Tally":
        """The rows of `order`, in that order; a row may come several times or not at all."""
        return jax.tree.map(lambda rows: rows[order], self)

    def adjust(self, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
        """Logits in float32 after biases and penalties, steps 1 to 3 of `SamplingParams`."""
        logits = logits.astype(jnp.float32) + self.bias
        repetition, presence, frequency = (p[:, None] for p in (self.repetition, self.presence, self.frequency))
        answered = self.answer > 0
        penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(self.prompt | answered, penalized, logits)
        return logits - jnp.where(answered, presence + frequency * self.answer, 0.0)


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities by the model's own logits."""

    token: Float[Array, "R"]  # of the chosen token
    top_ids: Int[Array, "R N"]  # the likeliest tokens, likeliest first
    top: Float[Array, "R N"]


def adjustments(params: SamplingParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last arguments of `Tally.with_row`: ids and values of the biases, padded to one length, and penalties."""
    biases = dict(params.logit_bias or ())
    ids, values = np.zeros(MOST_BIASES, np.int32), np.zeros(MOST_BIASES, np.float32)
    ids[: len(biases)], values[: len(biases)] = list(biases), list(biases.values())
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return ids, values, np.asarray(penalties, np.float32)


def choose(
    logits: Float[Array, "R V"], sampler: Sampler | None, tally: Tally | None, drawn: Int[Array, "R"]
) -> Int[Array, "R"]:
    """The next token of every row, which has drawn `drawn` before. Without a sampler every row is greedy.

    A row's token depends on the row's own arrays alone, and not on where in a batch it stands.
    """
    logits = logits.astype(jnp.float32) if tally is None else tally.adjust(logits)
    if sampler is None:
        return _argmax(logits)
    # The likeliest of logits to which Gumbel noise was added is a draw from their softmax.
    noisy = _kept_logits(logits, sampler) + _gumbel(sampler, drawn, logits.shape[1])
    return _argmax(jnp.where(sampler.temperature[:, None] > 0, noisy, logits))


def log_probabilities(logits: Float[Array, "R V"], token: Int[Array, "R"], top: int) -> Logprobs:
    """The log-probability of each row's token and of its `top` likeliest ones, before any step of `choose`."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = jax.lax.top_k(logprobs, top)
    return Logprobs(jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], ids.astype(jnp.int32), values)


def _kept_logits(logits: Float[Array, "R V"], sampler: Sampler) -> Float[Array, "R V"]:
    """Logits over temperature, the highest at 0; -inf where top-k, top-p or min-p drops a token."""
    # The highest logit goes to zero first: a tiny temperature must not overflow.
    scaled = logits - logits.max(axis=-1, keepdims=True)
    scaled = scaled / jnp.maximum(sampler.temperature, _LEAST)[:, None]
    scaled = _drop_if(
        (sampler.top_k < logits.shape[1]).any(),
        lambda scaled: _heaviest(scaled, jnp.ones(scaled.shape, jnp.int32), sampler.top_k),
        scaled,
    )
    scaled = _drop_if((sampler.top_p < 1).any(), lambda scaled: _nucleus(scaled, sampler.top_p), scaled)
    return jnp.where(scaled >= jnp.log(sampler.min_p)[:, None], scaled, -jnp.inf)


def _drop_if(asked: Bool[Array, ""], keep: Callable[[Array], Array], scaled: Array) -> Array:
    """-inf where `keep` is False, which is computed only if some row asks for it."""
    return jax.lax.cond(asked, lambda scaled: jnp.where(keep(scaled), scaled, -jnp.inf), lambda scaled: scaled, scaled)


def _nucleus(scaled: Float[Array, "R V"], top_p: Float[Array, "R"]) -> Bool[Array, "R V"]:
    weight = jnp.exp(scaled)
    # At 1 everything stays, however unlikely: sums are rounded.
    return _heaviest(scaled, weight, top_p * weight.sum(axis=-1)) | (top_p >= 1)[:, None]


def _heaviest(x: Float[Array, "R V"], weight: Array, need: Array) -> Bool[Array, "R V"]:
    """Where x is at least t, the highest t at which those places weigh `need` [R] together; everywhere if none does.

    Equal x are kept or dropped together. Exact, and 32 sums instead of a sort: t is found bit by bit.
    """
    order = _ordered(x)

    def try_bit(step: Array | int, found: Array) -> Array:
        higher = found | (jnp.uint32(1) << (31 - jnp.asarray(step)).astype(jnp.uint32))
        reached = jnp.where(order >= _signed(higher)[:, None], weight, 0).sum(axis=-1) >= need
        return jnp.where(reached, higher, found)

    highest = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x.shape[0], jnp.uint32))
    return order >= _signed(highest)[:, None]


def _ordered(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Integers in the order of the floats: the bits, but for the sign all turned over where x is negative."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _signed(t: Array) -> Int[Array, "R"]:
    """From unsigned to signed integers, in order."""
    return jax.lax.bitcast_convert_type(t ^ jnp.uint32(1 << 31), jnp.int32)


def _gumbel(sampler: Sampler, drawn: Int[Array, "R"], vocab_size: int) -> Float[Array, "R V"]:
    def noise(seed: Array, index: Array, drawn: Array) -> Array:
        # By name: other generators give a row of a batch other bits than the row alone.
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, index), drawn), (vocab_size,))

    return jax.vmap(noise)(sampler.seed, sampler.index, drawn)


def _argmax(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """The first of the highest; on CPU several times as fast as jnp.argmax, which goes element by element."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    last = x.shape[1] - 1  # beside a NaN nothing is highest, and what comes out must still be a token
    return jnp.where(x == x.max(axis=-1, keepdims=True), places[None, :], last).min(axis=-1)
