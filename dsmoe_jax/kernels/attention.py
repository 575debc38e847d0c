"""Scaled dot-product attention.

Start at `attention`; `BACKENDS` lists the implementations. Keys and values are [B, K, S, H]: one matmul per key-value
head and sequence. Query head n attends to key-value head n // G.
"""

import functools
import os
import warnings
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, PRNGKeyArray
from dsmoe_jax.errors import check_choice

VARIABLE: Final = "DSMOE_ATTENTION_BACKEND"  # the default backend
# `plain`: XLA, in chunks of queries; the default, as neither has been measured on a GPU. `cudnn`: NVIDIA's flash
# attention, for full sequences in half precision on Ampere or newer; falls back to `plain`.
BACKENDS: Final = ("plain", "cudnn")

_CHUNK: Final = 64  # queries; their scores fit in cache: 4× faster at T = 512 on CPU, half of it from causality
_MAX_CHUNKS: Final = 16  # unrolled


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
    mask: Bool[Array, "B T S"],
    *,
    causal: bool = False,
    dropout: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N H"]:
    """Compute softmax(q kᵀ / √H) v under a mask, the softmax in fp32; a fully masked query gets the mean of v.

    `causal` asserts that the mask is causal (so T = S), which skips the scores above the diagonal.
    """
    T, backend = q.shape[1], choose_backend(backend)
    dropping = bool(dropout) and dropout_key is not None
    if not causal:
        return _attention(q, k, v, mask, dropout, dropout_key)
    if backend == "cudnn" and not _cudnn_unsupported(jax.default_backend(), q.dtype.name, q.shape[3], dropping):
        return _cudnn(q, k, v, mask)
    chunk = max(_CHUNK, -(-T // _MAX_CHUNKS))
    chunks = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        chunk_mask = mask[:, start:end, :end]
        chunks.append(_attention(q[:, start:end], k[:, :, :end], v[:, :, :end], chunk_mask, dropout, key))
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
    mask: Bool[Array, "B T S"],
    dropout: float,
    dropout_key: PRNGKeyArray | None,
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
