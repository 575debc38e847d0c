"""Convert PyTorch checkpoints in the Hugging Face layout to native ones. Start at `import_hf`.

Tensors are read one at a time, in a few megabytes of memory, whatever the size of the checkpoint.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint import native
from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.checkpoint.native import ArraySource, as_dtype, check_tensor_count
from dsmoe_jax.checkpoint.zarr_io import raw_bytes, row_chunks
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import abstract
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.generation_config import GENERATION_CONFIG
from dsmoe_jax.text.special_ids import check_special_ids
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .cast import Cast, CastStats, ConversionReport
from .hub import is_repo_id, resolve
from .param_mapping import TIED_HEAD, hf_names, hf_shapes
from .reader import CheckpointReader, path_inside
from .tensor_info import quote
from .tensor_names import normalize_names

_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# The code that exports include; see exporter.py. It is never copied or run on import.
AUTO_MAP: Final = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
MODELING: Final = {
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
}
_log = logging.getLogger(__name__)


def import_hf(
    source: str | Path,
    output_dir: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    progress: Meter = silent,
) -> ConversionReport:
    """Convert a Hugging Face folder or repository to a native checkpoint with its tokenizer and generation config.

    An interrupted import resumes.

    Args:
        source: Folder, or the id of a repository on the hub.
        output_dir: New native checkpoint.
        dtype: "float32", "bfloat16" or "float16" to cast; default: the stored dtypes.
        revision: Branch, tag or commit of the repository; default: `main`.
        progress: Progress meter.

    Returns:
        What was written.

    Raises:
        DSMoEError: `output_dir` exists, the disk is too full, the download fails, or the source is invalid.
    """
    started = time.perf_counter()
    cast_dtype = as_dtype(dtype)
    output_dir = check_new_path(output_dir)
    folder = resolve(source, revision, name="source")
    origin = {"repository": str(source), "revision": folder.name} if is_repo_id(source) else {}
    if is_native(folder):
        raise DSMoEError(f"{source} is already a native checkpoint")
    config = ModelConfig.from_file(folder)
    with CheckpointReader(folder) as reader:
        check_tensors(folder, config, reader)
        if cast_dtype is not None:
            config = config.with_dtype(cast_dtype.name)
        files = extra_files(folder)
        for file in files:
            path_inside(folder, file.name)  # rejects links that lead outside
        for warning in read_special_ids(folder, config)[2]:
            _log.warning("%s", warning)
        parameters = _parameters(config, reader, cast_dtype)
        total = sum(parameter.nbytes for parameter in parameters)
        job = {"import": str(folder.resolve()), "files": file_versions(reader), "config": config.to_dict()}
        job["dtype"] = str(cast_dtype)  # not implied by the config's where tensors have several dtypes
        with atomic_dir(output_dir, needs=total, job=job) as draft, progress("converting", total) as advance:
            reused = sum(parameter.nbytes for parameter in parameters if native.is_written(draft, parameter.name))
            if reused:
                _log.info("Resuming %s from %.2f of %.2f GB", output_dir, reused / 1e9, total / 1e9)
            records = native.write_parameters(draft, parameters, advance)
            checksum = native.finalize(draft.folder, config, records, files, origin)
    tensors, seconds = sum(map(len, hf_names(config).values())), time.perf_counter() - started
    stats = sum((CastStats(*record.note) for record in records.values()), CastStats())
    checksum = f"SHA-256 of every file and tensor in dsmoe_jax.json, SHA-256 {checksum}"
    return ConversionReport(output_dir, tensors, total, reused, seconds, stats, checksum)


def extra_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that are copied unchanged with the weights: the tokenizer's and the generation config."""
    generation = folder / GENERATION_CONFIG
    return (*tokenizer_files(folder), *([generation] if generation.is_file() else []))


