"""Scaled dot-product attention.

Start at `attention`; `BACKENDS` lists the implementations, `DEFAULTS` where each is the default. Keys and values are
[B, K, S, H]: one matmul per key-value head and sequence. Query head n attends to key-value head n // G. Masks of whole
sequences and scores exist for a chunk of queries at a time, in the backward pass as well.
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int, PRNGKeyArray
from dsmoe_jax.errors import check_choice
from dsmoe_jax.sharding import divides, on_each_device

VARIABLE: Final = "DSMOE_ATTENTION_BACKEND"  # the default backend

_CHUNK: Final = 64  # queries; their scores fit in cache: 4× faster at T = 512 on CPU, half of it from causality
_MAX_CHUNKS: Final = 16  # unrolled
MAX_SAVED: Final = 512  # queries of a sequence whose probabilities are saved for the backward pass
_FEWEST: Final = 16  # queries of a tile of tensor cores
_QUERIES: Final = ("batch", None, "heads", None)  # logical axes
_KEYS: Final = ("batch", "kv_heads", None, None)


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


def chunk_size(queries: int) -> int:
    """Return the queries per chunk of `plain`."""
    return max(_CHUNK, -(-queries // _MAX_CHUNKS))


def choose_backend(platform: str, dtype: Any, backend: str | None = None) -> str:
    """Return the argument, or else the environment variable, or else the default of `DEFAULTS`."""
    dtype = "float32" if jnp.dtype(dtype) == jnp.float32 else "bfloat16"
    return requested_backend(backend) or DEFAULTS.get((platform, dtype), "plain")


def requested_backend(backend: str | None = None) -> str | None:
    """Return the backend of the argument, or else of the environment variable, or else None."""
    name, backend = ("attention backend", backend) if backend else (VARIABLE, os.environ.get(VARIABLE))
    if backend:
        check_choice(name, backend, BACKENDS)
    return backend or None


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
    """Compute softmax(q kᵀ / √H) v under a mask, the softmax in fp32.

    A fully masked query gets the mean of v, or zeros by `pallas`.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        mask: The parts of a causal mask, or any mask as an array.
        causal: An array is a causal mask (so T = S), which skips the scores above the diagonal.
        dropout: Rate at which probabilities are dropped, with `dropout_key`.
        dropout_key: Random key; None disables dropout.
        backend: A key of `BACKENDS`; default: `choose_backend`. Calls that it does not cover take `plain`.

    Returns:
        The output of each head.
    """
    T, S = q.shape[1], k.shape[2]
    backend = choose_backend(jax.default_backend(), q.dtype, backend)
    by_parts = isinstance(mask, CausalMask)
    square = mask.start is None if by_parts else causal  # the queries are those of the keys
    dropping = bool(dropout) and dropout_key is not None
    if not by_parts and not causal:
        return _attention(q, k, v, mask, dropout_key, dropout)
    covered = {"plain": False, "pallas": by_parts and T >= _FEWEST, "cudnn": square}
    if covered[backend]:
        even = divides(q.shape, _QUERIES) and divides(k.shape, _KEYS)
        call = Call(jax.default_backend(), q.dtype.name, q.shape[3], dropping, even)
        if not _unsupported(backend, call):
            return BACKENDS[backend].run(q, k, v, mask)
    run = functools.partial(_chunk, dropout=dropout)
    if T > MAX_SAVED:
        run = jax.checkpoint(run, static_argnums=(5, 6, 7))
    size = chunk_size(T)
    chunks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        chunks.append(run(q, k, v, mask, key, start, end, end if square else S))
    return jnp.concatenate(chunks, axis=1)


def _chunk(q, k, v, mask, dropout_key, start: int, end: int, keys: int, *, dropout: float) -> Float[Array, "B t N H"]:
    """Compute queries [start, end); slices made here are not saved for the backward pass."""
    chunk = mask.chunk(start, end, keys) if isinstance(mask, CausalMask) else mask[:, start:end, :keys]
    return _attention(q[:, start:end], k[:, :, :keys], v[:, :, :keys], chunk, dropout_key, dropout)


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


# --- other backends ---


class Call(NamedTuple):
    """What the conditions of a backend depend on."""

    platform: str
    dtype: str
    head_dim: int
    dropout: bool
    even: bool  # sequences and heads divide over the mesh


def _pallas_needs(call: Call) -> Mapping[str, bool]:
    return {
        f"an NVIDIA GPU, or a CPU to interpret the kernel, got {call.platform!r}": call.platform in ("gpu", "cpu"),
        f"a head_dim up to 256, got {call.head_dim}": call.head_dim <= 256,
        "sequences and heads that divide over the mesh": call.even,
        "no dropout": not call.dropout,
    }


def _cudnn_needs(call: Call) -> Mapping[str, bool]:
    return {
        f"an NVIDIA GPU, got {call.platform!r}": call.platform == "gpu",
        f"bfloat16 or float16, got {call.dtype}": call.dtype in ("bfloat16", "float16"),
        f"a head_dim that is a multiple of 8 up to 128, got {call.head_dim}": call.head_dim % 8 == 0
        and call.head_dim <= 128,
        "no dropout": not call.dropout,
    }


def _pallas(q: Array, k: Array, v: Array, mask: CausalMask) -> Array:
    """Call our flash attention; XLA cannot partition a kernel, so each device runs it on its sequences and heads."""
    from dsmoe_jax.kernels import pallas_attention  # slow to import

    positions = pallas_attention.Positions.of(mask, q, k)
    interpret = jax.default_backend() == "cpu"
    run = lambda q, k, v, *positions: pallas_attention.flash_attention(  # noqa: E731
        q, k, v, pallas_attention.Positions(*positions), interpret=interpret
    )
    axes = (_QUERIES, _KEYS, _KEYS, ("batch",), ("batch", None), ("batch", None))
    return on_each_device(run, axes, _QUERIES)(q, k, v, *positions)


def _cudnn(q: Array, k: Array, v: Array, mask: Array | CausalMask) -> Array:
    """Call jax.nn's cuDNN attention; it has no segment IDs, so packed documents are separated by a mask of T × T."""
    (B, T), S = q.shape[:2], k.shape[2]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    by_head: Any = None
    if not isinstance(mask, CausalMask):
        by_head = mask[:, None]
    elif any(part is not None for part in mask):
        by_head = jnp.broadcast_to(mask.chunk(0, T, S), (B, T, S))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=by_head, is_causal=True, implementation="cudnn")


