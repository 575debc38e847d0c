"""The manifest of a native checkpoint: `storage.manifest` plus its tensors and its source. It is written last.

A folder without one is not a checkpoint. The SHA-256 of a tensor is that of its bytes in C order, little-endian.
"""

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

PARAMETERS: Final = "parameters"  # the Orbax folder in a checkpoint
RECORD: Final = "evaluation.json"  # of an adapter: the step and loss of its evaluation, and the hashes of its files
FORMAT: Final = 2
# Files that change the meaning of a checkpoint, although its manifest need not list them.
_MEANINGFUL: Final = frozenset({"config.json", "generation_config.json", "vocab.json", *TOKENIZER_FILES})
_log = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """The manifest of a native checkpoint.

    Attributes:
      sha256: Its own hash.
      files: bytes and sha256 by path in the folder.
      tensors: dtype, shape and sha256 by parameter name.
      source: Where it was converted from: repository and revision on the hub; else empty.
      intact: Whether `sha256` is the hash of the other fields.
    """

    sha256: str
    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    source: dict[str, Any]
    intact: bool

    @property
    def identity(self) -> str:
        """SHA-256 of config and tensors: equal for equal models, whenever and wherever they were written."""
        return hash_json({"config": self.files.get("config.json", {}).get("sha256"), "tensors": self.tensors})

    @property
    def parameter_files(self) -> dict[str, dict[str, Any]]:
        """Those of `files` that hold the parameters, with the hash of the tensor that each begins with, if any."""
        return {name: self._row(name) for name in self.files if name.startswith(f"{PARAMETERS}/")}

    @property
    def other_files(self) -> dict[str, dict[str, Any]]:
        """Those of `files` that do not hold parameters; small."""
        return {name: row for name, row in self.files.items() if not name.startswith(f"{PARAMETERS}/")}

    def tensor_of(self, file: str) -> str | None:
        """The tensor that a file belongs to."""
        parts = file.split("/")
        found = parts[2] if parts[:2] == [PARAMETERS, STATE] and len(parts) > 3 else None
        return found if found in self.tensors else None

    def _row(self, file: str) -> dict[str, Any]:
        name = self.tensor_of(file)
        if name is None or Path(file).name == "zarr.json":
            return self.files[file]
        tensor = self.tensors[name]
        return {**self.files[file], "prefix": {"bytes": tensor_bytes(tensor), "sha256": tensor.get("sha256")}}


class TensorDamage(NamedTuple):
    """A file of a checkpoint that differs from its manifest.

    Attributes:
      file: Path in the folder.
      tensor: The tensor stored in it, if any.
      what: What is wrong, worded to follow the path.
    """

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.file!r} {self.what}" + (f" (tensor {self.tensor})" if self.tensor else "")


def write_manifest(folder: Path, arrays: Mapping[str, ArrayRecord], source: Mapping[str, Any]) -> str:
    """Write the manifest of a folder whose arrays were hashed as they were written; returns its own SHA-256."""
    files = {f"{PARAMETERS}/{name}": row for record in arrays.values() for name, row in record.files.items()}
    files |= hash_tree(folder, exclude={*files, MODEL_MANIFEST})
    tensors = {name: record.tensor for name, record in arrays.items()}
    fields = {"format": FORMAT, "files": files, "tensors": tensors, "source": dict(source)}
    return storage.write_manifest(folder / MODEL_MANIFEST, fields)


def is_native(path: str | Path) -> bool:
    """Whether the folder is a native checkpoint, and not one in the Hugging Face layout, say."""
    return (user_path(path, "checkpoint") / MODEL_MANIFEST).is_file()


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read the manifest of a native checkpoint.

    Args:
      folder: The checkpoint.
      verify: Compare the manifest, and all files but the parameters, with their SHA-256.

    Raises:
      DSMoEError: There is no manifest, it is malformed, or a file does not match.
    """
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
    """Yield everything in a native checkpoint that differs from its manifest; reads all files.

    Args:
      folder: The checkpoint.
      manifest: Its manifest, read with `verify=False`.
      advance: Called with the number of bytes as files are done.
    """
    if not manifest.intact:
        yield TensorDamage(MODEL_MANIFEST, None, MISMATCH)
    rows = manifest.other_files | manifest.parameter_files
    for found in storage.find_damage(folder, {name: rows[name] for name in manifest.files}, advance=advance):
        yield TensorDamage(found.file, manifest.tensor_of(found.file), found.what)
    yield from unexpected_files(folder, manifest)


def unexpected_files(folder: Path, manifest: Manifest) -> Iterator[TensorDamage]:
    """Yield files below the parameters that the manifest does not list: Orbax might read them."""
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
    """The `evaluation.json` of an adapter, checked with the files it lists; older ones have no hashes."""
    record = storage.read_manifest(folder / RECORD, None, require_hash=False)
    if "sha256" in record:
        check_files(folder, record.get("files", {}))
    return record
