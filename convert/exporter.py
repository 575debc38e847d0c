"""From a native checkpoint to the Hugging Face layout, which vLLM, SGLang and llama.cpp read. Start at `export_hf`."""

import hashlib
import json
import logging
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint.manifest import PARAMETERS, Manifest, read_manifest
from dsmoe_jax.checkpoint.native import as_dtype, check_names_and_shapes, check_tensor_count
from dsmoe_jax.checkpoint.zarr_io import open_array, raw_bytes, row_chunks
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import abstract
from dsmoe_jax.progress import Advance, Meter, silent
from dsmoe_jax.storage.atomic_dir import StagingDir, atomic_dir, check_new_path, write_json
from dsmoe_jax.storage.direct_io import DirectFile
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.generation_config import GENERATION_CONFIG
from dsmoe_jax.text.special_ids import SPECIAL_IDS, drop_ids_outside_vocab, exported_ids

from .cast import Cast, Loss
from .conversion import ConversionReport
from .importer import AUTO_MAP, CODE, SpecialIds, special_ids_beside, travelling_files
from .param_mapping import export_order
from .reader import SAFETENSORS_DTYPES

_INDEX: Final = "model.safetensors.index.json"
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_CODES: Final = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
# Our own class for transformers' AutoConfig, which knows no model_type "deepseek"; vLLM and SGLang ask it first.
_CODE: Final = Path(__file__).with_name("configuration_deepseek.py.txt")
_log = logging.getLogger(__name__)