class Backend(NamedTuple):
    """An implementation beside `plain`, for causal masks."""

    run: Callable[..., Array]  # of q, k, v and the mask
    needs: Callable[[Call], Mapping[str, bool]]  # conditions, and whether each is met


# `plain`: XLA, in chunks of queries, for any mask. `pallas`: our flash attention kernel, for 16 queries or more and a
# mask by parts. `cudnn`: NVIDIA's, for whole sequences.
BACKENDS: Final[Mapping[str, Backend]] = {
    "plain": Backend(_attention, lambda call: {}),
    "pallas": Backend(_pallas, _pallas_needs),
    "cudnn": Backend(_cudnn, _cudnn_needs),
}
# No other backend has been measured on a GPU. Never `cudnn` for training: it would write a mask of T × T.
# fmt: off
DEFAULTS: Final[Mapping[tuple[str, str], str]] = {
    # device  dtype
    ("cpu",   "float32"):  "plain",
    ("cpu",   "bfloat16"): "plain",
    ("gpu",   "float32"):  "plain",
    ("gpu",   "bfloat16"): "plain",
}
# fmt: on


@functools.cache
def _unsupported(backend: str, call: Call) -> str | None:
    """Return what the backend needs and the call lacks, and warn once; None if it can run."""
    lacks = next((need for need, met in BACKENDS[backend].needs(call).items() if not met), None)
    if lacks is not None:
        warnings.warn(f"attention backend {backend!r} cannot run here (it needs {lacks}): using plain", stacklevel=4)
    return lacks
