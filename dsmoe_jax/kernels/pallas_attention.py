"""Flash attention in Pallas: lowered through Triton on NVIDIA GPUs, interpreted on CPU in tests.

Start at `flash_attention`, then `_forward_kernel`. Scores exist for a tile of queries and keys at a time; the backward
pass computes them again from the log-sum-exp of each query (arXiv 2307.08691). Imported lazily, as `pallas_matmul`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels.operand import contract
from dsmoe_jax.kernels.pallas_tiles import Span, load, store

SHARED, INVALID = -(2**31), -(2**31) + 1  # segments of keys that every query, and no query, attends to
_LEAST: Final = -1e30  # finite, as the difference of two infinities is not a number
_LOG2_E: Final = math.log2(math.e)


class Tile(NamedTuple):
    """Queries and keys of one tile of scores, warps and pipeline stages of its program."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tile of each kernel."""

    forward: Tile
    dkv: Tile
    dq: Tile


# By register use, not measured.
TILES: Final = Tiles(forward=Tile(128, 64, 8, 2), dkv=Tile(64, 64, 8, 2), dq=Tile(64, 64, 8, 2))


class Positions(NamedTuple):
    """What the mask is made of: query t attends to key s if s ≤ start + t and their segments agree."""

    start: Int[Array, "B"]
    queries: Int[Array, "B T"]  # segments
    keys: Int[Array, "B S"]  # segments, or SHARED or INVALID

    @classmethod
    def of(cls, mask: Any, q: Float[Array, "B T N H"], k: Float[Array, "B K S H"]) -> "Positions":
        """Convert a `CausalMask`."""
        (B, T), S = q.shape[:2], k.shape[2]
        start, valid, queries, keys, shared = mask
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
        if queries is None or keys is None:
            queries, keys, shared = zeros(B, T), zeros(B, S), None
        keys = keys if shared is None else jnp.where(shared, SHARED, keys)
        keys = keys if valid is None else jnp.where(valid, keys, INVALID)
        return cls(*(x.astype(jnp.int32) for x in (zeros(B) if start is None else start, queries, keys)))


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Positions,
    *,
    tiles: Tiles = TILES,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute softmax(q kᵀ / √H) v; a query without keys gets zeros. `interpret` runs on any device, slowly."""
    return _flash(tiles, interpret, q, k, v, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(tiles: Tiles, interpret: bool, q: Array, k: Array, v: Array, positions: Positions) -> Array:
    return _forward(tiles, interpret, q, k, v, positions)[0]


def _flash_forward(tiles: Tiles, interpret: bool, q: Array, k: Array, v: Array, positions: Positions) -> Any:
    out, log_sum = _forward(tiles, interpret, q, k, v, positions)
    return out, (q, k, v, positions, out, log_sum)


def _forward(tiles: Tiles, interpret: bool, q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, ...]:
    """Return the output, and log2 of the sum of exponentials of each query, [B, N, T]."""
    B, T, N, _ = q.shape
    tile = _fit(tiles.forward, T, k.shape[2])
    shapes = [(q.shape, q.dtype), ((B, N, T), jnp.float32)]
    return _call(_forward_kernel, tile, interpret, (pl.cdiv(T, tile.queries), N, B), (*positions, q, k, v), shapes)


def _flash_backward(tiles: Tiles, interpret: bool, saved: Any, grad: Array) -> Any:
    q, k, v, positions, out, log_sum = saved
    (B, T, N, _), (_, K, S, _) = q.shape, k.shape
    # Of a softmax: dscore = p · (dp − Σ p dp), and Σ p dp = out · dout.
    delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    operands = (*positions, q, k, v, grad, log_sum, delta)
    tile = _fit(tiles.dq, T, S)
    (dq,) = _call(_dq_kernel, tile, interpret, (pl.cdiv(T, tile.queries), N, B), operands, [(q.shape, q.dtype)])
    tile = _fit(tiles.dkv, T, S)
    shapes = [(k.shape, k.dtype), (v.shape, v.dtype)]
    dk, dv = _call(_dkv_kernel, tile, interpret, (pl.cdiv(S, tile.keys), K, B), operands, shapes)
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


# --- kernels ---


class _Tiled:
    """The arrays of a kernel by tile: of one sequence, one query head and its key-value head."""

    def __init__(self, tile: Tile, refs: Any, query_head: Any, head: Any, sequence: Any):
        self.start_ref, self.query_segments, self.key_segments, self.q_ref, self.k_ref, self.v_ref = refs
        self.tile, self.sequence, self.query_head, self.head = tile, sequence, query_head, head
        self.T, self.S, self.H = self.q_ref.shape[1], self.k_ref.shape[2], self.q_ref.shape[3]
        self.width = Span(0, pl.next_power_of_2(self.H), self.H)
        self.start = triton.load(self.start_ref.at[sequence])

    def queries(self, index: Any) -> Span:
        return Span(index * self.tile.queries, self.tile.queries, self.T)

    def keys(self, index: Any) -> Span:
        return Span(index * self.tile.keys, self.tile.keys, self.S)

    def by_query(self, ref: Any, queries: Span) -> Array:
        """Load an array [B, T, N, H]."""
        return load(ref, (self.sequence, queries, self.query_head, self.width))

    def by_key(self, ref: Any, keys: Span) -> Array:
        """Load an array [B, K, S, H]."""
        return load(ref, (self.sequence, self.head, keys, self.width))

    def scores(self, q: Array, k: Array, queries: Span, keys: Span) -> tuple[Array, Array]:
        """Return the scores in units of log2, and their mask."""
        by_query = load(self.query_segments, (self.sequence, queries))[:, None]
        by_key = load(self.key_segments, (self.sequence, keys), other=INVALID)[None, :]
        mask = ((by_query == by_key) | (by_key == SHARED)) & (
            keys.indices[None, :] <= self.start + queries.indices[:, None]
        )
        return contract(q, k, 1, 1) * (self.H**-0.5 * _LOG2_E), mask

    def key_tiles(self, queries: Span) -> Array:
        """The number of tiles of keys up to the last query."""
        last = jnp.minimum(self.start + queries.start + self.tile.queries, self.S)
        return _blocks(last, self.tile.keys)


def _forward_kernel(*refs, tile: Tile):
    *inputs, out_ref, log_sum_ref = refs
    head, sequence = pl.program_id(1), pl.program_id(2)
    at = _Tiled(tile, inputs, head, _key_head(head, inputs), sequence)
    queries = at.queries(pl.program_id(0))
    q = at.by_query(at.q_ref, queries)

    def step(i: Any, carry: Any) -> Any:
        out, most, total = carry
        keys = at.keys(i)
        scores, mask = at.scores(q, at.by_key(at.k_ref, keys), queries, keys)
        higher = jnp.maximum(most, jnp.where(mask, scores, _LEAST).max(axis=1))
        probs = jnp.where(mask, jnp.exp2(scores - higher[:, None]), 0.0)
        shrink = jnp.exp2(most - higher)
        v = at.by_key(at.v_ref, keys)
        out = out * shrink[:, None] + contract(probs.astype(v.dtype), v, 1, 0)
        return out, higher, total * shrink + probs.sum(axis=1)

    zeros = jnp.zeros((tile.queries, at.width.size), jnp.float32)
    start = (zeros, jnp.full((tile.queries,), _LEAST, jnp.float32), jnp.zeros((tile.queries,), jnp.float32))
    out, most, total = jax.lax.fori_loop(0, at.key_tiles(queries), step, start)
    total = jnp.where(total > 0, total, 1.0)
    store(out_ref, (sequence, queries, head, at.width), out / total[:, None])
    store(log_sum_ref, (sequence, head, queries), most + jnp.log2(total))


def _dq_kernel(*refs, tile: Tile):
    *inputs, grad_ref, log_sum_ref, delta_ref, dq_ref = refs
    head, sequence = pl.program_id(1), pl.program_id(2)
    at = _Tiled(tile, inputs, head, _key_head(head, inputs), sequence)
    queries = at.queries(pl.program_id(0))
    q, grad = at.by_query(at.q_ref, queries), at.by_query(grad_ref, queries)
    log_sum, delta = (load(ref, (sequence, head, queries)) for ref in (log_sum_ref, delta_ref))

    def step(i: Any, dq: Array) -> Array:
        keys = at.keys(i)
        k, v = at.by_key(at.k_ref, keys), at.by_key(at.v_ref, keys)
        scores, mask = at.scores(q, k, queries, keys)
        probs = jnp.where(mask, jnp.exp2(scores - log_sum[:, None]), 0.0)
        dscores = probs * (contract(grad, v, 1, 1) - delta[:, None])
        return dq + contract(dscores.astype(k.dtype), k, 1, 0)

    zeros = jnp.zeros((tile.queries, at.width.size), jnp.float32)
    dq = jax.lax.fori_loop(0, at.key_tiles(queries), step, zeros) * at.H**-0.5
    store(dq_ref, (sequence, queries, head, at.width), dq)


def _dkv_kernel(*refs, tile: Tile):
    """Sum over the query heads of a key-value head, so that no two programs write the same gradient."""
    *inputs, grad_ref, log_sum_ref, delta_ref, dk_ref, dv_ref = refs
    head, sequence = pl.program_id(1), pl.program_id(2)
    groups = inputs[3].shape[2] // inputs[4].shape[1]
    at = _Tiled(tile, inputs, head, head, sequence)
    keys = at.keys(pl.program_id(0))
    k, v = at.by_key(at.k_ref, keys), at.by_key(at.v_ref, keys)
    # From the first query that attends to the first of the keys.
    first = jax.lax.div(jnp.maximum(keys.start - at.start, 0), tile.queries)
    blocks = jnp.maximum(pl.cdiv(at.T, tile.queries) - first, 0)

    def step(i: Any, carry: Any) -> Any:
        dk, dv = carry
        at.query_head = head * groups + jax.lax.div(i, blocks)
        queries = at.queries(first + jax.lax.rem(i, blocks))
        q, grad = at.by_query(at.q_ref, queries), at.by_query(grad_ref, queries)
        log_sum, delta = (load(ref, (sequence, at.query_head, queries)) for ref in (log_sum_ref, delta_ref))
        scores, mask = at.scores(q, k, queries, keys)
        probs = jnp.where(mask, jnp.exp2(scores - log_sum[:, None]), 0.0)
        dscores = probs * (contract(grad, v, 1, 1) - delta[:, None])
        return dk + contract(dscores.astype(q.dtype), q, 0, 0), dv + contract(probs.astype(grad.dtype), grad, 0, 0)

    zeros = jnp.zeros((tile.keys, at.width.size), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, groups * blocks, step, (zeros, zeros))
    store(dk_ref, (sequence, head, keys, at.width), dk * at.H**-0.5)
    store(dv_ref, (sequence, head, keys, at.width), dv)


def _key_head(query_head: Any, inputs: Any) -> Any:
    return jax.lax.div(query_head, inputs[3].shape[2] // inputs[4].shape[1])


def _blocks(size: Any, block: int) -> Array:
    """Divide a size, not negative, rounding up; `//` has a `where` of scalars, which Triton's lowering miscompiles."""
    return jax.lax.div(size + (block - 1), block)


def _fit(tile: Tile, T: int, S: int) -> Tile:
    """Shrink a tile to a short sequence; tensor cores need 16 of each."""
    return tile._replace(
        queries=min(tile.queries, max(16, pl.next_power_of_2(T))), keys=min(tile.keys, max(16, pl.next_power_of_2(S)))
    )


def _call(
    kernel: Callable[..., None],
    tile: Tile,
    interpret: bool,
    grid: tuple[int, ...],
    operands: tuple[Array, ...],
    out: list[tuple[tuple[int, ...], Any]],
) -> tuple[Array, ...]:
    varying = jax.typeof(operands[3]).mat  # of the queries
    shapes = [jax.ShapeDtypeStruct(*shape, manual_axis_type=varying) for shape in out]
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    run = functools.partial(kernel, tile=tile)
    name = f"flash_attention{kernel.__name__.removesuffix('_kernel')}"
    call: Any = pl.pallas_call(run, shapes, grid=grid, compiler_params=params, interpret=interpret, name=name)
    return tuple(call(*operands))
