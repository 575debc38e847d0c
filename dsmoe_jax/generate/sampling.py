"""Sampling on the device: `sample_tokens`. `SamplingParams` documents each step and their order.

R is the number of rows of a batch. Nothing sorts the vocabulary: on CPU that takes longer than a small model does.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Bool, Float, Int
from dsmoe_jax.generate.sampling_params import MAX_LOGIT_BIASES, SamplingParams

_TINY: Final = float(np.finfo(np.float32).tiny)  # the smallest float32 that is not flushed to zero
_DTYPES: Final = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)  # of the fields of Sampler


class Sampler(NamedTuple):
    """Sampling parameters per row, as arrays: other values do not recompile.

    Attributes:
        temperature: Divides the logits; 0 for greedy rows.
        top_k: Size of the vocabulary where disabled.
        top_p: 1 where disabled.
        min_p: 0 where disabled.
        seed: uint32 [R].
        index: Index among the outputs of the same prompt.
    """

    temperature: Float[Array, "R"]
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    seed: Array
    index: Int[Array, "R"]

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams | None, int, int]], vocab_size: int) -> "Sampler | None":
        """Return numpy arrays, or None if all rows are greedy.

        A row is its parameters (None: idle), seed and output index. The seed is passed separately because
        `SamplingParams.seed` may be None.
        """
        # Filters of a greedy row have no effect; without them the other rows may skip the search for a cut-off.
        greedy = (0.0, vocab_size, 1.0, 0.0)
        values = [
            (p.temperature, min(p.top_k or vocab_size, vocab_size), max(p.top_p, _TINY), p.min_p)
            if p and p.temperature and p.top_p
            else greedy
            for p, _, _ in rows
        ]
        if all(value is greedy for value in values):
            return None
        columns = zip(
            *((*value, seed, index) for value, (_, seed, index) in zip(values, rows, strict=True)), strict=True
        )
        arrays: list[Any] = [np.array(column, dtype) for column, dtype in zip(columns, _DTYPES, strict=True)]
        return cls(*arrays)


class PenaltyState(NamedTuple):
    """Biases, penalties and token counts per row: 9 bytes per row and token of the vocabulary.

    Attributes:
        prompt_mask: Which tokens occur in the prompt.
        output_counts: How often each token occurs in the output.
        bias: Added to the logits.
        repetition: Repetition penalty.
        presence: Presence penalty.
        frequency: Frequency penalty.
    """

    prompt_mask: Bool[Array, "R V"]
    output_counts: Int[Array, "R V"]
    bias: Float[Array, "R V"]
    repetition: Float[Array, "R"]
    presence: Float[Array, "R"]
    frequency: Float[Array, "R"]

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> "PenaltyState":
        """Return a state that changes no logits."""
        shape = (rows, vocab_size)
        # One buffer each: donating a buffer twice is an error.
        return cls(
            jnp.zeros(shape, bool),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.ones(rows, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )

    def reset_row(
        self,
        row: Int[Array, ""] | int,
        prompt_ids: Int[Array, "T"],
        count: Int[Array, ""] | int,
        bias_ids: Int[Array, "N"],
        bias_values: Float[Array, "N"],
        penalties: Float[Array, "3"],
    ) -> "PenaltyState":
        """Replace a row by that of a new request without output.

        The first `count` of `prompt_ids` are the prompt; `penalty_arrays` returns the last three arguments. Padding of
        `bias_ids` has a bias of 0.
        """
        vocab_size = self.bias.shape[1]
        # Index V is out of bounds, and dropped.
        ids = jnp.where(jnp.arange(prompt_ids.shape[0]) < count, prompt_ids, vocab_size)
        new = PenaltyState(
            jnp.zeros(vocab_size, bool).at[ids].set(True, mode="drop"),
            jnp.zeros(vocab_size, jnp.int32),
            jnp.zeros(vocab_size, jnp.float32).at[bias_ids].add(bias_values, mode="drop"),
            *jnp.asarray(penalties, jnp.float32),
        )
        put = lambda rows, value: jax.lax.dynamic_update_index_in_dim(rows, value, row, 0)  # noqa: E731
        return jax.tree.map(put, self, new)

    def add_tokens(self, token: Int[Array, "R"], active: Bool[Array, "R"]) -> "PenaltyState":
        """Add one output token per active row."""
        rows = jnp.arange(token.shape[0])
        return self._replace(output_counts=self.output_counts.at[rows, token].add(active.astype(jnp.int32)))

    def take(self, rows: Int[Array, "P"]) -> "PenaltyState":
        """Gather rows, in any order and with repetition."""
        return jax.tree.map(lambda x: x[rows], self)

    def apply(self, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
        """Return float32 logits after biases and penalties."""
        logits = logits.astype(jnp.float32) + self.bias
        repetition, presence, frequency = (p[:, None] for p in (self.repetition, self.presence, self.frequency))
        in_output = self.output_counts > 0
        penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(self.prompt_mask | in_output, penalized, logits)
        return logits - jnp.where(in_output, presence + frequency * self.output_counts, 0.0)


class Logprobs(NamedTuple):
    """Natural log-probabilities from the logits of the model.

    Attributes:
        token: Of the sampled token.
        top_ids: The most likely tokens in descending order.
        top: Their log-probabilities.
    """

    token: Float[Array, "R"]
    top_ids: Int[Array, "R N"]
    top: Float[Array, "R N"]


def penalty_arrays(params: SamplingParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the last arguments of `PenaltyState.reset_row`: ids and values of biases, padded, and penalties."""
    biases = dict(params.logit_bias or ())
    ids, values = np.zeros(MAX_LOGIT_BIASES, np.int32), np.zeros(MAX_LOGIT_BIASES, np.float32)
    ids[: len(biases)], values[: len(biases)] = list(biases), list(biases.values())
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return ids, values, np.asarray(penalties, np.float32)


