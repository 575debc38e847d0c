"""Weight quantization: int8, int4 and NF4, of a model in memory or of a checkpoint while it is read.

Start at `SCHEMES`, then `quantize`. The weights in `KINDS` are quantized: projections of attention and of dense, shared
and routed feed-forward layers. Embedding, head, norms, biases and routers stay dense, as in QLoRA: they are small, and
near-ties in a router decide which experts run.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsmoe_jax.axes import Array, Float
from dsmoe_jax.checkpoint.manifest import PARAMETERS
from dsmoe_jax.checkpoint.native import as_dtype, check_names_and_shapes, open_checkpoint
from dsmoe_jax.checkpoint.zarr_io import open_array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.codebooks import DYNAMIC, NF4, nearest
from dsmoe_jax.kernels.operand import LowRank, Operand, Quantized
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.sharding import MeshConfig, as_mesh, sharding
from dsmoe_jax.storage.paths import user_path


class Scheme(NamedTuple):
    """A quantization scheme: the weights of a tile, divided by its scale, are rounded to the nearest value.

    Attributes:
      codebook: The value of each code; None: the code itself.
      largest: What the largest weight of a tile maps to.
      tile: Weights per scale, row-major over a matrix; None: one row, so one output.
    """

    codebook: tuple[float, ...] | None
    largest: float
    tile: int | None


# fmt: off
SCHEMES: Final[dict[str, Scheme]] = {
    #               codebook                    largest  tile
    "int8": Scheme(None,                        127,     None),
    "int4": Scheme(tuple(map(float, range(-8, 8))), 7,   64),  # symmetric: -8 is unused
    "nf4":  Scheme(NF4,                         1,       64),  # as in bitsandbytes
}
KINDS: Final[dict[str, str]] = {
    "attention": r"layers\.\d+\.attention\.[qkvo]\.weight",
    "dense":     r"layers\.\d+\.mlp\.\w+\.weight",
    "shared":    r"layers\.\d+\.moe\.shared\.\w+\.weight",
    "routed":    r"layers\.\d+\.moe\.experts\.\w+",
}
# fmt: on
_SCALES_TILE: Final = 256  # scales per second-level scale


def quantize(
    weight: Any, scheme: str, *, double: bool = True, mesh: Mesh | None = None, name: str = "weight"
) -> Quantized:
    """Quantize a weight, with one matrix at a time in memory in fp32.

    Args:
      weight: [O, I], or a stack or sequence [E, O, I]; a NumPy array, a memory-mapped file or a JAX array.
      scheme: A key of `SCHEMES`.
      double: Quantize the scales of 4-bit schemes as well, which saves 0.37 bits per weight.
      mesh: The devices; default those of `weight`. Experts are sharded as dense ones, all else is replicated, as tiles
        span rows.
      name: The parameter, for errors.

    Raises:
      DSMoEError: The weight has values that are not finite, or rows that cannot be packed.
    """
    stacked = getattr(weight, "ndim", 3) == 3
    matrices: Any = weight if stacked else (weight,)
    if mesh is None and isinstance(place := getattr(weight, "sharding", None), NamedSharding):
        assert isinstance(place.mesh, Mesh)
        mesh = place.mesh
    encode = functools.partial(quantize_matrix, scheme=_scheme(scheme, matrices[0].shape[1], name), double=double)
    leaves, tree = jax.tree.flatten(jax.eval_shape(encode, jax.ShapeDtypeStruct(matrices[0].shape, jnp.float32)))

    @functools.cache
    def part(start: int, stop: int) -> list[np.ndarray]:
        """The leaves for some matrices, computed once for all devices that have them."""
        arrays = [np.empty((stop - start, *leaf.shape), leaf.dtype) for leaf in leaves]
        for n in range(start, stop):
            # Not on the mesh, where sums are in another order.
            matrix = matrices[n] if mesh is None else np.asarray(matrices[n])
            for array, leaf in zip(arrays, jax.tree.leaves(encode(matrix)), strict=True):
                array[n - start] = leaf
                if not np.isfinite(array[n - start]).all():  # the scale of a tile shows it
                    raise DSMoEError(f"{name}{f'[{n}]' if stacked else ''} has values that are not finite")
        return arrays

    def placed(n: int) -> Array:
        shape = (len(matrices),) * stacked + leaves[n].shape
        axes = ("experts",) * stacked + (None,) * leaves[n].ndim

        def read(index: Any) -> np.ndarray:
            return part(*index[0].indices(len(matrices))[:2])[n] if stacked else part(0, 1)[n][0]

        return jax.make_array_from_callback(shape, sharding(name, shape, axes, mesh), read)

    return jax.tree.unflatten(tree, [placed(n) for n in range(len(leaves))])


@functools.partial(jax.jit, static_argnames=("scheme", "double"))
def quantize_matrix(weight: Float[Array, "O I"], scheme: Scheme, double: bool) -> Quantized:
    """Quantize one matrix; traceable, unchecked."""
    O, I = weight.shape  # noqa: E741
    tile = scheme.tile or I
    codes, scales = _encode(weight.astype(jnp.float32).reshape(-1), scheme.codebook, scheme.largest, tile)
    codes = codes.reshape(O, I)
    if scheme.codebook is None:
        return Quantized(codes, scales.reshape(O, 1), tile=tile)
    if double:
        # Subtract the mean, then quantize as weights (arXiv 2305.14314, §3). As a sum of products the mean is rounded
        # before the subtraction; XLA would fuse the division of `mean` with it.
        offset = (scales * np.float32(1 / len(scales))).sum()
        scales = Quantized(
            *_encode(scales - offset, DYNAMIC, 1, _SCALES_TILE), offset=offset, tile=_SCALES_TILE, codebook=DYNAMIC
        )
    return Quantized(codes[:, ::2] << 4 | codes[:, 1::2], scales, tile=tile, codebook=scheme.codebook)


def quantized_spec(shape: tuple[int, ...], scheme: str, *, double: bool = True) -> Quantized:
    """Shapes and dtypes of a quantized weight [O, I] or [E, O, I]; nothing is computed."""
    encode = functools.partial(quantize_matrix, scheme=SCHEMES[scheme], double=double)
    return jax.eval_shape(jax.vmap(encode) if len(shape) == 3 else encode, jax.ShapeDtypeStruct(shape, jnp.float32))


def _encode(
    values: Float[Array, "n"], codebook: tuple[float, ...] | None, largest: float, tile: int
) -> tuple[Array, Array]:
    """The codes of all values and the scales of all tiles."""
    tiles = jnp.pad(values, (0, -len(values) % tile)).reshape(-1, tile)
    scales = jnp.abs(tiles).max(axis=1) * np.float32(1 / largest)
    # The scale of a tile of zeros has no reciprocal; its codes are those of zero.
    factors = jnp.where(scales < np.finfo(np.float32).tiny, 0, 1 / scales)
    units = (tiles * factors[:, None]).reshape(-1)[: len(values)]
    return jnp.round(units).astype(jnp.int8) if codebook is None else nearest(units, codebook), scales


def _scheme(name: str, into: int, weight: str) -> Scheme:
    if name not in SCHEMES:
        raise DSMoEError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}")
    if SCHEMES[name].codebook is not None and into % 2:
        raise DSMoEError(f"{weight} must have rows of even length for {name}, got {into}")
    return SCHEMES[name]


# --- whole models ---


def kind_of(name: str) -> str | None:
    """The key in `KINDS` of the parameter `name`; None if it is not quantized."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