def read_special_ids(folder: Path, config: ModelConfig) -> tuple[Tokenizer | None, dict[str, Any] | None, list[str]]:
    """Return tokenizer and generation config of a folder, and warnings about their special token ids."""
    try:
        tokenizer = Tokenizer.from_pretrained(folder) if tokenizer_files(folder) else None
    except DSMoEError:  # copied unchanged; generation will report the error
        tokenizer = None
    path = folder / GENERATION_CONFIG
    generation_config = read_json(path) if path.is_file() else None
    return tokenizer, generation_config, check_special_ids(config, tokenizer, generation_config, str(folder))


def check_tensors(path: str | Path, config: ModelConfig, reader: CheckpointReader) -> None:
    """Normalize the reader's tensor names and check them, shapes and dtypes against the config."""
    adapter, *weights = _ADAPTER
    if (reader.folder / adapter).is_file() and any((reader.folder / name).is_file() for name in weights):
        reason = "of which transformers loads the adapter; move one of them to another folder"
        raise DSMoEError(f"{path}: holds both a model and an adapter ({adapter}), {reason}")
    normalize_names(reader, config)
    if reader.ignored:
        more = f" and {len(reader.ignored) - 8} more" if len(reader.ignored) > 8 else ""
        _log.info("Ignoring in %s: %s%s", path, ", ".join(map(quote, reader.ignored[:8])), more)
    check_tensor_count(path, config, len(reader.tensors), per_stack=config.n_routed_experts or 0)
    if read_json(Path(path) / "config.json").get("auto_map") not in (None, AUTO_MAP, AUTO_MAP | MODELING):
        _log.info("Dropping auto_map of %s: remote code is not copied", path)
    shapes = hf_shapes(config)
    found = {name: info.shape for name, info in reader.tensors.items()}
    if config.tie_word_embeddings and found.get(TIED_HEAD) == found.get(embedding := hf_names(config)["embed"][0]):
        if not _same_bits(reader.read(TIED_HEAD), reader.read(embedding)):
            raise DSMoEError(f"{path}: {TIED_HEAD} differs from {embedding} though tie_word_embeddings is true")
        del found[TIED_HEAD]
    native.check_names_and_shapes(path, shapes, found)
    for parts in hf_names(config).values():
        first = reader.tensors[parts[0]].dtype
        for part in parts:
            if (dtype := reader.tensors[part].dtype) != first:
                raise DSMoEError(f"{path}: tensor {part} is {dtype}, but {parts[0]} of the same stack is {first}")


def stored_dtypes(path: str | Path) -> dict[str, np.dtype]:
    """Return the stored dtype of each of our parameters, reading only headers."""
    config = ModelConfig.from_file(path)
    with CheckpointReader(path) as reader:
        check_tensor_count(path, config, len(reader.tensors), per_stack=config.n_routed_experts or 0)
        normalize_names(reader, config)
        found = {name: info.dtype for name, info in reader.tensors.items()}
    return {name: found[parts[0]] for name, parts in hf_names(config).items() if parts[0] in found}


def _parameters(config: ModelConfig, reader: CheckpointReader, dtype: np.dtype | None) -> list[ArraySource]:
    """Return the source of each of our parameters, which yields its tensors in chunks of rows."""

    def parameter(name: str, parts: tuple[str, ...]) -> ArraySource:
        cast = Cast(dtype)

        def chunks() -> Iterator[np.ndarray]:
            for part in parts:
                yield from map(cast, row_chunks(reader.read(part)))

        stored = reader.tensors[parts[0]].dtype
        return ArraySource(name, abstract(config)[1][name].shape, dtype or stored, chunks, lambda: cast.stats)

    return [parameter(name, parts) for name, parts in hf_names(config).items()]


def file_versions(reader: CheckpointReader) -> dict[str, list[int]]:
    """Return size and modification time of every weight file."""
    files = sorted({info.file for info in reader.tensors.values()})
    return {file: [(stat := os.stat(reader.folder / file)).st_size, stat.st_mtime_ns] for file in files}


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = zip(row_chunks(one), row_chunks(other), strict=True)
    return one.dtype == other.dtype and all(raw_bytes(a) == raw_bytes(b) for a, b in pairs)