class NativeReader:
    """The tensors of a native checkpoint by Hugging Face's names, memory-mapped.

    Raises `ValueError` where manifest, config and files do not agree; the bytes of the tensors are not looked at.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.config = ModelConfig.from_file(folder)
        check_tensor_count(folder, self.config, len(self.manifest.tensors))
        found = {name: tuple(tensor["shape"]) for name, tensor in self.manifest.tensors.items()}
        check_names_and_shapes(folder, {name: spec.shape for name, spec in abstract(self.config)[1].items()}, found)
        self._arrays = {name: open_array(folder / PARAMETERS, name) for name in found}
        for name, array in self._arrays.items():
            if (said := self.manifest.tensors[name]["dtype"]) != array.dtype.name or array.shape != found[name]:
                raise DSMoEError(
                    f"{folder}: tensor {name} is {array.dtype} {list(array.shape)}, its manifest has {said}"
                )
        self.order = {hf_name: (ours, expert) for hf_name, ours, expert in export_order(self.config)}

    def read(self, hf_name: str) -> np.ndarray:
        """A view on the tensor."""
        ours, expert = self.order[hf_name]
        return self._arrays[ours] if expert is None else self._arrays[ours][expert]


class _Proof:
    """Hashes our tensors as their parts go by, each in order, and compares with the manifest at the end."""

    def __init__(self, native: NativeReader):
        self._native = native
        self._digests = {name: hashlib.sha256() for name in native.manifest.tensors}

    def see(self, hf_name: str, data: memoryview) -> None:
        self._digests[self._native.order[hf_name][0]].update(data)

    def check(self) -> None:
        for name, tensor in self._native.manifest.tensors.items():
            if self._digests[name].hexdigest() != tensor.get("sha256"):
                raise DSMoEError(
                    f"{self._native.folder}: damaged checkpoint: tensor {name} has other bytes than were written"
                )


def export_hf(
    native: str | Path,
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: Any = None,
    progress: Meter = silent,
) -> ConversionReport:
    """Write the native checkpoint as the new Hugging Face folder `out`: safetensors, index, config, tokenizer.

    What was imported from such a folder goes out tensor for tensor and bit for bit; each is compared with the SHA-256
    in the manifest on its way. `configuration_deepseek.py` and `auto_map` let transformers' `AutoConfig` read the
    config with `trust_remote_code=True`.

    `max_shard_size` is in bytes, or "5GB", "500MB", "2GiB"; `dtype` ("float32", "bfloat16" or "float16") casts, and the
    answer says what that lost. A run that was interrupted goes on where it stopped. Raises `ValueError` if `out`
    exists, for a damaged checkpoint, and if the disk has no room.
    """
    started = time.perf_counter()
    wanted, limit = as_dtype(dtype), parse_size(max_shard_size)
    out = check_new_path(out)
    reader = NativeReader(user_path(native, "checkpoint"))
    ids = special_ids_beside(reader.folder, reader.config)
    for line in ids.lines:
        _log.warning("%s", line)
    sizes = {name: reader.read(name).size * (wanted or reader.read(name).dtype).itemsize for name in reader.order}
    shards = _shards(sizes, limit)
    total = sum(sizes.values())
    job = {"export": str(reader.folder.resolve()), "manifest": reader.manifest.sha256, "shards": [limit, str(wanted)]}
    proof, loss, reused = _Proof(reader), Loss(), 0
    with atomic_dir(out, needs=total, job=job) as draft, progress("exporting", total) as advance:
        for file, names in shards.items():
            if file in draft.finished and (draft.folder / file).is_file():
                reused += sum(sizes[name] for name in names)
                for name in names:
                    proof.see(name, raw_bytes(reader.read(name)))
                    advance(sizes[name])
            else:
                _write_shard(draft, file, names, reader, wanted, proof, advance)
            loss += Loss(*draft.finished[file])
        proof.check()
        _write_beside(draft.folder, reader, shards, total, wanted, ids)
    return ConversionReport(
        path=out,
        tensors=len(reader.order),
        bytes=total,
        reused=reused,
        seconds=time.perf_counter() - started,
        loss=loss,
        proof="every tensor read had the SHA-256 of the manifest",
    )


def parse_size(size: int | str) -> int:
    """Bytes of "5GB" and the like; `ValueError` where it is no such size, or 0."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMG]i?B)?", str(size))
    if match is None or (found := int(float(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise DSMoEError(f"max_shard_size {size!r} is not a number of bytes such as 5GB, 500MB or 2GiB")
    return found


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Which tensors lie in which file: in order, a new file where the next would not fit."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_shard(
    draft: StagingDir,
    file: str,
    names: list[str],
    reader: NativeReader,
    dtype: np.dtype | None,
    proof: _Proof,
    advance: Advance,
) -> None:
    cast = Cast(dtype)
    path = draft.folder / file
    path.unlink(missing_ok=True)  # what an interrupted run left of it
    with DirectFile(path) as out, ThreadPoolExecutor(1) as hasher:
        out.write(_header(names, reader, dtype))
        for name in names:
            for piece in row_chunks(reader.read(name)):
                data = raw_bytes(piece)
                hashing = hasher.submit(proof.see, name, data)
                cast_piece = cast(piece)
                out.write(raw_bytes(cast_piece))
                hashing.result()
                advance(cast_piece.nbytes)
    draft.finish(file, list(cast.loss))


def _header(names: list[str], reader: NativeReader, dtype: np.dtype | None) -> bytes:
    """A safetensors file's head: its length in 8 bytes, then JSON that says where each tensor lies in the data."""
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


def _write_beside(
    folder: Path,
    reader: NativeReader,
    shards: dict[str, list[str]],
    total: int,
    dtype: np.dtype | None,
    ids: SpecialIds,
) -> None:
    """Everything but the shards; the config last, without which no loader takes the folder for a model."""
    config = reader.config
    stored = {(dtype or reader.read(name).dtype).name for name in reader.order}
    if len(stored) == 1:
        config = config.with_dtype(stored.pop())
    for path in travelling_files(reader.folder):
        shutil.copyfile(path, folder / path.name)
    fields = exported_ids(config.to_dict(), ids.tokenizer, config.vocab_size)
    if ids.generation_config is None:
        told = {name: fields[name] for name in SPECIAL_IDS if fields[name] is not None}
        write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **told})
    elif (kept := drop_ids_outside_vocab(ids.generation_config, config.vocab_size)) != ids.generation_config:
        lost = {name: fields[name] for name in SPECIAL_IDS if ids.generation_config.get(name) and kept[name] is None}
        (folder / GENERATION_CONFIG).unlink()
        write_json(folder / GENERATION_CONFIG, kept | lost)
    weight_map = {name: file for file, names in shards.items() for name in names}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / CODE).write_bytes(_CODE.read_bytes())
    write_json(folder / "config.json", fields | {"auto_map": AUTO_MAP})
