"""Export a checkpoint to the Hugging Face layout, for vLLM, SGLang and llama.cpp. Start at `export_hf`."""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.checkpoint.zarr_io import raw_bytes, row_chunks
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance, Meter, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, check_outside, write_json
from dsmoe_jax.storage.direct_io import DirectFile
from dsmoe_jax.text.generation_config import GENERATION_CONFIG
from dsmoe_jax.text.special_ids import SPECIAL_IDS, drop_ids_outside_vocab, ids_for_export
from dsmoe_jax.text.tokenizer import uses_sentencepiece

from .cast import Cast, CastStats, ConversionReport
from .hub import resolve
from .importer import AUTO_MAP, MODELING, extra_files, read_special_ids
from .reader import SAFETENSORS_DTYPES, path_inside
from .tensor_source import TensorSource, open_source

_INDEX: Final = "model.safetensors.index.json"
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SENTENCEPIECE: Final = (
    "AutoTokenizer of transformers may encode text otherwise than tokenizer.model: in 4.x pass use_fast=False; "
    "in 5.x ids differ"
)
_JSON_BYTES: Final = 256  # of a tensor in header and index, about
_CODES: Final = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
# Code for transformers, which has no model_type "deepseek": the config class, which vLLM and SGLang load first, and the
# model. Templates end in .txt, so that nothing imports them here.
_TEMPLATES: Final = Path(__file__).parent
_log = logging.getLogger(__name__)


def export_hf(
    source: str | Path,
    output_dir: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    revision: str | None = None,
    with_modeling: bool = False,
    card: Callable[[ModelConfig], str] | None = None,
    progress: Meter = silent,
) -> ConversionReport:
    """Export a checkpoint as a Hugging Face folder: safetensors, index, config and tokenizer.

    Without a cast tensors are exported bit for bit; those of a native checkpoint are checked against their SHA-256.
    With `trust_remote_code=True` transformers' `AutoConfig` can load the config. An interrupted export resumes.

    Args:
        source: Native checkpoint, or a Hugging Face folder or hub id to shard or cast anew.
        output_dir: New folder.
        max_shard_size: Maximum size of a file in bytes, or "5GB", "500MB", "2GiB".
        dtype: "float32", "bfloat16" or "float16" to cast; default: the stored dtypes.
        revision: Branch, tag or commit of a hub id; default: `main`.
        with_modeling: Add PyTorch code of the model, so that transformers' `AutoModelForCausalLM` opens the folder with
            `trust_remote_code=True`.
        card: Returns the text of a README.md, given the config of the export; default: none is written.
        progress: Progress meter.

    Returns:
        What was written.

    Raises:
        DSMoEError: `output_dir` exists, the checkpoint is damaged, or the disk is too full.
    """
    started = time.perf_counter()
    cast_dtype, limit = as_dtype(dtype), parse_size(max_shard_size)
    output_dir = check_new_path(output_dir)
    with open_source(resolve(source, revision, name="source")) as reader:
        check_outside(output_dir, reader.folder)
        auto_map = AUTO_MAP | (MODELING if with_modeling else {})
        return _export(reader, output_dir, limit, cast_dtype, auto_map, card, progress, started)


