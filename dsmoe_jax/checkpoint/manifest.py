"""The manifest of a native checkpoint, written last: `storage.manifest` plus tensors (hashed in C order) and source."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.checkpoint.zarr_io import STATE, ArrayRecord, tensor_bytes
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance
from dsmoe_jax.storage import manifest as storage
from dsmoe_jax.storage.manifest import MISMATCH, MODEL_MANIFEST, Damage, check_files, hash_json, hash_tree
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.tokenizer_config import TOKENIZER_FILES

PARAMETERS: Final = "parameters"  # the Orbax directory
RECORD: Final = "evaluation.json"  # of an adapter: step and loss of its evaluation, hashes of its files
FORMAT: Final = 2
# Files that affect the model or tokenizer even if the manifest does not list them.
_MEANINGFUL: Final = frozenset({"config.json", "generation_config.json", "vocab.json", *TOKENIZER_FILES})
_log = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """The manifest of a native checkpoint."""

    sha256: str  # of the other fields, as stored
    files: dict[str, dict[str, Any]]  # bytes and sha256 by path
    tensors: dict[str, dict[str, Any]]  # dtype, shape and sha256 by parameter name
    source: dict[str, Any]  # repository and revision if converted from the hub, else empty
    intact: bool  # whether `sha256` matches

    @property
    def identity(self) -> str:
        """SHA-256 of config and tensors: equal for equal models."""
        return hash_json({"config": self.files.get("config.json", {}).get("sha256"), "tensors": self.tensors})

    @property
    def parameter_files(self) -> dict[str, dict[str, Any]]:
        """Files of parameters, each with the SHA-256 of the tensor at its start as `prefix`."""
        rows = {file: row for file, row in self.files.items() if file.startswith(f"{PARAMETERS}/")}
        for file, row in rows.items():
            if (name := self.tensor_of(file)) and Path(file).name != "zarr.json":
                tensor = self.tensors[name]
                rows[file] = {**row, "prefix": {"bytes": tensor_bytes(tensor), "sha256": tensor.get("sha256")}}
        return rows

    @property
    def other_files(self) -> dict[str, dict[str, Any]]:
        """All other files."""
        return {name: row for name, row in self.files.items() if not name.startswith(f"{PARAMETERS}/")}

    def tensor_of(self, file: str) -> str | None:
        """Return the tensor that a file belongs to."""
        parts = file.split("/")
        found = parts[2] if parts[:2] == [PARAMETERS, STATE] and len(parts) > 3 else None
        return found if found in self.tensors else None


class TensorDamage(NamedTuple):
    """A file of a checkpoint that differs from its manifest, and its tensor; `what` is the message after the path."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.file!r} {self.what}" + (f" (tensor {self.tensor})" if self.tensor else "")


def write_manifest(folder: Path, arrays: Mapping[str, ArrayRecord], source: Mapping[str, Any]) -> str:
    """Write the manifest of a folder whose arrays are already hashed; return its SHA-256."""
    files = {f"{PARAMETERS}/{name}": row for record in arrays.values() for name, row in record.files.items()}
    files |= hash_tree(folder, exclude={*files, MODEL_MANIFEST})
    tensors = {name: record.tensor for name, record in arrays.items()}
    fields = {"format": FORMAT, "files": files, "tensors": tensors, "source": dict(source)}
    return storage.write_manifest(folder / MODEL_MANIFEST, fields)


def is_native(path: str | Path) -> bool:
    """Return whether the folder is a native checkpoint."""
    return (user_path(path, "checkpoint") / MODEL_MANIFEST).is_file()


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read the manifest of a native checkpoint; `verify` checks it and all files except for the parameters."""
    path = folder / MODEL_MANIFEST
    if not is_native(folder):
        raise DSMoEError(f"{folder}: not a native checkpoint (no {MODEL_MANIFEST})")
    fields = storage.read_manifest(path, FORMAT, verify=False)
    intact = storage.matches_own_hash(fields)
    tables: list[Any] = [fields.get(name) or {} for name in ("files", "tensors", "source")]
    manifest = Manifest(str(fields.get("sha256")), *tables, intact=intact)
    for name, table in (("files", manifest.files), ("tensors", manifest.tensors)):
        if not isinstance(table, dict) or not table or any(not isinstance(row, dict) for row in table.values()):
            raise DSMoEError(f"{path}: `{name}` must list the {name} of the checkpoint")
    if not isinstance(manifest.source, dict):
        raise DSMoEError(f"{path}: `source` must be an object")
    for tensor in manifest.tensors.values():
        try:
            tensor_bytes(tensor)
        except ValueError as error:
            raise DSMoEError(f"{path}: {error}") from None
    if verify:
        if not intact:
            raise DSMoEError(f"{folder}: damaged: {Damage(MODEL_MANIFEST, MISMATCH)}")
        check_files(folder, manifest.other_files)
        for name in sorted(name for name in _MEANINGFUL - manifest.files.keys() if (folder / name).is_file()):
            _log.warning("%s: %s is not in the manifest; using it unchecked", folder, name)
    return manifest


def find_damage(folder: Path, manifest: Manifest, advance: Advance = lambda step: None) -> Iterator[TensorDamage]:
    """Yield all differences from a manifest read with `verify=False`; reads every file."""
    if not manifest.intact:
        yield TensorDamage(MODEL_MANIFEST, None, MISMATCH)
    rows = manifest.other_files | manifest.parameter_files
    for found in storage.find_damage(folder, {name: rows[name] for name in manifest.files}, advance=advance):
        yield TensorDamage(found.file, manifest.tensor_of(found.file), found.what)
    # Unexpected files of parameters: Orbax might read them.
    for path in sorted((folder / PARAMETERS).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in manifest.files:
            yield TensorDamage(name, manifest.tensor_of(name), "is not in the manifest")


def check_parameters(folder: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> None:
    """Raise `DSMoEError` for the first file of the parameters that does not match; `share` as in `find_damage`."""
    rows = manifest.parameter_files
    for found in storage.find_damage(folder, rows, share=share):
        raise DSMoEError(f"{folder}: damaged: {TensorDamage(found.file, manifest.tensor_of(found.file), found.what)}")


def read_evaluation_record(folder: Path) -> dict[str, Any]:
    """Return the `evaluation.json` of an adapter and verify the files it lists; older ones have no hashes."""
    record = storage.read_manifest(folder / RECORD, None, require_hash=False)
    if "sha256" in record:
        check_files(folder, record.get("files", {}))
    return record
