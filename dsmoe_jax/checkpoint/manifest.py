"""The manifest of a native checkpoint: the SHA-256 of every file and of every tensor, written last.

A folder without one is no checkpoint. `write_manifest` seals a folder, `read_manifest` opens one, `damage` looks for
flipped bits. A tensor's SHA-256 is that of its bytes in C order, little-endian. `HashCache` knows the hashes of files
that are too large to be read at every start.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.checkpoint.zarr_io import FRAME, ArrayRecord, hash_file, tensor_bytes
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer_config import TOKENIZER_FILES

PARAMETERS: Final = "parameters"  # the Orbax folder inside a checkpoint
MODEL_MANIFEST: Final = "dsmoe_jax.json"  # marks a native checkpoint
RECORD: Final = "evaluation.json"  # of an adapter: where it evaluated so, and the hashes of its files
FORMAT: Final = 2
_READ_BYTES: Final = 1 << 20
# What changes the meaning of a checkpoint, though its manifest need not name it.
_MEANINGFUL: Final = frozenset({"config.json", "generation_config.json", "vocab.json", *TOKENIZER_FILES})
_log = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """What a native checkpoint says of itself."""

    sha256: str  # its own

    files: dict[str, dict[str, Any]]  # by path below the folder: bytes, sha256
    tensors: dict[str, dict[str, Any]]  # by our name: dtype, shape, sha256
    source: dict[str, Any]  # where it was converted from: repository and revision, if from a hub

    @property
    def identity(self) -> str:
        """SHA-256 of the config and the tensors alone: the same model has the same, whenever and wherever made."""
        return hash_json({"config": self.files.get("config.json", {}).get("sha256"), "tensors": self.tensors})


class Damage(NamedTuple):
    """A file that is not as it was written, the tensor in it if it holds one, and what is wrong."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.file!r} {self.what}" + (f" (tensor {self.tensor})" if self.tensor else "")


def write_manifest(folder: Path, arrays: Mapping[str, ArrayRecord], source: Mapping[str, Any]) -> str:
    """Seal the folder, whose arrays were hashed as they were written; returns the manifest's own SHA-256."""
    files = {f"{PARAMETERS}/{name}": sums for record in arrays.values() for name, sums in record.files.items()}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files and name != MODEL_MANIFEST and not name.startswith("journal."):
            files[name] = hash_file(path)
    tensors = {name: record.tensor for name, record in arrays.items()}
    fields = {"format": FORMAT, "files": files, "tensors": tensors, "source": dict(source)}
    sealed = add_hash(fields)
    write_json(folder / MODEL_MANIFEST, sealed)
    return sealed["sha256"]


def is_native(path: str | Path) -> bool:
    """Whether the folder is a native checkpoint (and not, say, one in the Hugging Face layout)."""
    return (user_path(path, "checkpoint") / MODEL_MANIFEST).is_file()


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """The manifest of a native checkpoint; `ValueError` where there is none or its form is not as it must be.

    `verify` compares the manifest itself and all small files, those beside the parameters, with their SHA-256, too.
    """
    if not is_native(folder):
        raise DSMoEError(f"{folder}: not a native checkpoint (no {MODEL_MANIFEST})")
    fields = read_json(folder / MODEL_MANIFEST)
    if (version := fields.get("format")) != FORMAT:
        raise DSMoEError(f"{folder}: checkpoint format {version!r}, this version reads {FORMAT}")
    manifest = Manifest(str(fields.get("sha256")), *(fields.get(name) or {} for name in Manifest._fields[1:]))
    for name, table in (("files", manifest.files), ("tensors", manifest.tensors)):
        if not isinstance(table, dict) or not table or any(not isinstance(row, dict) for row in table.values()):
            raise DSMoEError(f"{folder / MODEL_MANIFEST}: `{name}` must list the {name} of the checkpoint")
    if not isinstance(manifest.source, dict):
        raise DSMoEError(f"{folder / MODEL_MANIFEST}: `source` must be an object")
    for name, sums in manifest.files.items():
        if type(sums.get("bytes")) is not int or type(sums.get("sha256")) is not str:
            raise DSMoEError(f"{folder / MODEL_MANIFEST}: file {name[:200]!r} must have bytes and sha256")
    for tensor in manifest.tensors.values():
        try:
            tensor_bytes(tensor)
        except ValueError as error:
            raise DSMoEError(f"{folder / MODEL_MANIFEST}: {error}") from None
    if verify:
        beside = [name for name in manifest.files if not name.startswith(f"{PARAMETERS}/")]
        for found in (*manifest_damage(folder), *damage(folder, manifest, beside)):
            raise DSMoEError(f"{folder}: damaged checkpoint: {found}")
        for name in sorted(added_files(folder, manifest)):
            _log.warning("%s: %s is not in the manifest: it was added later, and is used unchecked", folder, name)
    return manifest


def added_files(folder: Path, manifest: Manifest) -> set[str]:
    """Files that the manifest does not name, but that change what the checkpoint means: a chat template, say."""
    return {name for name in _MEANINGFUL - manifest.files.keys() if (folder / name).is_file()}