def quantize_params(params: Mapping[str, Operand], scheme: str, *, double: bool = True) -> dict[str, Operand]:
    """Quantize the parameters of a model that are in `KINDS`, on their devices.

    Args:
      params: From `model.split`.
      scheme: A key of `SCHEMES`.
      double: As in `quantize`.

    Raises:
      DSMoEError: A parameter is already quantized or has an adapter, and as in `quantize`.
    """
    for name, value in params.items():
        if isinstance(value, Quantized | LowRank):
            raise DSMoEError(f"{name} must be dense: quantize once, before adding adapters")
    return {
        name: quantize(value, scheme, double=double, name=name) if kind_of(name) else value
        for name, value in params.items()
    }


def quantize_embedding(params: Mapping[str, Operand]) -> dict[str, Operand]:
    """Quantize the embedding to int8 with a scale per token, unless it is tied to the head; for generation."""
    if "head.weight" not in params:
        return dict(params)
    return {**params, "embed": quantize(params["embed"], "int8", name="embed")}


def load_quantized(
    path: str | Path,
    scheme: str,
    *,
    double: bool = True,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
    verify: bool = True,
) -> tuple[ModelConfig, dict[str, Operand]]:
    """Load a native checkpoint and quantize it while reading.

    Args:
      path: The checkpoint.
      scheme: A key of `SCHEMES`.
      double: As in `quantize`.
      dtype: Cast what is not quantized; None keeps the stored dtype.
      mesh: The devices; None is the default device.
      verify: As in `dsmoe_jax.load`.

    Returns:
      The config, and the parameters by dotted path.

    Raises:
      DSMoEError: As in `dsmoe_jax.load` and `quantize`.
    """
    path = user_path(path, "checkpoint")
    folder = path / PARAMETERS
    target = as_dtype(dtype)
    config, manifest = open_checkpoint(path, verify=verify)
    shapes = {name: spec.shape for name, spec in abstract(config)[1].items()}
    check_names_and_shapes(path, shapes, {name: tuple(tensor["shape"]) for name, tensor in manifest.tensors.items()})

    def read_array(name: str) -> np.ndarray:
        array = open_array(folder, name)
        check_names_and_shapes(path, {name: shapes[name]}, {name: array.shape})
        return array

    return config, read_quantized(config, read_array, scheme, double=double, dtype=target, mesh=mesh)


