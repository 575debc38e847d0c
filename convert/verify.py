"""Verify a native checkpoint against its manifest and the folder it was converted from: `verify`."""

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
from dsmoe_jax.text.special_ids import ids_for_export

from .exporter import NativeReader
from .importer import check_tensors, read_special_ids
from .reader import CheckpointReader

# Config fields that do not affect the model or follow from the tensors.
_NOT_COMPARED: Final = ("torch_dtype", "dtype", "transformers_version", "architectures", "use_cache")


@dataclass
class VerificationReport:
    """Result of `verify`; `to_dict` gives the JSON report.

    Attributes:
        native: The native checkpoint.
        hf: The Hugging Face folder it was compared with, if any.
        tensors: Number of tensors compared.
        bytes: Bytes of the tensors compared, or of the files hashed.
        mismatches: One dict for each mismatch: file, tensor and what is wrong.
        hashes: SHA-256 by tensor; with `hf` by Hugging Face's names.
        seconds: Wall-clock time.
    """

    native: str
    hf: str | None
    tensors: int = 0
    bytes: int = 0
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a one-line summary."""
        size = f"{self.tensors:,} tensors, {self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s"
        equal = "all checksums match" if self.hf is None else f"bitwise equal to {self.hf}"
        result = f"{len(self.mismatches)} mismatches" if self.mismatches else equal
        return f"{self.native}: {size}: {result}"


def verify(native: str | Path, hf: str | Path | None = None, *, progress: Meter = silent) -> VerificationReport:
    """Compare a native checkpoint with its manifest and, bit for bit, with a Hugging Face folder.

    Args:
        native: Native checkpoint.
        hf: Hugging Face folder, if any.
        progress: Progress meter.

    Returns:
        The report; `mismatches` is empty if all bits agree.

    Raises:
        DSMoEError: `native` is not a native checkpoint, or `hf` has other tensors.
    """
    started = time.perf_counter()
    native = user_path(native, "checkpoint")
    manifest = read_manifest(native, verify=False)  # damage is reported below
    report = VerificationReport(str(native), None if hf is None else str(hf), len(manifest.tensors))
    report.hashes = {name: str(tensor.get("sha256")) for name, tensor in manifest.tensors.items()}
    report.bytes = sum(sums["bytes"] for sums in manifest.files.values())
    with progress("checking", report.bytes) as advance:
        found = list(find_damage(native, manifest, advance))
    if hf is not None and not found:
        found += _differences(NativeReader(native), user_path(hf, "Hugging Face folder"), report, progress)
    report.mismatches = [{"file": one.file, "tensor": one.tensor, "what": one.what} for one in found]
    report.seconds = time.perf_counter() - started
    return report


def _differences(
    native: NativeReader, folder: Path, report: VerificationReport, progress: Meter
) -> Iterator[TensorDamage]:
    """Yield the differences from the Hugging Face folder and fill in the report's sizes and hashes."""
    hf_config = ModelConfig.from_file(folder)
    with CheckpointReader(folder) as reader, ThreadPoolExecutor(1) as hasher:
        check_tensors(folder, native.config, reader)
        fields, hf_fields = native.config.to_dict(), hf_config.to_dict()
        # Exports replace missing and invalid ids by the tokenizer's.
        tokenizer = read_special_ids(native.folder, native.config)[0]
        exported = ids_for_export(fields, tokenizer, native.config.vocab_size)
        for name, value in fields.items():
            other = hf_fields.get(name)
            same = other in (value, exported[name]) or repr(other) == repr(value)  # NaN differs from itself
            if name not in _NOT_COMPARED and not same:
                yield TensorDamage("config.json", None, f"has {name} {value!r}, {folder} {other!r}")
        report.tensors, report.hashes = len(native.order), {}
        report.bytes = sum(native.read(name).nbytes for name in native.order)
        with progress("comparing", report.bytes) as advance:
            for name in native.order:
                ours, other, digest = native.read(name), reader.read(name), hashlib.sha256()
                differing = start = 0
                for chunk in row_chunks(ours):
                    other_chunk = other[start : start + len(chunk)]
                    start += len(chunk)
                    hashing = hasher.submit(digest.update, raw_bytes(other_chunk))
                    differing += _count_differing(chunk, other_chunk) if ours.dtype == other.dtype else 0
                    hashing.result()
                    advance(chunk.nbytes)
                report.hashes[name] = digest.hexdigest()
                what = f"differs in {differing:,} of {ours.size:,} values" if differing else None
                if ours.dtype != other.dtype:
                    what = f"is {other.dtype}, {ours.dtype} in {native.folder}"
                if what is not None:
                    yield TensorDamage(reader.tensors[name].file, name, what)


def _count_differing(one: np.ndarray, two: np.ndarray) -> int:
    """Return the number of values with different bits."""
    if raw_bytes(one) == raw_bytes(two):  # several times as fast as counting
        return 0
    bits = np.dtype(f"u{one.itemsize}")
    return int((np.ascontiguousarray(one).view(bits) != np.ascontiguousarray(two).view(bits)).sum())
