"""From a PyTorch checkpoint in the Hugging Face layout: `load_hf` makes a model of it, `import_hf` a native checkpoint.

All read tensor by tensor; `import_hf` holds a few megabytes of them in memory, however large the checkpoint is.
"""

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.checkpoint.native import (
    ArraySource,
    as_dtype,
    check_names_and_shapes,
    check_tensor_count,
    finalize,
    is_written,
    write_parameters,
)
from dsmoe_jax.checkpoint.zarr_io import raw_bytes, row_chunks
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, shardings
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.quantize import read_quantized
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.generation_config import GENERATION_CONFIG
from dsmoe_jax.text.special_ids import check_special_ids
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .cast import Cast, Loss
from .conversion import ConversionReport
from .foreign_names import adopt_names
from .hub import fetch, is_repo_id
from .param_mapping import TIED_HEAD, hf_names, hf_shapes, is_stacked
from .reader import CheckpointReader, path_inside
from .torch_pickle import show

_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What an export has for transformers; see exporter.py. It is written anew, and never run here.
CODE: Final = "configuration_deepseek.py"
AUTO_MAP: Final = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
_log = logging.getLogger(__name__)


def load_hf(
    path: str | Path, *, dtype: Any = None, mesh: Mesh | MeshConfig | None = None, progress: Meter = silent
) -> DeepSeekMoE:
    """The model of a Hugging Face folder, safetensors or `pytorch_model*.bin`; nothing is written.

    Each device's part of a tensor is read from the memory-mapped file straight onto it. `dtype` ("float32",
    "bfloat16" or "float16") casts on the way; None keeps what is stored. Raises `ValueError` naming the first tensor
    that is missing, surplus or of another shape or dtype, and for everything `ModelConfig` and the reader refuse.
    """
    wanted, path = as_dtype(dtype), user_path(path, "model")
    config = ModelConfig.from_file(path)
    with CheckpointReader(path) as reader:
        check_tensors(path, config, reader)
        places = shardings(config, mesh)
        specs, parts = abstract(config)[1], hf_names(config)
        params = {}
        with progress("loading", sum(map(_nbytes, reader.tensors.values()))) as advance:
            for name, spec in specs.items():

                def read(index: Any, name: str = name) -> np.ndarray:
                    views = [reader.read(part) for part in parts[name]]
                    if is_stacked(name):
                        return _copy([view[index[1:]] for view in views[index[0]]], wanted)
                    return _copy([views[0][index]], wanted)[0]

                params[name] = jax.make_array_from_callback(spec.shape, places[name], read)
                advance(sum(_nbytes(reader.tensors[part]) for part in parts[name]))
        # Copies are done before the files are unmapped.
        jax.block_until_ready(params)
    return assemble(config, params)


def load_hf_quantized(
    path: str | Path,
    scheme: str,
    *,
    double: bool = True,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
) -> tuple[ModelConfig, dict[str, Operand]]:
    """The config and the parameters of a Hugging Face folder, quantised as they are read: see `read_quantized`.

    Otherwise as `load_hf`.
    """
    wanted, path = as_dtype(dtype), user_path(path, "model")
    config = ModelConfig.from_file(path)
    with CheckpointReader(path) as reader:
        check_tensors(path, config, reader)
        parts = hf_names(config)

        def stored(name: str) -> Any:
            views = [reader.read(part) for part in parts[name]]
            return views if is_stacked(name) else views[0]

        return config, read_quantized(config, stored, scheme, double=double, dtype=wanted, mesh=mesh)


def import_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    progress: Meter = silent,
) -> ConversionReport:
    """Convert a Hugging Face folder to the native checkpoint `out`, tokenizer and generation config beside it.

    `source` may be the name of a repository on the hub, then `revision` is its branch, tag or commit. `dtype`
    ("float32", "bfloat16" or "float16") casts, and the answer says what that lost; None keeps what is stored. A run
    that was interrupted goes on where it stopped. Raises `ValueError` as `load_hf` does, if `out` exists, and if the
    disk has no room for it.
    """
    started = time.perf_counter()
    wanted = as_dtype(dtype)
    out = check_new_path(out)
    folder, origin = user_path(source, "source"), {}
    if is_repo_id(source):
        snapshot = fetch(str(source), revision=revision)
        folder, origin = snapshot.folder, {"repository": snapshot.repository, "revision": snapshot.revision}
    elif revision is not None:
        raise DSMoEError(f"revision {revision!r} goes with a repository on the hub, {source} is none")
    if is_native(folder):
        raise DSMoEError(f"{source} is a native checkpoint already")
    config = ModelConfig.from_file(folder)
    with CheckpointReader(folder) as reader:
        check_tensors(folder, config, reader)
        if wanted is not None:
            config = config.with_dtype(wanted.name)
        beside = travelling_files(folder)
        for file in beside:
            path_inside(folder, file.name)  # or refused: a link may lead anywhere
        for line in special_ids_beside(folder, config).lines:
            _log.warning("%s", line)
        parameters = _parameters(config, reader, wanted)
        total = sum(parameter.nbytes for parameter in parameters)
        job = {"import": str(folder.resolve()), "files": _versions(reader), "config": config.to_dict()}
        job["dtype"] = str(wanted)  # the config may name it already where the tensors are of several
        with atomic_dir(out, needs=total, job=job) as draft, progress("converting", total) as advance:
            reused = sum(parameter.nbytes for parameter in parameters if is_written(draft, parameter.name))
            if reused:
                _log.info("%s: goes on after %.2f of %.2f GB", out, reused / 1e9, total / 1e9)
            records = write_parameters(draft, parameters, advance)
            proof = finalize(draft.folder, config, records, beside, origin)
    return ConversionReport(
        path=out,
        tensors=sum(map(len, hf_names(config).values())),
        bytes=total,
        reused=reused,
        seconds=time.perf_counter() - started,
        loss=sum((Loss(*record.note) for record in records.values()), Loss()),
        proof=f"SHA-256 of every file and tensor in dsmoe_jax.json, its own: {proof}",
    )


