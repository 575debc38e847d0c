"""Scaled dot-product attention.

Start at `attention`; `BACKENDS` lists the implementations. Keys and values are [B, K, S, H]: one matmul per key-value
head and sequence. Query head n attends to key-value head n // G. Masks of whole sequences and scores exist for a chunk
of queries at a time, in the backward pass as well.
"""

import functools
import os
import warnings
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int, PRNGKeyArray
from dsmoe_jax.errors import check_choice

VARIABLE: Final = "DSMOE_ATTENTION_BACKEND"  # the default backend
# `plain`: XLA, in chunks of queries; the default, as neither has been measured on a GPU. `cudnn`: NVIDIA's flash
# attention, for full sequences in half precision on Ampere or newer; falls back to `plain`.
BACKENDS: Final = ("plain", "cudnn")

_CHUNK: Final = 64  # queries; their scores fit in cache: 4× faster at T = 512 on CPU, half of it from causality
_MAX_CHUNKS: Final = 16  # unrolled
_MAX_SAVED: Final = 512  # queries of a sequence whose probabilities are saved for the backward pass


class CausalMask(NamedTuple):
    """The parts of a causal mask.

    Query t attends to key s if s ≤ start + t, the key is valid, and both have the same segment or the key is shared.

    Attributes:
        start: Position of the first query among the keys; None: 0.
        valid: Keys that are not padding; None: all.
        query_segments: Segment of each query, with `key_segments`; None: one segment.
        key_segments: Segment of each key.
        shared: Keys of all segments; None: none.
    """

    start: Int[Array, "B"] | None = None
    valid: Bool[Array, "B S"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    shared: Bool[Array, "B S"] | None = None

    def chunk(self, start: int, end: int, keys: int) -> Bool[Array, "#B t s"]:
        """Return the mask of queries [start, end) and the first `keys` keys."""
        queries = jnp.arange(start, end)[None] + (0 if self.start is None else self.start[:, None])
        mask = jnp.arange(keys)[None, None, :] <= queries[:, :, None]
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, start:end, None] == self.key_segments[:, None, :keys]
            mask &= same if self.shared is None else same | self.shared[:, None, :keys]
        return mask if self.valid is None else mask & self.valid[:, None, :keys]


def choose_backend(backend: str | None = None) -> str:
    """Return the argument, or else the environment variable, or else the default."""
    name = "attention backend" if backend else VARIABLE
    backend = backend or os.environ.get(VARIABLE) or "plain"
    check_choice(name, backend, BACKENDS)
    return backend


@jax.named_scope("attention")
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"] | CausalMask,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Compute softmax(q kᵀ / √H) v under a mask, the softmax in fp32; a fully masked query gets the mean of v.

    `causal` asserts that an array is a causal mask (so T = S), which skips the scores above the diagonal.
    """
    T, S, backend = q.shape[1], k.shape[2], choose_backend(backend)
    by_parts = isinstance(mask, CausalMask)
    square = mask.start is None if by_parts else causal  # the queries are those of the keys
    dropping = bool(dropout) and dropout_key is not None
    if not by_parts and not causal:
        return _attention(q, k, v, mask, dropout_key, dropout)
    if (
        square
        and backend == "cudnn"
        and not _cudnn_unsupported(jax.default_backend(), q.dtype.name, q.shape[3], dropping)
    ):
        return _cudnn(q, k, v, jnp.broadcast_to(mask.chunk(0, T, S), (len(q), T, S)) if by_parts else mask)
    run = functools.partial(_attention, dropout=dropout)
    if T > _MAX_SAVED:
        run = jax.checkpoint(run)
    size = max(_CHUNK, -(-T // _MAX_CHUNKS))
    chunks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        keys = end if square else S
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        chunk = mask.chunk(start, end, keys) if by_parts else mask[:, start:end, :keys]
        chunks.append(run(q[:, start:end], k[:, :, :keys], v[:, :, :keys], chunk, key))
    return jnp.concatenate(chunks, axis=1)


@functools.cache
def _cudnn_unsupported(platform: str, dtype: str, head_dim: int, dropout: bool) -> str | None:
    """Return the reason why cuDNN does not support this, and warn once per reason; None if it does."""
    reasons = {
        f"it needs an NVIDIA GPU, got {platform!r}": platform != "gpu",
        f"it needs bfloat16 or float16, got {dtype}": dtype not in ("bfloat16", "float16"),
        f"it needs a head_dim that is a multiple of 8 up to 128, got {head_dim}": head_dim % 8 != 0 or head_dim > 128,
        "it has no dropout": dropout,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        warnings.warn(f"attention backend 'cudnn' cannot run here ({reason}): using plain", stacklevel=4)
    return reason


def _cudnn(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], mask: Bool[Array, "B T T"]
) -> Float[Array, "B T N H"]:
    """Call jax.nn's cuDNN attention; it has no segment IDs, so packed documents are separated by the mask."""
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], is_causal=True, implementation="cudnn")


def _attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
    dropout_key: PRNGKeyArray | None,
    dropout: float,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * (H**-0.5)
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, T, S), jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1)
    if dropout and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout, probs.shape)
        probs = jnp.where(keep, probs / (1 - dropout), 0)
    probs = probs.astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("bkqs,bksh->bkqh", probs, v, preferred_element_type=jnp.float32).astype(q.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