def sample_tokens(
    logits: Float[Array, "R V"],
    sampler: Sampler | None,
    penalties: PenaltyState | None,
    num_sampled: Int[Array, "R"],
) -> Int[Array, "R"]:
    """Sample the next token of every row; it depends on the arguments of that row alone.

    Without a sampler all rows are greedy. `num_sampled` tokens were sampled before; it is part of the random key.
    """
    logits = logits.astype(jnp.float32) if penalties is None else penalties.apply(logits)
    if sampler is None:
        return _argmax(logits)
    # The argmax of logits plus Gumbel noise is a sample from their softmax.
    noisy = _filter_logits(logits, sampler) + _gumbel_noise(sampler, num_sampled, logits.shape[1])
    return _argmax(jnp.where(sampler.temperature[:, None] > 0, noisy, logits))


def log_probabilities(logits: Float[Array, "R V"], token: Int[Array, "R"], top: int) -> Logprobs:
    """Return the log-probability of each row's token and of its `top` most likely ones."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = jax.lax.top_k(logprobs, top)
    return Logprobs(jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], ids.astype(jnp.int32), values)


def _filter_logits(logits: Float[Array, "R V"], sampler: Sampler) -> Float[Array, "R V"]:
    """Return logits over temperature with a maximum of 0, and -inf where top-k, top-p or min-p drops a token."""
    # Subtract the maximum first: a tiny temperature must not overflow.
    scaled = logits - logits.max(axis=-1, keepdims=True)
    scaled = scaled / jnp.maximum(sampler.temperature, _TINY)[:, None]
    scaled = _mask_if(
        (sampler.top_k < logits.shape[1]).any(),
        lambda scaled: _heaviest(scaled, jnp.ones(scaled.shape, jnp.int32), sampler.top_k),
        scaled,
    )
    scaled = _mask_if((sampler.top_p < 1).any(), lambda scaled: _nucleus(scaled, sampler.top_p), scaled)
    return jnp.where(scaled >= jnp.log(sampler.min_p)[:, None], scaled, -jnp.inf)


def _mask_if(enabled: Bool[Array, ""], mask: Callable[[Array], Array], scaled: Array) -> Array:
    """Set -inf where `mask` is False; it is computed only if some row enables it."""
    return jax.lax.cond(enabled, lambda x: jnp.where(mask(x), x, -jnp.inf), lambda x: x, scaled)


def _nucleus(scaled: Float[Array, "R V"], top_p: Float[Array, "R"]) -> Bool[Array, "R V"]:
    weight = jnp.exp(scaled)
    # Sums are rounded: at 1 even the least likely token stays.
    return _heaviest(scaled, weight, top_p * weight.sum(axis=-1)) | (top_p >= 1)[:, None]


def _heaviest(x: Float[Array, "R V"], weight: Array, need: Array) -> Bool[Array, "R V"]:
    """Mask the largest x whose weights sum to at least `need` [R]; everything if the total is less.

    Ties are kept or dropped together. Exact, with 32 sums instead of a sort: the threshold is found bit by bit.
    """
    order = _sortable_bits(x)

    def try_bit(step: Array | int, found: Array) -> Array:
        higher = found | (jnp.uint32(1) << (31 - jnp.asarray(step)).astype(jnp.uint32))
        reached = jnp.where(order >= _to_signed(higher)[:, None], weight, 0).sum(axis=-1) >= need
        return jnp.where(reached, higher, found)

    highest = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x.shape[0], jnp.uint32))
    return order >= _to_signed(highest)[:, None]


def _sortable_bits(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Return integers in the order of the floats: the bits, all but the sign flipped where x is negative."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _to_signed(t: Array) -> Int[Array, "R"]:
    """Map unsigned to signed integers, preserving order."""
    return jax.lax.bitcast_convert_type(t ^ jnp.uint32(1 << 31), jnp.int32)


def _gumbel_noise(sampler: Sampler, num_sampled: Int[Array, "R"], vocab_size: int) -> Float[Array, "R V"]:
    def noise(seed: Array, index: Array, position: Array) -> Array:
        # Named explicitly: with other generators the bits of a row depend on its batch.
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, index), position), (vocab_size,))

    return jax.vmap(noise)(sampler.seed, sampler.index, num_sampled)


def _argmax(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """Return the first maximum; on CPU several times as fast as jnp.argmax, which goes element by element."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    last = x.shape[1] - 1  # if NaN leaves no maximum, the result must still be a token
    return jnp.where(x == x.max(axis=-1, keepdims=True), places[None, :], last).min(axis=-1)
