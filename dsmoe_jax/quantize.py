"""Quantised weights as a transform of the parameters: int8, int4 and NF4, of a model or of a checkpoint as it is read.

Start at `SCHEMES`, then `quantize`. What is quantised are the weights in `KINDS`: the projections of attention and of
the dense, shared and routed feed-forward layers. Embedding, head, norms, biases and routers stay as they are, as in
QLoRA, which leaves the head alone, too: they are few, and a router's near-ties decide which experts run.
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
    """How weights become codes: those of a tile, divided by their scale, are rounded to the nearest value."""

    codebook: tuple[float, ...] | None  # the values that codes stand for; None: the code itself
    largest: float  # what the largest weight of a tile becomes
    tile: int | None  # weights that share a scale, running row-major over a matrix; None: a row, so one output


# fmt: off
SCHEMES: Final[dict[str, Scheme]] = {
    #               codebook                    largest  tile
    "int8": Scheme(None,                        127,     None),
    "int4": Scheme(tuple(map(float, range(-8, 8))), 7,   64),  # symmetric: -8 is not used
    "nf4":  Scheme(NF4,                         1,       64),  # as bitsandbytes
}
KINDS: Final[dict[str, str]] = {
    "attention": r"layers\.\d+\.attention\.[qkvo]\.weight",
    "dense":     r"layers\.\d+\.mlp\.\w+\.weight",
    "shared":    r"layers\.\d+\.moe\.shared\.\w+\.weight",
    "routed":    r"layers\.\d+\.moe\.experts\.\w+",
}
# fmt: on
_SCALES_TILE: Final = 256  # scales that share a scale of their own


def quantize(
    weight: Any, scheme: str, *, double: bool = True, mesh: Mesh | None = None, name: str = "weight"
) -> Quantized:
    """The weight [O, I], or the stack [E, O, I] (a sequence of matrices, too), in a scheme of `SCHEMES`.

    One matrix at a time is in memory in fp32, from where it lies: a NumPy array, a mapped file, a JAX array. `double`
    quantises the scales of 4-bit schemes in turn, which saves 0.37 bits a weight. On a mesh (default: the one that
    `weight` lies on) experts are split as dense ones are, everything else is on every device: tiles run across rows.

    Raises `ValueError`, calling the weight `name`, for values that are not finite and for rows that cannot be packed.
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
        """The leaves of these matrices' operand: made once for all devices that hold them."""
        arrays = [np.empty((stop - start, *leaf.shape), leaf.dtype) for leaf in leaves]
        for n in range(start, stop):
            # Off the mesh: on it, sums would be taken in another order.
            matrix = matrices[n] if mesh is None else np.asarray(matrices[n])
            for array, leaf in zip(arrays, jax.tree.leaves(encode(matrix)), strict=True):
                array[n - start] = leaf
                if not np.isfinite(array[n - start]).all():  # of a tile, the scale shows it
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
    """The operand of one matrix; traceable, unchecked."""
    O, I = weight.shape  # noqa: E741
    tile = scheme.tile or I
    codes, scales = _encode(weight.astype(jnp.float32).reshape(-1), scheme.codebook, scheme.largest, tile)
    codes = codes.reshape(O, I)
    if scheme.codebook is None:
        return Quantized(codes, scales.reshape(O, 1), tile=tile)
    if double:
        # Their mean is taken off first, then as the weights (arXiv 2305.14314, §3). As a sum of parts it is rounded
        # before it is subtracted; XLA would fuse the division of `mean` with that.
        offset = (scales * np.float32(1 / len(scales))).sum()
        scales = Quantized(
            *_encode(scales - offset, DYNAMIC, 1, _SCALES_TILE), offset=offset, tile=_SCALES_TILE, codebook=DYNAMIC
        )
    return Quantized(codes[:, ::2] << 4 | codes[:, 1::2], scales, tile=tile, codebook=scheme.codebook)


def quantized_spec(shape: tuple[int, ...], scheme: str, *, double: bool = True) -> Quantized:
    """What a weight [O, I] or [E, O, I] is once it is quantised: shapes and dtypes, nothing is computed."""
    encode = functools.partial(quantize_matrix, scheme=SCHEMES[scheme], double=double)
    return jax.eval_shape(jax.vmap(encode) if len(shape) == 3 else encode, jax.ShapeDtypeStruct(shape, jnp.float32))


def _encode(
    values: Float[Array, "n"], codebook: tuple[float, ...] | None, largest: float, tile: int
) -> tuple[Array, Array]:
    """The code of every value and the scale of every tile."""
    tiles = jnp.pad(values, (0, -len(values) % tile)).reshape(-1, tile)
    scales = jnp.abs(tiles).max(axis=1) * np.float32(1 / largest)
    # A tile of zeros has a scale without a reciprocal; its codes are those of zero.
    factors = jnp.where(scales < np.finfo(np.float32).tiny, 0, 1 / scales)
    units = (tiles * factors[:, None]).reshape(-1)[: len(values)]
    return jnp.round(units).astype(jnp.int8) if codebook is None else nearest(units, codebook), scales