def travelling_files(folder: Path) -> tuple[Path, ...]:
    """The files of `folder` that go unchanged wherever its weights go: the tokenizer's and the generation config."""
    generation = folder / GENERATION_CONFIG
    return (*tokenizer_files(folder), *([generation] if generation.is_file() else []))


class SpecialIds(NamedTuple):
    """What a folder says of special token ids beside its config."""

    tokenizer: Tokenizer | None
    generation_config: dict[str, Any] | None
    lines: list[str]  # of what looks wrong


def special_ids_beside(folder: Path, config: ModelConfig) -> SpecialIds:
    """Read the tokenizer and the generation config of `folder`; raises as `check_special_ids`."""
    try:
        tokenizer = Tokenizer.from_pretrained(folder) if tokenizer_files(folder) else None
    except ValueError:  # it travels unread, and generation will say what is wrong
        tokenizer = None
    path = folder / GENERATION_CONFIG
    generation_config = read_json(path) if path.is_file() else None
    lines = check_special_ids(config, tokenizer, generation_config, str(folder))
    return SpecialIds(tokenizer, generation_config, lines)


def check_tensors(path: str | Path, config: ModelConfig, reader: CheckpointReader) -> None:
    """Refuse a folder of which not every name, shape and dtype is as its config says; no tensor is read for it."""
    adapter, *weights = _ADAPTER
    if (reader.folder / adapter).is_file() and any((reader.folder / name).is_file() for name in weights):
        raise DSMoEError(
            f"{path}: holds a model and an adapter ({adapter}), of which transformers loads the adapter and its "
            "base; move one of them to a folder of its own"
        )
    adopt_names(reader, config)
    if reader.ignored:
        more = f" and {len(reader.ignored) - 8} more" if len(reader.ignored) > 8 else ""
        _log.info("%s: ignored: %s%s", path, ", ".join(map(show, reader.ignored[:8])), more)
    check_tensor_count(path, config, len(reader.tensors), per_stack=config.n_routed_experts or 0)
    if read_json(Path(path) / "config.json").get("auto_map", AUTO_MAP) != AUTO_MAP:
        _log.info("%s: auto_map is dropped, no code travels with a checkpoint", path)
    shapes = hf_shapes(config)
    found = {name: info.shape for name, info in reader.tensors.items()}
    if config.tie_word_embeddings and found.get(TIED_HEAD) == found.get(embedding := hf_names(config)["embed"][0]):
        if not _same_bits(reader.read(TIED_HEAD), reader.read(embedding)):
            raise DSMoEError(f"{path}: {TIED_HEAD} differs from {embedding} though tie_word_embeddings is true")
        del found[TIED_HEAD]
    check_names_and_shapes(path, shapes, found)
    for parts in hf_names(config).values():
        first = reader.tensors[parts[0]].dtype
        for part in parts:
            if (dtype := reader.tensors[part].dtype) != first:
                raise DSMoEError(f"{path}: tensor {part} is {dtype}, {parts[0]} of the same stack is {first}")


def stored_dtypes(path: str | Path) -> dict[str, np.dtype]:
    """The dtype of each of our parameters as the folder stores it, from the headers alone."""
    config = ModelConfig.from_file(path)
    with CheckpointReader(path) as reader:
        check_tensor_count(path, config, len(reader.tensors), per_stack=config.n_routed_experts or 0)
        adopt_names(reader, config)
        found = {name: info.dtype for name, info in reader.tensors.items()}
    return {name: found[parts[0]] for name, parts in hf_names(config).items() if parts[0] in found}


def _parameters(config: ModelConfig, reader: CheckpointReader, dtype: np.dtype | None) -> list[ArraySource]:
    """Our parameters, each with its pieces: the rows of its tensors, one after another."""

    def parameter(name: str, parts: tuple[str, ...]) -> ArraySource:
        cast = Cast(dtype)

        def pieces() -> Iterator[np.ndarray]:
            for part in parts:
                yield from map(cast, row_chunks(reader.read(part)))

        stored = reader.tensors[parts[0]].dtype
        return ArraySource(name, abstract(config)[1][name].shape, dtype or stored, pieces, lambda: cast.loss)

    return [parameter(name, parts) for name, parts in hf_names(config).items()]


def _versions(reader: CheckpointReader) -> dict[str, list[int]]:
    """Size and time of change of every file that tensors are read from."""
    files = sorted({info.file for info in reader.tensors.values()})
    return {file: [(stat := os.stat(reader.folder / file)).st_size, stat.st_mtime_ns] for file in files}


def _nbytes(info: Any) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _copy(views: list[np.ndarray], dtype: np.dtype | None) -> np.ndarray:
    """The views stacked in memory of our own: an array that aliased the mapped file would die with it."""
    out = np.empty((len(views), *views[0].shape), dtype or views[0].dtype)
    for i, view in enumerate(views):
        out[i] = view
    return out


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = zip(row_chunks(one), row_chunks(other), strict=True)
    return one.dtype == other.dtype and all(raw_bytes(a) == raw_bytes(b) for a, b in pairs)
