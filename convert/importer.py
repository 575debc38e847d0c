"""From a PyTorch checkpoint in the Hugging Face layout to a model. Start at `load_hf`."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.checkpoint import as_dtype, check_names_and_shapes, is_native, save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.json_file import read_json
from dsmoe_jax.model import DeepSeekMoE, ParamSpec, abstract, assemble, shardings
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.tokenizer import tokenizer_files

from .names import TIED_HEAD, hf_names, hf_shapes, is_stacked
from .reader import CheckpointReader

GENERATION_CONFIG: Final = "generation_config.json"
# Wraps the parameters as they are read, to show a bar, say.
Progress = Callable[[list[tuple[str, ParamSpec]]], Iterable[tuple[str, ParamSpec]]]
_log = logging.getLogger(__name__)


def load_hf(
    path: str | Path, *, dtype: Any = None, mesh: Mesh | MeshConfig | None = None, progress: Progress = iter
) -> DeepSeekMoE:
    """The model of a Hugging Face folder, safetensors or `pytorch_model*.bin`; nothing is written.

    Each device's part of a tensor is read from the memory-mapped file straight onto it. `dtype` ("float32",
    "bfloat16" or "float16") casts on the way; None keeps what is stored. Raises `ValueError` naming the first tensor
    that is missing, surplus or of another shape or dtype, and for everything `ModelConfig` and the reader refuse.
    """
    config = ModelConfig.from_file(path)
    wanted = as_dtype(dtype)
    with CheckpointReader(path) as reader:
        _check(path, config, reader)
        if "auto_map" in read_json(Path(path) / "config.json"):
            _log.info("%s: auto_map is dropped, no code travels with a checkpoint", path)
        places = shardings(config, mesh)
        specs, parts = abstract(config)[1], hf_names(config)
        params = {}
        for name, spec in progress(list(specs.items())):

            def read(index: Any, name: str = name) -> np.ndarray:
                views = [reader.read(part) for part in parts[name]]
                if is_stacked(name):
                    return _copy([view[index[1:]] for view in views[index[0]]], wanted)
                return _copy([views[0][index]], wanted)[0]

            params[name] = jax.make_array_from_callback(spec.shape, places[name], read)
        # Copies are done before the files are unmapped.
        jax.block_until_ready(params)
    return assemble(config, params)


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
    progress: Progress = iter,
) -> DeepSeekMoE:
    """Convert a Hugging Face folder to the native checkpoint `out`, tokenizer and generation config beside it.

    Returns the model that was saved. Raises `ValueError` as `load_hf` does, and if `out` exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists; nothing is overwritten")
    if is_native(source):
        raise ValueError(f"{source} is a native checkpoint already")
    model = load_hf(source, dtype=dtype, mesh=mesh, progress=progress)
    generation = Path(source) / GENERATION_CONFIG
    beside = (*tokenizer_files(source), *([generation] if generation.is_file() else []))
    save(model, out, beside=beside)
    return model


def _check(path: str | Path, config: ModelConfig, reader: CheckpointReader) -> None:
    """Every name, shape and dtype, before the first byte of a tensor is read."""
    shapes = hf_shapes(config)
    found = {name: info.shape for name, info in reader.tensors.items()}
    if config.tie_word_embeddings and found.get(TIED_HEAD) == found.get(embedding := hf_names(config)["embed"][0]):
        if not np.array_equal(_bits(reader.read(TIED_HEAD)), _bits(reader.read(embedding))):
            raise ValueError(f"{path}: {TIED_HEAD} differs from {embedding} though tie_word_embeddings is true")
        del found[TIED_HEAD]
    check_names_and_shapes(path, shapes, found)
    for parts in hf_names(config).values():
        first = reader.tensors[parts[0]].dtype
        for part in parts:
            if (dtype := reader.tensors[part].dtype) != first:
                raise ValueError(f"{path}: tensor {part} is {dtype}, {parts[0]} of the same stack is {first}")


def _copy(views: list[np.ndarray], dtype: np.dtype | None) -> np.ndarray:
    """The views stacked in memory of our own: an array that aliased the mapped file would die with it."""
    out = np.empty((len(views), *views[0].shape), dtype or views[0].dtype)
    for i, view in enumerate(views):
        out[i] = view
    return out


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
