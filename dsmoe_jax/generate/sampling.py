"""Sampling on the device: `sample_tokens`; `SamplingParams` documents each step and their order."""

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
    """Sampling parameters per row, as arrays, so that new values do not recompile."""

    temperature: Float[Array, "R"]  # 0: greedy
    top_k: Int[Array, "R"]  # vocab_size: disabled
    top_p: Float[Array, "R"]  # 1: disabled
    min_p: Float[Array, "R"]  # 0: disabled
    seed: Array  # uint32 [R]
    index: Int[Array, "R"]  # among the outputs of the same prompt

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams | None, int, int]], vocab_size: int) -> "Sampler | None":
        """Return numpy arrays for rows of (parameters or None if idle, seed, output index); None if all are greedy."""
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
        rows_of_values = [(*value, seed, index) for value, (_, seed, index) in zip(values, rows, strict=True)]
        columns = zip(zip(*rows_of_values, strict=True), _DTYPES, strict=True)
        arrays: list[Any] = [np.array(column, dtype) for column, dtype in columns]
        return cls(*arrays)


class PenaltyState(NamedTuple):
    """Biases, penalties and token counts per row: 9 bytes per row and token of the vocabulary."""

    prompt_mask: Bool[Array, "R V"]  # tokens in the prompt
    output_counts: Int[Array, "R V"]  # occurrences in the output
    bias: Float[Array, "R V"]
    repetition: Float[Array, "R"]
    presence: Float[Array, "R"]
    frequency: Float[Array, "R"]

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> "PenaltyState":
        """Return a state that changes no logits."""
        full = lambda value, dtype=jnp.float32: jnp.full((rows, vocab_size), value, dtype)  # noqa: E731
        # One buffer per field: donating a buffer twice is an error.
        penalties = [jnp.full(rows, value, jnp.float32) for value in (1, 0, 0)]
        return cls(full(False, bool), full(0, jnp.int32), full(0), *penalties)

    def reset_row(
        self,
        row: Int[Array, ""] | int,
        prompt_ids: Int[Array, "T"],
        count: Int[Array, ""] | int,
        bias_ids: Int[Array, "N"],
        bias_values: Float[Array, "N"],
        penalties: Float[Array, "3"],
    ) -> "PenaltyState":
        """Replace a row by a new request: `count` tokens of `prompt_ids`, then the values of `penalty_arrays`."""
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
        """Gather rows."""
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
    """Log-probabilities from the logits of the model: of the sampled token and of the N most likely ones."""

    token: Float[Array, "R"]
    top_ids: Int[Array, "R N"]
    top: Float[Array, "R N"]


def penalty_arrays(params: SamplingParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return arguments of `PenaltyState.reset_row`: token ids and values of biases, padded with 0, and penalties."""
    biases = dict(params.logit_bias or ())
    ids, values = np.zeros(MAX_LOGIT_BIASES, np.int32), np.zeros(MAX_LOGIT_BIASES, np.float32)
    ids[: len(biases)], values[: len(biases)] = list(biases), list(biases.values())
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return ids, values, np.asarray(penalties, np.float32)


def sample_tokens(
    logits: Float[Array, "R V"], sampler: Sampler | None, penalties: PenaltyState | None, num_sampled: Int[Array, "R"]
) -> Int[Array, "R"]:
    """Sample the next token of every row, independent of other rows; without a sampler all are greedy."""
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
    """Divide by temperature, shift the maximum to 0, and set -inf where top-k, top-p or min-p drops a token."""
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
    """Set -inf where `mask` is False, computed only if some row needs it."""
    return jax.lax.cond(enabled, lambda x: jnp.where(mask(x), x, -jnp.inf), lambda x: x, scaled)


def _nucleus(scaled: Float[Array, "R V"], top_p: Float[Array, "R"]) -> Bool[Array, "R V"]:
    weight = jnp.exp(scaled)
    # With rounded sums, top_p = 1 could drop the least likely token.
    return _heaviest(scaled, weight, top_p * weight.sum(axis=-1)) | (top_p >= 1)[:, None]


def _heaviest(x: Float[Array, "R V"], weight: Array, need: Array) -> Bool[Array, "R V"]:
    """Mask the largest x whose weights sum to at least `need` [R]; all if the total is less. Ties stay together.

    Exact, with 32 sums instead of a sort, which on CPU takes longer than a forward pass of a small model.
    """
    order = _sortable_bits(x)

    def try_bit(step: Array | int, found: Array) -> Array:
        higher = found | (jnp.uint32(1) << (31 - jnp.asarray(step)).astype(jnp.uint32))
        reached = jnp.where(order >= _to_signed(higher)[:, None], weight, 0).sum(axis=-1) >= need
        return jnp.where(reached, higher, found)

    highest = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x.shape[0], jnp.uint32))
    return order >= _to_signed(highest)[:, None]


def _sortable_bits(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Map floats to integers of the same order: flip all bits but the sign of negative ones."""
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
    """Return the first maximum; several times as fast on CPU as jnp.argmax, which is not vectorized."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    last = x.shape[1] - 1  # NaN has no maximum, but the result must be a valid token
    return jnp.where(x == x.max(axis=-1, keepdims=True), places[None, :], last).min(axis=-1)