def read_quantized(
    config: ModelConfig,
    read_array: Callable[[str], Any],
    scheme: str,
    *,
    double: bool = True,
    dtype: np.dtype | None = None,
    mesh: Mesh | MeshConfig | None = None,
) -> dict[str, Operand]:
    """Read and quantize the parameters of a model, each directly onto its devices.

    The dense model is never in memory: a process reads the experts of its own devices, one at a time.

    Args:
      config: The model.
      read_array: Returns the stored parameter of a name, memory-mapped.
      scheme: A key of `SCHEMES`.
      double: As in `quantize`.
      dtype: Cast what is not quantized.
      mesh: The devices; None is the default device.

    Raises:
      DSMoEError: As in `quantize`.
    """
    mesh, params = as_mesh(mesh), {}
    for name, place in shardings(config, mesh).items():
        value = read_array(name)
        if kind_of(name):
            params[name] = quantize(value, scheme, double=double, mesh=mesh, name=name)
        else:
            copy = functools.partial(_copy, value, dtype or value.dtype)
            params[name] = jax.make_array_from_callback(value.shape, place, copy)
    jax.block_until_ready(params)  # the caller may close the files now
    return params


def _copy(stored: np.ndarray, dtype: np.dtype, index: Any) -> np.ndarray:
    """A copy: an array that aliases a mapped file would change and end with it."""
    return np.array(stored[index], dtype)


# --- memory and error ---


class Usage(NamedTuple):
    """Memory of the weights of a kind.

    Attributes:
      weights: How many there are.
      bytes: Their size.
    """

    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.weights


def usage(params: Mapping[str, Operand]) -> dict[str, Usage]:
    """The memory of parameters by kind (`KINDS`, the rest is "other"), without adapters."""
    used: dict[str, Usage] = {}
    for name, value in params.items():
        base = value.base if isinstance(value, LowRank) else value
        codes = base.codes if isinstance(base, Quantized) else base
        weights = math.prod(codes.shape) * (2 if isinstance(base, Quantized) and base.packed else 1)
        kind = kind_of(name) or "other"
        before = used.get(kind, Usage(0, 0))
        used[kind] = Usage(before.weights + weights, before.bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
    return used


def relative_error(dense: Mapping[str, Any], quantized: Mapping[str, Operand]) -> dict[str, float]:
    """The rms of the quantization error over the rms of the dense weights, by kind."""
    squares: dict[str, tuple[float, float]] = {}
    for name, value in quantized.items():
        if isinstance(value, Quantized):
            for matrix, operand in _matrices(dense[name], value):
                matrix = np.asarray(matrix, np.float64)
                change = np.asarray(_dequantize(operand)) - matrix
                kind = kind_of(name) or name
                error, total = squares.get(kind, (0.0, 0.0))
                squares[kind] = error + np.square(change).sum(), total + np.square(matrix).sum()
    return {kind: math.sqrt(error / total) for kind, (error, total) in squares.items()}


_dequantize = jax.jit(Quantized.dequantize)


def _matrices(dense: Any, quantized: Quantized) -> Sequence[tuple[Any, Quantized]]:
    """The matrices of a weight or stack, each with its operand."""
    if dense.ndim == 2:
        return [(dense, quantized)]
    return [(dense[e], jax.tree.map(lambda leaf, e=e: leaf[e], quantized)) for e in range(len(dense))]