def check_files(folder: str | Path, *names: str) -> None:
    """`ValueError` if the folder is a native checkpoint of which these small files are not as they were written."""
    folder = Path(folder)
    if is_native(folder):
        manifest = read_manifest(folder, verify=False)
        for found in (*manifest_damage(folder), *damage(folder, manifest, [n for n in names if n in manifest.files])):
            raise DSMoEError(f"{folder}: damaged checkpoint: {found}")


def manifest_damage(folder: Path) -> Iterator[Damage]:
    """What is wrong with the manifest itself: whether it still has the SHA-256 that it gives of itself."""
    fields = read_json(folder / MODEL_MANIFEST)
    said = fields.pop("sha256", None)
    if said != hash_json(fields):
        yield Damage(MODEL_MANIFEST, None, "has been changed: its own SHA-256 is another")


def damage(
    folder: Path, manifest: Manifest, names: Iterable[str], advance: Advance = lambda step: None
) -> Iterator[Damage]:
    """What is wrong with the files `names` of the manifest, in their order; they are read side by side."""

    def check(name: str) -> Damage | None:
        found = _file_damage(folder, name, manifest)
        advance(manifest.files[name]["bytes"])
        return found

    pool = ThreadPoolExecutor()
    try:
        yield from (found for found in pool.map(check, names) if found is not None)
    finally:
        pool.shutdown(cancel_futures=True)


def unexpected_files(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    """Files of the parameters that the manifest does not know: Orbax might read them."""
    for path in sorted((folder / PARAMETERS).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in manifest.files:
            yield Damage(name, _tensor_of(name, manifest), "is not in the manifest")


def _file_damage(folder: Path, name: str, manifest: Manifest) -> Damage | None:
    want, tensor, path = manifest.files[name], _tensor_of(name, manifest), folder / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
        return Damage(name[:200], tensor, "is missing")
    if (size := path.stat().st_size) != want["bytes"]:
        return Damage(name, tensor, f"has {size} bytes, not {want['bytes']}")
    data = manifest.tensors[tensor] if tensor is not None and Path(name).name != "zarr.json" else None
    left = 0 if data is None else tensor_bytes(data)  # the tensor's bytes come first, then the index of its parts
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(min(left, _READ_BYTES) or _READ_BYTES):
            digest.update(piece)
            left = max(0, left - len(piece))
            if data is not None and not left:
                if digest.hexdigest() != data.get("sha256"):
                    return Damage(name, tensor, "has other bytes than were written: another SHA-256")
                data = None
    if digest.hexdigest() != want["sha256"]:
        return Damage(name, tensor, "has other bytes than were written: another SHA-256")
    return None


def _tensor_of(name: str, manifest: Manifest) -> str | None:
    parts = name.split("/")
    found = parts[2] if parts[:2] == [PARAMETERS, FRAME] and len(parts) > 3 else None
    return found if found in manifest.tensors else None


def hash_json(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object, whatever the order and the spacing of its fields in a file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def add_hash(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with its own SHA-256 as one field more."""
    return {**fields, "sha256": hash_json(fields)}


def read_evaluation_record(folder: Path) -> dict[str, Any]:
    """The `evaluation.json` in a folder; `ValueError` if it, or a file that it names, is not as it was written."""
    record = read_json(folder / RECORD)
    if "sha256" not in record:  # older ones, and those of others
        return record
    if record.pop("sha256") != hash_json(record):
        raise DSMoEError(f"{RECORD} has been changed")
    for name, sums in record.get("files", {}).items():
        if not (folder / name).is_file():
            raise DSMoEError(f"{name!r} is missing")
        if hash_file(folder / name) != sums:
            raise DSMoEError(f"{name!r} has other bytes than were written")
    return record


# --- files too large to be read at every start ---


class HashCache:
    """The SHA-256 of files, computed once; a file is known again by its size, times and inode.

    It is kept in the JSON file `path`, or in memory alone where that cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self._known = read_json(path)

    def hashes(self, files: Iterable[Path]) -> dict[Path, str]:
        """The SHA-256 of each file; those that are new are read side by side. Raises `OSError` for one that is not."""
        files = list(files)
        stats = {file: _stat(file) for file in files}
        unknown = [file for file in files if self._of(file, stats[file]) is None]
        with ThreadPoolExecutor() as pool:
            for file, sums in zip(unknown, pool.map(hash_file, unknown), strict=True):
                self._known[self._key(file)] = {"stat": stats[file], "sha256": sums["sha256"]}
        if unknown:
            with contextlib.suppress(OSError):
                write_json(self._path, self._known)
        return {file: str(self._of(file, stats[file])) for file in files}

    def _of(self, file: Path, stat: list[int]) -> str | None:
        entry = self._known.get(self._key(file))
        return entry["sha256"] if isinstance(entry, dict) and entry.get("stat") == stat else None

    def _key(self, file: Path) -> str:
        return os.path.relpath(file, self._path.parent)


def _stat(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
