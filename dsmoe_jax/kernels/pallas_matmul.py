"""Grouped matmul kernels in Pallas: lowered through Triton on NVIDIA GPUs, interpreted on CPU in tests.

Read `_gmm_kernel` first, then `_tgmm_kernel`; `grouped_matmul` defines the operations. `jax.experimental.pallas` is
slow to import and its Triton backend is deprecated since jax 0.11, so import this module only to call it. Inside a
shard_map both results vary as `rows` or `a` do; interpreted there, the kernels need `check_vma=False`.
"""

import functools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels import tuning
from dsmoe_jax.kernels.operand import contract


class Tile(NamedTuple):
    """The output [rows, columns] of one gmm program, and its step over the contracted axis: `depth` bytes."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Chosen by arithmetic, not measured; measurements are in `tuning`. Tensor cores need at least 16 of each, Triton powers
# of two. A [128, 128] accumulator takes 64 registers per thread of 8 warps, a stage 32 KiB of shared memory (of 164 on
# A100, 227 on H100) in any dtype, as depth is in bytes. Blocks start at their expert's first row, so half a block per
# expert is idle on average: fewer rows, smaller blocks. With very few rows the weights are read once at memory
# bandwidth, and narrow tiles give more programs. 256 columns are wrong on sm100 (marin#7484). Triton 3.9 spills no
# registers for sm80 and sm90.
_TILES: Final[tuple[tuple[int, Tile], ...]] = (
    # from this mean of rows per expert on:
    #    rows  columns  depth  warps  stages
    (256, Tile(128, 128, 128, 8, 3)),
    (64, Tile(64, 128, 128, 4, 3)),
    (0, Tile(16, 64, 256, 4, 4)),
)
# For tgmm the tile is one of a weight, and steps of `depth` bytes are rows; one program loops over all of its expert.
_WEIGHT_TILE: Final = Tile(128, 128, 128, 8, 3)


def gmm(
    rows: Float[Array, "R _"],
    weights: Float[Array, "E N K"],
    group_sizes: Int[Array, "E"],
    *,
    transposed: bool,
    out_dtype: Any,
    interpret: bool,
) -> Float[Array, "R _"]:
    """Compute W_e x for each row x, or Wᵀ_e x if `transposed`; `interpret` runs the kernel on any device, slowly."""
    E, N, K = weights.shape
    R, width = len(rows), K if transposed else N
    tile = tile_for(R, E, "gmm_transposed" if transposed else "gmm")
    blocks = _blocks(group_sizes, R, tile.rows)
    return _call(
        functools.partial(_gmm_kernel, tile=tile, transposed=transposed),
        # The first axis runs fastest on a GPU: concurrent programs share rows, and an expert's weights stay in L2.
        grid=(pl.cdiv(width, tile.columns), len(blocks.expert)),
        out=((R, width), out_dtype),
        tile=tile,
        interpret=interpret,
    )(*blocks, rows, weights)


def tgmm(
    a: Float[Array, "R N"], b: Float[Array, "R K"], group_sizes: Int[Array, "E"], *, out_dtype: Any, interpret: bool
) -> Float[Array, "E N K"]:
    """Sum a_r b_rᵀ over each expert's rows."""
    E, N, K = len(group_sizes), a.shape[1], b.shape[1]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tile = Tile(*(tuning.tile("tgmm") or _WEIGHT_TILE))
    return _call(
        functools.partial(_tgmm_kernel, tile=tile),
        grid=(pl.cdiv(K, tile.columns), pl.cdiv(N, tile.rows), E),
        out=((E, N, K), out_dtype),
        tile=tile,
        interpret=interpret,
    )(ends - group_sizes.astype(jnp.int32), ends, a, b)


def _gmm_kernel(expert_ref, start_ref, end_ref, rows_ref, weights_ref, out_ref, *, tile: Tile, transposed: bool):
    """Multiply one block of an expert's rows by one tile of its weight; no other program writes these elements."""
    column, block = pl.program_id(0) * tile.columns, pl.program_id(1)
    expert, start, end = expert_ref[block], start_ref[block], end_ref[block]
    E = weights_ref.shape[0]
    depth, width = rows_ref.shape[1], out_ref.shape[1]
    k = tile.depth // rows_ref.dtype.itemsize
    block_rows = _Span(start, tile.rows, end)
    columns = _Span(column, tile.columns, width)

    def step(i, total):
        inner = _Span(i * k, k, depth)
        x = _load(rows_ref, (), block_rows, inner)
        if transposed:
            return total + contract(x, _load(weights_ref, (expert,), inner, columns), 1, 0)
        return total + contract(x, _load(weights_ref, (expert,), columns, inner), 1, 1)

    # Blocks of rows without an expert are written with zeros; unused blocks have no rows. A product, as the Triton
    # lowering of jax 0.10.1 and 0.12.0 miscompiles `where` of two scalars as one of booleans.
    steps = ((expert < E) & (start < end)).astype(jnp.int32) * pl.cdiv(depth, k)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    _store(out_ref, (), block_rows, columns, total)