def _export(
    reader: TensorSource,
    output_dir: Path,
    limit: int,
    cast_dtype: Any,
    auto_map: dict[str, str],
    card: Callable[[ModelConfig], str] | None,
    progress: Meter,
    started: float,
) -> ConversionReport:
    tokenizer, generation_config, warnings = read_special_ids(reader.folder, reader.config)
    if uses_sentencepiece(reader.folder):
        warnings = [*warnings, _SENTENCEPIECE]
    for warning in warnings:
        _log.warning("%s", warning)
    sizes = {name: reader.read(name).size * (cast_dtype or reader.read(name).dtype).itemsize for name in reader.order}
    shards = _shards(sizes, limit)
    total = sum(sizes.values())
    shard_options = [limit, str(cast_dtype)]
    job = {"export": str(reader.folder.resolve()), "manifest": reader.version, "shards": shard_options}
    digests = {name: hashlib.sha256() for name in reader.sha256}
    stats, reused = CastStats(), 0
    files = extra_files(reader.folder)
    small = sum(path.stat().st_size for path in files) + _JSON_BYTES * len(sizes)
    with atomic_dir(output_dir, needs=total + small, job=job) as draft, progress("exporting", total) as advance:
        for file, names in shards.items():
            if file in draft.finished and (draft.folder / file).is_file():
                reused += sum(sizes[name] for name in names)
                for name in names:
                    if digest := digests.get(reader.order[name][0]):
                        digest.update(raw_bytes(reader.read(name)))
                    advance(sizes[name])
            else:
                draft.finish(file, list(_write_shard(draft.folder / file, names, reader, cast_dtype, digests, advance)))
            stats += CastStats(*draft.finished[file])
        for name, sha256 in reader.sha256.items():
            if digests[name].hexdigest() != sha256:
                raise DSMoEError(f"{reader.folder}: damaged checkpoint: SHA-256 mismatch of tensor {name}")
        config = reader.config
        stored = {(cast_dtype or reader.read(name).dtype).name for name in reader.order}
        if len(stored) == 1:
            config = config.with_dtype(stored.pop())
        for path in files:
            path_inside(reader.folder, path.name)  # rejects links that lead outside
            shutil.copyfile(path, draft.folder / path.name)
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(draft.folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if card is not None:
            (draft.folder / "README.md").write_text(card(config), encoding="utf-8")
        fields = ids_for_export(config.to_dict(), tokenizer, config.vocab_size)
        _write_configs(draft.folder, fields, generation_config, auto_map)
    seconds, checksum = time.perf_counter() - started, "verified every tensor against the manifest's SHA-256"
    if not reader.sha256:
        checksum = f"{reader.folder} has no SHA-256 to verify; compare with `dsmoe verify`"
    return ConversionReport(output_dir, len(reader.order), total, reused, seconds, stats, checksum)


def parse_size(size: int | str) -> int:
    """Return the bytes of a size such as "5GB"."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMG]i?B)?", str(size))
    if match is None or (found := int(float(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise DSMoEError(f"max_shard_size must be a size such as 5GB, 500MB or 2GiB, got {size!r}")
    return found


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Return the tensors of each file, in order; a tensor that does not fit starts a new file."""
    groups, size = [[]], 0
    for name, nbytes in sizes.items():
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_shard(
    path: Path, names: list[str], reader: TensorSource, dtype: Any, digests: dict[str, Any], advance: Advance
) -> CastStats:
    """Write a safetensors file and hash its tensors by our names."""
    cast = Cast(dtype)
    path.unlink(missing_ok=True)  # of an interrupted run
    with DirectFile(path) as out, ThreadPoolExecutor(1) as hasher:
        out.write(_header(names, reader, dtype))
        for name in names:
            for chunk in row_chunks(reader.read(name)):
                digest = digests.get(reader.order[name][0])
                hashing = digest and hasher.submit(digest.update, raw_bytes(chunk))
                cast_chunk = cast(chunk)
                out.write(raw_bytes(cast_chunk))
                if hashing:
                    hashing.result()
                advance(cast_chunk.nbytes)
    return cast.stats


def _header(names: list[str], reader: TensorSource, dtype: np.dtype | None) -> bytes:
    """Return a safetensors header: its length in 8 bytes, then JSON with each tensor's dtype, shape and offsets."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = reader.read(name)
        stored = dtype or tensor.dtype
        start, end = end, end + tensor.size * stored.itemsize
        header[name] = {"dtype": _CODES[stored], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_configs(
    folder: Path, fields: dict[str, Any], generation_config: dict[str, Any] | None, auto_map: dict[str, str]
) -> None:
    """Write the generation config without invalid ids, the code and, last, config.json, which loaders look for."""
    path = folder / GENERATION_CONFIG
    if generation_config is None:
        present = {name: fields[name] for name in SPECIAL_IDS if fields[name] is not None}
        write_json(path, {"_from_model_config": True, **present})
    elif (cleaned := drop_ids_outside_vocab(generation_config, fields["vocab_size"])) != generation_config:
        dropped = (name for name in SPECIAL_IDS if generation_config.get(name) and cleaned[name] is None)
        path.unlink()
        write_json(path, cleaned | {name: fields[name] for name in dropped})
    for module in {target.partition(".")[0] for target in auto_map.values()}:
        shutil.copyfile(_TEMPLATES / f"{module}.py.txt", folder / f"{module}.py")
    write_json(folder / "config.json", fields | {"auto_map": auto_map})
