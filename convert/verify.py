"""Is every bit still there? `verify` checks a native checkpoint, alone or against the folder it was converted from."""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint.manifest import TensorDamage, find_damage, read_manifest
from dsmoe_jax.checkpoint.zarr_io import raw_bytes, row_chunks
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.special_ids import exported_ids

from .exporter import NativeReader
from .importer import check_tensors, special_ids_beside
from .reader import CheckpointReader

# Fields of config.json that say nothing of what the model computes, or what the tensors themselves say.
_NOT_COMPARED: Final = ("torch_dtype", "dtype", "transformers_version", "architectures", "use_cache")


@dataclass
class Report:
    """What `verify` found; `asdict` of it is the JSON report."""

    native: str
    hf: str | None
    tensors: int = 0
    bytes: int = 0  # of the tensors that were compared, or of the files that were hashed
    mismatches: list[dict[str, Any]] = field(default_factory=list)  # file, tensor, what
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 by tensor, in Hugging Face's names if compared
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line."""
        what = f"{self.tensors:,} tensors, {self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s"
        equal = "all bits as they were written" if self.hf is None else f"bit for bit those of {self.hf}"
        found = f"{len(self.mismatches)} mismatches" if self.mismatches else equal
        return f"{self.native}: {what}: {found}"


def verify(native: str | Path, hf: str | Path | None = None, *, progress: Meter = silent) -> Report:
    """Compare every file and tensor of a native checkpoint with its manifest, then every tensor with those of `hf`.

    Reads everything, a few megabytes at a time. Raises `ValueError` only where there is nothing to compare: no native
    checkpoint, or no Hugging Face folder of the same tensors; every other finding is a mismatch in the report.
    """
    started = time.perf_counter()
    native = user_path(native, "checkpoint")
    manifest = read_manifest(native, verify=False)  # what is found goes into the report
    report = Report(str(native), None if hf is None else str(hf), len(manifest.tensors))
    report.hashes = {name: str(tensor.get("sha256")) for name, tensor in manifest.tensors.items()}
    report.bytes = sum(sums["bytes"] for sums in manifest.files.values())
    with progress("checking", report.bytes) as advance:
        found = list(find_damage(native, manifest, advance))
    if hf is not None and not found:
        found += _differences(NativeReader(native), user_path(hf, "Hugging Face folder"), report, progress)
    report.mismatches = [{"file": one.file, "tensor": one.tensor, "what": one.what} for one in found]
    report.seconds = time.perf_counter() - started
    return report


def _differences(native: NativeReader, folder: Path, report: Report, progress: Meter) -> Iterator[TensorDamage]:
    """Where the Hugging Face folder holds something else; fills in the report's counts and hashes."""
    theirs = ModelConfig.from_file(folder)
    with CheckpointReader(folder) as reader, ThreadPoolExecutor(1) as hasher:
        check_tensors(folder, native.config, reader)
        fields, other_fields = native.config.to_dict(), theirs.to_dict()
        # An export has the tokenizer's ids where the config has none of the vocabulary.
        tokenizer = special_ids_beside(native.folder, native.config).tokenizer
        exported = exported_ids(fields, tokenizer, native.config.vocab_size)
        for name, value in fields.items():
            other = other_fields.get(name)
            same = other in (value, exported[name]) or repr(other) == repr(value)  # NaN equals nothing
            if name not in _NOT_COMPARED and not same:
                yield TensorDamage("config.json", None, f"has {name} {value!r}, {folder} {other!r}")
        report.tensors, report.hashes = len(native.order), {}
        report.bytes = sum(native.read(name).nbytes for name in native.order)
        with progress("comparing", report.bytes) as advance:
            for name in native.order:
                ours, other, digest = native.read(name), reader.read(name), hashlib.sha256()
                differing = 0
                for one, two in zip(row_chunks(ours), _pieces_like(ours, other), strict=True):
                    data = raw_bytes(two)
                    hashing = hasher.submit(digest.update, data)
                    differing += _differing(one, two) if one.dtype == two.dtype else 0
                    hashing.result()
                    advance(one.nbytes)
                report.hashes[name] = digest.hexdigest()
                if ours.dtype != other.dtype:
                    what = f"is {other.dtype}, {ours.dtype} in {native.folder}"
                    yield TensorDamage(reader.tensors[name].file, name, what)
                elif differing:
                    what = f"differs in {differing:,} of {ours.size:,} values"
                    yield TensorDamage(reader.tensors[name].file, name, what)


def _pieces_like(ours: np.ndarray, other: np.ndarray) -> Iterator[np.ndarray]:
    """`other` in runs of as many rows as `row_chunks(ours)` has."""
    start = 0
    for piece in row_chunks(ours):
        yield other[start : start + len(piece)]
        start += len(piece)


def _differing(one: np.ndarray, two: np.ndarray) -> int:
    """How many values have other bits."""
    if raw_bytes(one) == raw_bytes(two):  # compares memory, several times as fast as counting
        return 0
    bits = np.dtype(f"u{one.itemsize}")
    return int((np.ascontiguousarray(one).view(bits) != np.ascontiguousarray(two).view(bits)).sum())
