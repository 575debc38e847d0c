"""How the next token is chosen: `SamplingParams` is what a user asks for, `sample` does it on the device."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a user asks of a generation. Raises `ValueError` naming the parameter, its value and the bound.

    With `temperature` 0 the likeliest token is taken. Otherwise logits are divided by it, all but the `top_k`
    likeliest tokens are dropped, then all but the smallest set whose probabilities reach `top_p`; one of the rest is
    drawn. Row i of a batch draws from its own stream, made of `seed` and i.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every bound."""
        _bounded("max_new_tokens", self.max_new_tokens, 1, 1 << 24, whole=True)
        _bounded("temperature", self.temperature, 0, 1000)
        if self.top_k is not None:
            _bounded("top_k", self.top_k, 1, 1 << 24, whole=True)
        _bounded("top_p", self.top_p, 1e-6, 1)
        _bounded("seed", self.seed, 0, (1 << 32) - 1, whole=True)


class Sampler(NamedTuple):
    """A batch's parameters as arrays, so that other values are no other program."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    key: Array  # [B] random keys

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> "Sampler | None":
        """The arrays of one batch; None if every row is greedy, which needs no sorting and is another program."""
        if all(p.temperature == 0 for p in params):
            return None
        rows = [(p.temperature, min(p.top_k or vocab_size, vocab_size), p.top_p) for p in params]
        temperature, top_k, top_p = (np.asarray(column) for column in zip(*rows, strict=True))
        keys = jnp.stack([jax.random.fold_in(jax.random.key(p.seed), row) for row, p in enumerate(params)])
        return cls(jnp.asarray(temperature, jnp.float32), jnp.asarray(top_k), jnp.asarray(top_p, jnp.float32), keys)


def sample(logits: Float[Array, "B V"], sampler: Sampler | None, step: Int[Array, ""]) -> Int[Array, "B"]:
    """The next token of every row; `step` counts the tokens drawn before."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampler is None:
        return greedy
    ranked, order = _ranked_logits(logits, sampler)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(sampler.key)
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    drawn = jnp.take_along_axis(order, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
    return jnp.where(sampler.temperature > 0, drawn, greedy)


def _ranked_logits(logits: Array, sampler: Sampler) -> tuple[Array, Array]:
    """Scaled logits by falling value, -inf where top-k or top-p drops them; and the token of each rank."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=1)
    # The highest logit goes to zero first: a tiny temperature must not overflow.
    ranked = (ranked - ranked[:, :1]) / jnp.maximum(sampler.temperature, 1e-6)[:, None]
    ranked = jnp.where(jnp.arange(logits.shape[1])[None, :] < sampler.top_k[:, None], ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # A token stays while those before it do not reach top_p yet; at 1 everything stays, whatever cumsum rounds to.
    kept = (before < sampler.top_p[:, None]) | (sampler.top_p >= 1)[:, None]
    return jnp.where(kept, ranked, -jnp.inf), order


def _bounded(name: str, value: Any, low: float | int, high: float | int, *, whole: bool = False) -> None:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} must be {'an int' if whole else 'a number'}, not {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be in [{low}, {high}], not {value}")
