"""Verify a checkpoint, alone or against another one: `verify`."""

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsmoe_jax.checkpoint.manifest import TensorDamage, find_damage, read_manifest
from dsmoe_jax.checkpoint.native import check_names_and_shapes
from dsmoe_jax.checkpoint.zarr_io import raw_bytes, row_chunks
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, plural, silent
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.special_ids import ids_for_export

from .hub import is_repo_id, resolve
from .importer import read_special_ids
from .tensor_source import TensorSource, open_source, opens_as_native

_REPORT_FIELDS: Final = {"source", "other", "mismatches", "hashes"}  # of every version
# Config fields that do not affect the model or follow from the tensors.
_NOT_COMPARED: Final = ("torch_dtype", "dtype", "transformers_version", "architectures", "use_cache")


@dataclass
class VerificationReport:
    """Result of `verify`; `to_dict` gives the JSON report.

    Attributes:
        source: The checkpoint.
        other: The checkpoint it was compared with, if any.
        layout: Layout of `source`, "native" or "hf".
        cast: Dtypes in which tensors were compared that are stored in two dtypes.
        tensors: Number of tensors compared.
        bytes: Bytes of the tensors compared, or of the files hashed.
        mismatches: One dict for each mismatch: file, tensor and what is wrong.
        hashes: SHA-256 by tensor, by Hugging Face's names unless a native checkpoint is verified alone.
        seconds: Wall-clock time.
    """

    source: str
    other: str | None
    layout: str = "native"
    cast: list[str] = field(default_factory=list)
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
        size = f"{plural(self.tensors, 'tensor')}, {self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s"
        return f"{self.source}: {size}: {self._result()}"

    def _result(self) -> str:
        cast = f" (compared in {', '.join(self.cast)}: a cast cannot match bit by bit)" if self.cast else ""
        if self.mismatches:
            return f"{len(self.mismatches)} mismatch{'es' if len(self.mismatches) > 1 else ''}{cast}"
        if self.other is not None:
            return f"equal to {self.other}{cast}" if cast else f"bitwise equal to {self.other}"
        return "all checksums match" if self.layout == "native" else "all tensors are complete; it has no checksums"


def verify(
    source: str | Path, other: str | Path | None = None, *, revision: str | None = None, progress: Meter = silent
) -> VerificationReport:
    """Verify a checkpoint, and compare it with another one.

    A native checkpoint is compared with its manifest; of a Hugging Face folder every tensor is read and its name and
    shape are checked. Two checkpoints are compared bit for bit; tensors that are stored in two dtypes are compared
    in the smaller one.

    Args:
        source: Native checkpoint, Hugging Face folder or hub id.
        other: Another one, if any.
        revision: Branch, tag or commit of the hub id, if one of them is one; default: `main`.
        progress: Progress meter.

    Returns:
        The report; `mismatches` is empty if all bits agree.

    Raises:
        DSMoEError: A checkpoint cannot be opened, or the two have other tensors.
    """
    started = time.perf_counter()
    names = [source] if other is None else [source, other]
    on_hub = [name for name in names if is_repo_id(name)]
    if revision is not None and len(on_hub) == 2:
        raise DSMoEError(f"revision {revision!r} needs one hub id, got two: {source} and {other}")
    folders = [resolve(name, revision if name in on_hub or not on_hub else None, name="checkpoint") for name in names]
    report = VerificationReport(str(source), None if other is None else str(other))
    report.layout = "native" if opens_as_native(folders[0]) else "hf"
    found: list[TensorDamage] = []
    for folder in folders:
        if opens_as_native(folder):
            found += _damage(folder, report, progress)
    if len(folders) == 2 and not found:
        folders.sort(key=opens_as_native, reverse=True)  # config.json of an export has special token ids of its own
        with open_source(folders[0]) as one, open_source(folders[1]) as two:
            found += _differences(one, two, report, progress)
    elif report.layout == "hf" and len(folders) == 1:
        with open_source(folders[0]) as one:
            _hash_tensors(one, report, progress)
    report.mismatches = [{"file": one.file, "tensor": one.tensor, "what": one.what} for one in found]
    report.seconds = time.perf_counter() - started
    return report


