"""Grouped matmul kernels in Pallas: lowered through Triton on NVIDIA GPUs, interpreted on CPU in tests.

Start at `_gmm_kernel`, then `_tgmm_kernel`; `grouped_matmul` defines the operations. Imported lazily: Pallas is slow to
import, and its Triton backend is deprecated since jax 0.11. Interpreted in a `shard_map`, the kernels need
`check_vma=False`.
"""

import functools
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels import tuning
from dsmoe_jax.kernels.operand import Blocks, contract
from dsmoe_jax.kernels.pallas_tiles import Span, load, store


class Tile(NamedTuple):
    """The output tile [rows, columns] of one gmm program, and its step over the contracted axis, in bytes."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By arithmetic; measured tiles are in `tuning`. Tensor cores need at least 16 of each, Triton powers of two. A
# [128, 128] accumulator takes 64 registers per thread of 8 warps, a stage 32 KiB of shared memory (of 164 on A100, 227
# on H100). Half a block per expert is idle on average, hence smaller blocks for fewer rows. With very few rows reading
# the weights dominates, and narrow tiles give more programs. 256 columns are wrong on sm100 (marin#7484). Triton 3.9
# spills no registers for sm80 and sm90.
_TILES: Final[tuple[tuple[int, Tile], ...]] = (
    # minimum mean of rows per expert:
    #    rows  columns  depth  warps  stages
    (256, Tile(128, 128, 128, 8, 3)),
    (64, Tile(64, 128, 128, 4, 3)),
    (0, Tile(16, 64, 256, 4, 4)),
)
# For tgmm: a tile of a weight; one program loops over its expert's rows in steps of `depth` bytes.
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
    # The first axis of the grid runs fastest on a GPU: concurrent programs share rows, and weights stay in L2.
    grid = (pl.cdiv(width, tile.columns), len(blocks[0]))
    kernel = functools.partial(_gmm_kernel, tile=tile, transposed=transposed)
    return _call(kernel, (*blocks, rows, weights), grid, ((R, width), out_dtype), tile, interpret)


def tgmm(
    a: Float[Array, "R N"], b: Float[Array, "R K"], group_sizes: Int[Array, "E"], *, out_dtype: Any, interpret: bool
) -> Float[Array, "E N K"]:
    """Sum a_r b_rᵀ over each expert's rows."""
    E, N, K = len(group_sizes), a.shape[1], b.shape[1]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tile = Tile(*(tuning.tile("tgmm") or _WEIGHT_TILE))
    operands = (ends - group_sizes.astype(jnp.int32), ends, a, b)
    grid = (pl.cdiv(K, tile.columns), pl.cdiv(N, tile.rows), E)
    return _call(functools.partial(_tgmm_kernel, tile=tile), operands, grid, ((E, N, K), out_dtype), tile, interpret)


def _gmm_kernel(expert_ref, start_ref, end_ref, rows_ref, weights_ref, out_ref, *, tile: Tile, transposed: bool):
    """Multiply one block of an expert's rows by one tile of its weight; no other program writes these elements."""
    column, block = pl.program_id(0) * tile.columns, pl.program_id(1)
    expert, start, end = expert_ref[block], start_ref[block], end_ref[block]
    E = weights_ref.shape[0]
    depth, width = rows_ref.shape[1], out_ref.shape[1]
    k = tile.depth // rows_ref.dtype.itemsize
    block_rows = Span(start, tile.rows, end)
    columns = Span(column, tile.columns, width)

    def step(i, total):
        inner = Span(i * k, k, depth)
        x = load(rows_ref, (block_rows, inner))
        if transposed:
            return total + contract(x, load(weights_ref, (expert, inner, columns)), 1, 0)
        return total + contract(x, load(weights_ref, (expert, columns, inner)), 1, 1)

    # Blocks without an expert are set to zero; unused blocks have no rows. A product, as the Triton lowering of jax
    # 0.10.1 and 0.12.0 miscompiles `where` of two scalars.
    steps = ((expert < E) & (start < end)).astype(jnp.int32) * pl.cdiv(depth, k)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    store(out_ref, (block_rows, columns), total)


def _tgmm_kernel(start_ref, end_ref, a_ref, b_ref, out_ref, *, tile: Tile):
    """Compute one tile of an expert's weight gradient in a loop over its rows."""
    expert = pl.program_id(2)
    start, end = start_ref[expert], end_ref[expert]
    across = Span(pl.program_id(1) * tile.rows, tile.rows, out_ref.shape[1])
    along = Span(pl.program_id(0) * tile.columns, tile.columns, out_ref.shape[2])
    m = tile.depth // a_ref.dtype.itemsize

    def step(i, total):
        rows = Span(start + i * m, m, end)
        return total + contract(load(a_ref, (rows, across)), load(b_ref, (rows, along)), 0, 0)

    total = jax.lax.fori_loop(0, pl.cdiv(end - start, m), step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    store(out_ref, (expert, across, along), total)


def tile_for(rows: int, experts: int, matmul: str = "gmm") -> Tile:
    """Return the tile for the mean of rows per expert; tuned tiles are for many rows."""
    least, tile = next((least, tile) for least, tile in _TILES if rows >= least * experts)
    return Tile(*((tuning.tile(matmul) if least == _TILES[0][0] else None) or tile))


def _blocks(group_sizes: Int[Array, "E"], rows: int, block: int) -> tuple[Array, Array, Array]:
    """Return the expert (E: none), first row and end of each block; unused blocks start after all rows."""
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, rows - sizes.sum(dtype=jnp.int32))
    # A block has at least one row, and each expert at most one partial block.
    blocks = Blocks.split(sizes, block, min(rows, pl.cdiv(rows, block) + len(group_sizes)))
    return blocks.expert, blocks.start.clip(max=rows), blocks.end


def _call(
    kernel: Any, operands: tuple[Array, ...], grid: tuple[int, ...], out: Any, tile: Tile, interpret: bool
) -> Array:
    varying = jax.typeof(operands[-2]).mat  # the last two operands are those of the matmul
    shape = jax.ShapeDtypeStruct(*out, manual_axis_type=varying)
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(kernel, shape, grid=grid, compiler_params=params, interpret=interpret)(*operands)