def _scheme(name: str, into: int, weight: str) -> Scheme:
    if name not in SCHEMES:
        raise DSMoEError(f"scheme {name!r} is not one of {', '.join(SCHEMES)}")
    if SCHEMES[name].codebook is not None and into % 2:
        raise DSMoEError(f"{weight} has rows of {into} values; {name} packs two into a byte")
    return SCHEMES[name]


# --- whole models ---


def kind_of(name: str) -> str | None:
    """The kind, of `KINDS`, of the parameter called `name`; None if it is not quantised."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), None)


def quantize_params(params: Mapping[str, Operand], scheme: str, *, double: bool = True) -> dict[str, Operand]:
    """The parameters of a model (`model.split`), those of `KINDS` quantised, on the devices where they lie."""
    for name, value in params.items():
        if isinstance(value, Quantized | LowRank):
            raise DSMoEError(f"{name} is not dense; quantise before adapters are added, and once")
    return {
        name: quantize(value, scheme, double=double, name=name) if kind_of(name) else value
        for name, value in params.items()
    }


def quantize_embedding(params: Mapping[str, Operand]) -> dict[str, Operand]:
    """The parameters with the embedding in int8, a scale for each token, unless it is the head as well.

    For generation; training wants it dense.
    """
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
    """The config and the parameters of a native checkpoint, quantised as they are read: see `read_quantized`.

    Otherwise as `dsmoe_jax.load`.
    """
    path = user_path(path, "checkpoint")
    folder = path / PARAMETERS
    wanted = as_dtype(dtype)
    config, manifest = open_checkpoint(path, verify=verify)
    shapes = {name: spec.shape for name, spec in abstract(config)[1].items()}
    check_names_and_shapes(path, shapes, {name: tuple(tensor["shape"]) for name, tensor in manifest.tensors.items()})

    def stored(name: str) -> np.ndarray:
        array = open_array(folder, name)
        check_names_and_shapes(path, {name: shapes[name]}, {name: array.shape})
        return array

    return config, read_quantized(config, stored, scheme, double=double, dtype=wanted, mesh=mesh)


def read_quantized(
    config: ModelConfig,
    stored: Callable[[str], Any],
    scheme: str,
    *,
    double: bool = True,
    dtype: np.dtype | None = None,
    mesh: Mesh | MeshConfig | None = None,
) -> dict[str, Operand]:
    """The parameters of a model, made of what `stored` gives for each name, each straight onto its devices.

    The dense model is nowhere in memory: of a stack, a process reads the experts of its own devices, one at a time.
    `dtype` casts what is not quantised. Raises `ValueError` as `quantize` does.
    """
    mesh, params = as_mesh(mesh), {}
    for name, place in shardings(config, mesh).items():
        value = stored(name)
        if kind_of(name):
            params[name] = quantize(value, scheme, double=double, mesh=mesh, name=name)
        else:
            copy = functools.partial(_copy, value, dtype or value.dtype)
            params[name] = jax.make_array_from_callback(value.shape, place, copy)
    jax.block_until_ready(params)  # a file may be closed now
    return params


def _copy(stored: np.ndarray, dtype: np.dtype, index: Any) -> np.ndarray:
    """In memory of our own: an array that aliased a mapped file would change and die with it."""
    return np.array(stored[index], dtype)


# --- what it costs, what it saves ---


class Usage(NamedTuple):
    """How many weights there are of a kind, and how many bytes they take."""

    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / self.weights


def usage(params: Mapping[str, Operand]) -> dict[str, Usage]:
    """The memory of a model's parameters by kind (`KINDS`; the rest is "other"), without that of adapters."""
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
    """By kind, the rms of what quantising changed over the rms of the dense weights."""
    squares: dict[str, tuple[float, float]] = {}
    for name, value in quantized.items():
        if isinstance(value, Quantized):
            for matrix, operand in _matrices(dense[name], value):
                matrix = np.asarray(matrix, np.float64)
                change = np.asarray(_dequantize(operand)) - matrix
                kind = kind_of(name) or name
                changed, whole = squares.get(kind, (0.0, 0.0))
                squares[kind] = changed + np.square(change).sum(), whole + np.square(matrix).sum()
    return {kind: math.sqrt(changed / whole) for kind, (changed, whole) in squares.items()}


_dequantize = jax.jit(Quantized.dequantize)


def _matrices(dense: Any, quantized: Quantized) -> Sequence[tuple[Any, Quantized]]:
    """Each matrix of a weight or stack with its operand."""
    if dense.ndim == 2:
        return [(dense, quantized)]
    return [(dense[e], jax.tree.map(lambda leaf, e=e: leaf[e], quantized)) for e in range(len(dense))]
