"""Scaled dot-product attention over 3-D keys and values.

Keys and values lie as [B·K, S, H], one batched matmul for every key-value head: on CPU the 4-D forms cost 10×
in decode. A query head reads key-value head `head // G`, so the G query heads of a group stand side by side.
"""

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, PRNGKeyArray


@jax.named_scope("attention")
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "BK S H"],
    v: Float[Array, "BK S H"],
    mask: Bool[Array, "B T S"],
    *,
    dropout: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v, where `mask` is true; the softmax in fp32.

    A query that may read nothing gets the mean over all keys: finite, and meant to be ignored.
    `dropout` falls on the probabilities and only where a `dropout_key` is given (training).
    """
    B, T, N, H = q.shape
    S = k.shape[1]
    K = k.shape[0] // B
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
    scores = jnp.einsum("bqh,bsh->bqs", q, k, preferred_element_type=jnp.float32) * (H**-0.5)
    scores = scores.reshape(B, K * G, T, S)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1)
    if dropout and dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, probs.shape)
        probs = jnp.where(kept, probs / (1 - dropout), 0)
    probs = probs.astype(v.dtype).reshape(B * K, G * T, S)
    out = jnp.einsum("bqs,bsh->bqh", probs, v, preferred_element_type=jnp.float32).astype(q.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