def _tgmm_kernel(start_ref, end_ref, a_ref, b_ref, out_ref, *, tile: Tile):
    """Compute one tile of an expert's weight gradient in a loop over its rows."""
    expert = pl.program_id(2)
    start, end = start_ref[expert], end_ref[expert]
    across = _Span(pl.program_id(1) * tile.rows, tile.rows, out_ref.shape[1])
    along = _Span(pl.program_id(0) * tile.columns, tile.columns, out_ref.shape[2])
    m = tile.depth // a_ref.dtype.itemsize

    def step(i, total):
        rows = _Span(start + i * m, m, end)
        return total + contract(_load(a_ref, (), rows, across), _load(b_ref, (), rows, along), 0, 0)

    total = jax.lax.fori_loop(0, pl.cdiv(end - start, m), step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    _store(out_ref, (expert,), across, along, total)


class _Span(NamedTuple):
    """`size` indices from `start` on; those from `end` on are masked."""

    start: Any
    size: int
    end: Any

    @property
    def inside(self) -> Array | None:
        """[size]: which indices are unmasked; None if the axis is a multiple of the tile."""
        if isinstance(self.end, int) and self.end % self.size == 0:
            return None
        return self.start + jnp.arange(self.size, dtype=jnp.int32) < self.end


def _load(ref, lead: tuple[Any, ...], rows: _Span, columns: _Span) -> Array:
    mask = _mask(rows, columns)
    # Masked elements must read as zeros: they may be NaN, or out of bounds.
    return triton.load(_at(ref, lead, rows, columns), mask=mask, other=None if mask is None else 0.0)


def _store(ref, lead: tuple[Any, ...], rows: _Span, columns: _Span, value: Array) -> None:
    triton.store(_at(ref, lead, rows, columns), value.astype(ref.dtype), mask=_mask(rows, columns))


def _at(ref, lead: tuple[Any, ...], rows: _Span, columns: _Span):
    return ref.at[(*lead, pl.ds(rows.start, rows.size), pl.ds(columns.start, columns.size))]


def _mask(rows: _Span, columns: _Span) -> Array | None:
    shape = (rows.size, columns.size)
    row, column = rows.inside, columns.inside
    parts = [jnp.broadcast_to(row[:, None], shape)] if row is not None else []
    parts += [jnp.broadcast_to(column[None, :], shape)] if column is not None else []
    return functools.reduce(jnp.logical_and, parts) if parts else None


def tile_for(rows: int, experts: int, matmul: str = "gmm") -> Tile:
    """Return the tile by the mean of rows per expert; tuned tiles apply to many rows."""
    least, tile = next((least, tile) for least, tile in _TILES if rows >= least * experts)
    return Tile(*((tuning.tile(matmul) if least == _TILES[0][0] else None) or tile))


class _Blocks(NamedTuple):
    """Blocks of rows of one expert each; rows without an expert have expert E."""

    expert: Int[Array, "n"]
    start: Int[Array, "n"]  # first row
    end: Int[Array, "n"]  # one past the expert's last row, possibly beyond the block


def _blocks(group_sizes: Int[Array, "E"], rows: int, block: int) -> _Blocks:
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, rows - sizes.sum(dtype=jnp.int32))
    per_expert = (sizes + block - 1) // block
    last = jnp.cumsum(per_expert, dtype=jnp.int32)
    # A block has at least one row, and each expert at most one partial block.
    n = min(rows, pl.cdiv(rows, block) + len(group_sizes))
    i = jnp.arange(n, dtype=jnp.int32)
    # compare_all: one small fused comparison instead of a loop of kernel launches.
    expert = jnp.searchsorted(last, i, side="right", method="compare_all").astype(jnp.int32).clip(max=len(sizes) - 1)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    # Unused blocks start after all rows.
    start = (ends - sizes)[expert] + (i - (last - per_expert)[expert]) * block
    return _Blocks(expert, start.clip(max=rows), ends[expert])


def _call(
    kernel: Callable[..., None], *, grid: tuple[int, ...], out: tuple[Any, Any], tile: Tile, interpret: bool
) -> Callable[..., Array]:
    def call(*operands: Array) -> Array:
        varying = jax.typeof(operands[-2]).mat  # the last two operands are those of the matmul
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(*out, manual_axis_type=varying),
            grid=grid,
            compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
        )(*operands)

    return call
