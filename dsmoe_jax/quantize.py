"""Weight quantization to int8, int4 or NF4, of a model in memory or while loading a checkpoint.

Start at `SCHEMES`, then `quantize`. The projections in `KINDS` are quantized. Embedding, head, norms, biases and
routers stay dense, as in QLoRA: they are small, and near-ties in a router decide which experts run.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsmoe_jax.axes import Array, Float
from dsmoe_jax.checkpoint.manifest import PARAMETERS
from dsmoe_jax.checkpoint.native import check_names_and_shapes, open_checkpoint
from dsmoe_jax.checkpoint.zarr_io import open_array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.kernels.codebooks import DYNAMIC, NF4, nearest
from dsmoe_jax.kernels.operand import LowRank, Operand, Quantized
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.sharding import MeshConfig, as_mesh, sharding


class Scheme(NamedTuple):
    """A quantization scheme: weights are divided by their tile's scale and rounded to the nearest value."""

    codebook: tuple[float, ...] | None  # the value of each code; None: the code itself
    largest: float  # value of the largest weight of a tile
    tile: int | None  # weights per scale, row-major over a matrix; None: one row


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
    """Quantize a weight [O, I] or [E, O, I], one matrix at a time; the mesh defaults to that of the weight.

    `double` also quantizes the scales of 4-bit schemes, which saves 0.37 bits per weight. Experts are sharded over the
    expert axis; all else is replicated, as tiles span rows.
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
        """Quantize a range of matrices, once for all devices that share it."""
        arrays = [np.empty((stop - start, *leaf.shape), leaf.dtype) for leaf in leaves]
        for n in range(start, stop):
            # On the host: a mesh would sum in a different order.
            matrix = matrices[n] if mesh is None else np.asarray(matrices[n])
            for array, leaf in zip(arrays, jax.tree.leaves(encode(matrix)), strict=True):
                array[n - start] = leaf
                if not np.isfinite(array[n - start]).all():  # NaN and inf propagate to the scale of a tile
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
        # Subtract the mean, then quantize like weights (arXiv 2305.14314, §3). As a sum of products, the mean is
        # rounded before the subtraction; XLA would fuse the division in `mean` with it.
        offset = (scales * np.float32(1 / len(scales))).sum()
        encoded = _encode(scales - offset, DYNAMIC, 1, _SCALES_TILE)
        scales = Quantized(*encoded, offset=offset, tile=_SCALES_TILE, codebook=DYNAMIC)
    return Quantized(codes[:, ::2] << 4 | codes[:, 1::2], scales, tile=tile, codebook=scheme.codebook)


def quantized_spec(shape: tuple[int, ...], scheme: str, *, double: bool = True) -> Quantized:
    """Return the shapes and dtypes of a quantized weight [O, I] or [E, O, I] without computing it."""
    encode = functools.partial(quantize_matrix, scheme=SCHEMES[scheme], double=double)
    return jax.eval_shape(jax.vmap(encode) if len(shape) == 3 else encode, jax.ShapeDtypeStruct(shape, jnp.float32))


def _encode(
    values: Float[Array, "n"], codebook: tuple[float, ...] | None, largest: float, tile: int
) -> tuple[Array, Array]:
    """Return the code of each value and the scale of each tile."""
    tiles = jnp.pad(values, (0, -len(values) % tile)).reshape(-1, tile)
    scales = jnp.abs(tiles).max(axis=1) * np.float32(1 / largest)
    # A tile of zeros has no reciprocal scale; its codes are those of zero.
    factors = jnp.where(scales < np.finfo(np.float32).tiny, 0, 1 / scales)
    units = (tiles * factors[:, None]).reshape(-1)[: len(values)]
    return jnp.round(units).astype(jnp.int8) if codebook is None else nearest(units, codebook), scales


def _scheme(name: str, into: int, weight: str) -> Scheme:
    check_choice("scheme", name, SCHEMES)
    if SCHEMES[name].codebook is not None and into % 2:
        raise DSMoEError(f"{weight} must have rows of even length for {name}, got {into}")
    return SCHEMES[name]


def kind_of(name: str) -> str | None:
    """Return the key in `KINDS` of the parameter `name`; None if it is not quantized."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


def quantize_params(params: Mapping[str, Operand], scheme: str, *, double: bool = True) -> dict[str, Operand]:
    """Quantize the parameters of a model that are in `KINDS`, on their devices."""
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
    path: Path, *, scheme: str, dtype: np.dtype | None, mesh: Mesh | None, verify: bool
) -> tuple[ModelConfig, dict[str, Operand]]:
    """Load a native checkpoint and quantize it while reading; `dtype` casts the dense parameters."""
    folder = path / PARAMETERS
    config, manifest = open_checkpoint(path, verify=verify)
    shapes = {name: spec.shape for name, spec in abstract(config)[1].items()}
    check_names_and_shapes(path, shapes, {name: tuple(tensor["shape"]) for name, tensor in manifest.tensors.items()})

    def read_array(name: str) -> np.ndarray:
        array = open_array(folder, name)
        check_names_and_shapes(path, {name: shapes[name]}, {name: array.shape})
        return array

    return config, read_quantized(config, read_array, scheme, dtype=dtype, mesh=mesh)


def read_quantized(
    config: ModelConfig,
    read_array: Callable[[str], Any],
    scheme: str,
    *,
    dtype: np.dtype | None = None,
    mesh: Mesh | MeshConfig | None = None,
) -> dict[str, Operand]:
    """Read and quantize the parameters of a model, each directly onto its devices; `dtype` casts the dense ones.

    The dense model is never in memory: `read_array` returns memory-mapped arrays, of which a process reads the experts
    of its local devices, one at a time.
    """
    mesh, params = as_mesh(mesh), {}
    for name, place in shardings(config, mesh).items():
        value = read_array(name)
        if kind_of(name):
            params[name] = quantize(value, scheme, mesh=mesh, name=name)
        else:
            # A copy: an alias of a mapped file would become invalid when it is closed.
            copy = lambda index, value=value: np.array(value[index], dtype or value.dtype)  # noqa: E731
            params[name] = jax.make_array_from_callback(value.shape, place, copy)
    jax.block_until_ready(params)  # the caller may close the files now
    return params