def check_report_path(file: Path, *checkpoints: str | None) -> None:
    """Raise `DSMoEError` unless a report may be written: outside the checkpoints, over nothing but a report."""
    real = Path(os.path.realpath(file))
    if not real.parent.is_dir():
        raise DSMoEError(f"report {file} cannot be written: {file.parent} is not a folder")
    for checkpoint in checkpoints:
        if checkpoint is not None and real.is_relative_to(os.path.realpath(checkpoint)):
            raise DSMoEError(f"report {file} must be outside the checkpoint {checkpoint}")
    if os.path.lexists(real) and not _is_report(real):
        raise DSMoEError(f"{file} exists and is no earlier report; nothing is overwritten")


def _is_report(file: Path) -> bool:
    try:
        return read_json(file).keys() >= _REPORT_FIELDS
    except DSMoEError:
        return False


def _damage(folder: Path, report: VerificationReport, progress: Meter) -> list[TensorDamage]:
    """Return the differences of a native checkpoint from its manifest and fill in the report's sizes and hashes."""
    manifest = read_manifest(folder, verify=False)
    report.tensors = len(manifest.tensors)
    report.hashes = {name: str(tensor.get("sha256")) for name, tensor in manifest.tensors.items()}
    report.bytes = sum(sums["bytes"] for sums in manifest.files.values())
    with progress("checking", report.bytes) as advance:
        return list(find_damage(folder, manifest, advance))


def _hash_tensors(source: TensorSource, report: VerificationReport, progress: Meter) -> None:
    """Read every tensor; fill in the report's sizes and hashes."""
    report.tensors, report.bytes = len(source.order), sum(source.read(name).nbytes for name in source.order)
    with progress("reading", report.bytes) as advance:
        for name in source.order:
            digest = hashlib.sha256()
            for chunk in row_chunks(source.read(name)):
                digest.update(raw_bytes(chunk))
                advance(chunk.nbytes)
            report.hashes[name] = digest.hexdigest()


def _differences(
    one: TensorSource, two: TensorSource, report: VerificationReport, progress: Meter
) -> Iterator[TensorDamage]:
    """Yield the differences of the second from the first; fill in the report's sizes, hashes (of the second), casts."""
    shapes = [{name: source.read(name).shape for name in source.order} for source in (one, two)]
    check_names_and_shapes(two.folder, *shapes)
    fields, other_fields = one.config.to_dict(), two.config.to_dict()
    # Exports replace missing and invalid ids by the tokenizer's.
    tokenizer = read_special_ids(one.folder, one.config)[0]
    exported = ids_for_export(fields, tokenizer, one.config.vocab_size)
    for name, value in fields.items():
        other = other_fields.get(name)
        same = other in (value, exported[name]) or repr(other) == repr(value)  # NaN differs from itself
        if name not in _NOT_COMPARED and not same:
            yield TensorDamage("config.json", None, f"has {name} {value!r}, {two.folder} {other!r}")
    report.tensors, report.hashes = len(one.order), {}
    report.bytes = sum(one.read(name).nbytes for name in one.order)
    with progress("comparing", report.bytes) as advance, ThreadPoolExecutor(1) as hasher:
        for name in one.order:
            ours, other, digest = one.read(name), two.read(name), hashlib.sha256()
            dtype = min((ours.dtype, other.dtype), key=lambda dtype: dtype.itemsize)
            differing = start = 0
            for chunk in row_chunks(ours):
                other_chunk = other[start : start + len(chunk)]
                start += len(chunk)
                hashing = hasher.submit(digest.update, raw_bytes(other_chunk))
                with np.errstate(over="ignore", invalid="ignore"):
                    differing += _count_differing(*(part.astype(dtype, copy=False) for part in (chunk, other_chunk)))
                hashing.result()
                advance(chunk.nbytes)
            report.hashes[name] = digest.hexdigest()
            cast = "" if ours.dtype == other.dtype else f" in {dtype} (stored in {ours.dtype} and {other.dtype})"
            if cast and dtype.name not in report.cast:
                report.cast.append(dtype.name)
            if differing:
                what = f"differs in {differing:,} of {plural(ours.size, 'value')}{cast}"
                yield TensorDamage(two.file_of(name), name, what)


def _count_differing(one: np.ndarray, two: np.ndarray) -> int:
    """Return the number of values with different bits."""
    if raw_bytes(one) == raw_bytes(two):  # several times as fast as counting
        return 0
    bits = np.dtype(f"u{one.itemsize}")
    return int((np.ascontiguousarray(one).view(bits) != np.ascontiguousarray(two).view(bits)).sum())
