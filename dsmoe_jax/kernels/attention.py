"""Scaled dot-product attention.

Start at `attention`; `BACKENDS` says what can compute it. Heads stand before tokens in keys and values, one matmul for
every key-value head of every row. A query head reads key-value head `head // G`, so the G query heads of a group stand
side by side.
"""

import functools
import os
import warnings
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, PRNGKeyArray

VARIABLE: Final = "DSMOE_ATTENTION_BACKEND"  # the backend where no argument names one
# `plain`: XLA, in chunks of queries. `cudnn`: flash attention of NVIDIA's library, for whole sequences in half
# precision on Ampere or newer; what it cannot serve, `plain` does. Which is faster is not measured yet, so `plain`
# is the default everywhere.
BACKENDS: Final = ("plain", "cudnn")

_CHUNK: Final = 64  # queries; their scores then stay near the core: 4× at T = 512 on CPU, half of it saved work
_MOST_CHUNKS: Final = 16  # they are unrolled


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
    """softmax(q kᵀ / √H) v, where `mask` is true; the softmax in fp32.

    `causal` promises that query t reads no key past t (so T = S): the others are then not computed.
    A query that may read nothing gets a mean over keys: finite, and meant to be ignored.
    `dropout` falls on the probabilities and only where a `dropout_key` is given (training).
    `backend` is one of `BACKENDS`, by default what the environment variable DSMOE_ATTENTION_BACKEND says. Raises
    `ValueError` for one that does not exist.
    """
    T, backend = q.shape[1], backend or os.environ.get(VARIABLE) or "plain"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist, only {', '.join(BACKENDS)}")
    dropped = bool(dropout) and dropout_key is not None
    if backend == "cudnn" and causal and not _beyond_cudnn(jax.default_backend(), q.dtype.name, q.shape[3], dropped):
        return _cudnn(q, k, v, mask)
    if not causal:
        return _attention(q, k, v, mask, dropout, dropout_key)
    chunk = max(_CHUNK, -(-T // _MOST_CHUNKS))
    pieces = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        mine = mask[:, start:end, :end]
        pieces.append(_attention(q[:, start:end], k[:, :, :end], v[:, :, :end], mine, dropout, key))
    return jnp.concatenate(pieces, axis=1)


@functools.cache
def _beyond_cudnn(platform: str, dtype: str, head_dim: int, dropout: bool) -> str | None:
    """Why cuDNN cannot serve this, said once for each reason; None where it can."""
    reasons = {
        f"it needs an NVIDIA GPU, this is {platform!r}": platform != "gpu",
        f"it needs bfloat16 or float16, not {dtype}": dtype not in ("bfloat16", "float16"),
        f"it needs heads of a multiple of 8 up to 128 wide, not {head_dim}": head_dim % 8 != 0 or head_dim > 128,
        "it has no dropout": dropout,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        warnings.warn(f"attention backend 'cudnn' cannot run here ({reason}): plain instead", stacklevel=4)
    return reason


def _cudnn(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], mask: Bool[Array, "B T T"]
) -> Float[Array, "B T N H"]:
    """By way of jax.nn. It has no ids of documents: what separates packed ones is the mask, and it is always given."""
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
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, probs.shape)
        probs = jnp.where(kept, probs / (1 - dropout), 0)
    probs = probs.astype(v.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("bkqs,bksh->bkqh", probs, v, preferred_element_type=jnp.float32).astype(q.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
