"""Load the parameters of a native checkpoint or a Hugging Face folder, dense or quantized: `load_params`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.checkpoint import native
from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import check_choice
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.quantize import SCHEMES, load_quantized, read_quantized
from dsmoe_jax.sharding import MeshConfig, as_mesh

from .importer import check_tensors
from .param_mapping import hf_names, is_stacked
from .reader import CheckpointReader
from .tensor_source import opens_as_native

Loaded = tuple[ModelConfig, dict[str, Any]]  # parameters by name: arrays, or operands if quantized


def load_params(
    path: Path,
    *,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
    quantize: str | None = None,
    verify: bool = True,
) -> Loaded:
    """Load config and parameters of a folder; the arguments are those of `dsmoe_jax.load`."""
    options = {"dtype": as_dtype(dtype), "mesh": as_mesh(mesh)}
    as_native = opens_as_native(path)
    if as_native:
        options["verify"] = verify
    if quantize is not None:
        check_choice("quantize", quantize, SCHEMES)
        options["scheme"] = quantize
    return _LOADERS[as_native, quantize is not None](path, **options)


def _load_hf(path: Path, *, dtype: np.dtype | None, mesh: Mesh | None) -> Loaded:
    """Load a Hugging Face folder; each device reads only its shards from the memory-mapped files."""
    config = ModelConfig.from_file(path)
    with CheckpointReader(path) as reader:
        check_tensors(path, config, reader)
        places, parts = shardings(config, mesh), hf_names(config)
        params = {}
        for name, spec in abstract(config)[1].items():

            def read(index: Any, name: str = name) -> np.ndarray:
                views = [reader.read(part) for part in parts[name]]
                if is_stacked(name):
                    return _copy([view[index[1:]] for view in views[index[0]]], dtype)
                return _copy([views[0][index]], dtype)[0]

            params[name] = jax.make_array_from_callback(spec.shape, places[name], read)
        # Finish copying before the files are unmapped.
        jax.block_until_ready(params)
    return config, params


def _load_hf_quantized(path: Path, *, scheme: str, dtype: np.dtype | None, mesh: Mesh | None) -> Loaded:
    """Load a Hugging Face folder, quantizing weights while they are read."""
    config = ModelConfig.from_file(path)
    with CheckpointReader(path) as reader:
        check_tensors(path, config, reader)
        names = hf_names(config)

        def stored(name: str) -> Any:
            views = [reader.read(part) for part in names[name]]
            return views if is_stacked(name) else views[0]

        return config, read_quantized(config, stored, scheme, dtype=dtype, mesh=mesh)


def _copy(views: list[np.ndarray], dtype: np.dtype | None) -> np.ndarray:
    """Return a stacked copy of the views; the mapped file will be closed."""
    out = np.empty((len(views), *views[0].shape), dtype or views[0].dtype)
    for i, view in enumerate(views):
        out[i] = view
    return out


# fmt: off
_LOADERS: Final[dict[tuple[bool, bool], Callable[..., Loaded]]] = {
    # native, quantized
    (True,  False): native.load_params,
    (True,  True):  load_quantized,
    (False, False): _load_hf,
    (False, True):  _load_hf_quantized,
}
# fmt: on
