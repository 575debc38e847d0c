"""Manifests: JSON files with the size and SHA-256 of every file in a folder, and their own SHA-256.

Start at `write_manifest`, `read_manifest` and `check_files`. All folders of the package use one format:

    {"format": …, "files": {"path/in/folder": {"bytes": 12, "sha256": "…"}}, "sha256": "…", …other fields}
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance
from dsmoe_jax.storage.atomic_dir import JOURNAL, write_json
from dsmoe_jax.storage.strict_json import read_json

MODEL_MANIFEST: Final = "dsmoe_jax.json"  # marks a native checkpoint
MISMATCH: Final = "does not match its SHA-256"
_READ_BYTES: Final = 1 << 20

Files = Mapping[str, Mapping[str, Any]]  # by path in the folder: bytes, sha256, and optionally `prefix` with the two


class Damage(NamedTuple):
    """A file that differs from its manifest; `what` is the error message after the path."""

    file: str
    what: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.file!r} {self.what}"


def write_manifest(path: Path, fields: Mapping[str, Any]) -> str:
    """Write a manifest atomically; return its SHA-256."""
    complete = add_hash(fields)
    write_json(path, complete)
    return complete["sha256"]


def read_manifest(
    path: Path, version: int | str | None, *, verify: bool = True, require_hash: bool = True
) -> dict[str, Any]:
    """Read and check a manifest; `version` None allows any format."""
    fields = read_json(path)
    if version is not None and fields.get("format") != version:
        raise DSMoEError(f"{path}: format must be {version!r}, got {fields.get('format')!r:.80}")
    if verify and not matches_own_hash(fields, required=require_hash):
        raise DSMoEError(f"{path.parent}: damaged: {path.name!r} {MISMATCH}")
    files = fields.get("files", {})
    if not isinstance(files, dict):
        raise DSMoEError(f"{path}: `files` must be an object, got {files!r:.80}")
    for name, row in files.items():
        if not isinstance(row, dict) or type(row.get("bytes")) is not int or type(row.get("sha256")) is not str:
            raise DSMoEError(f"{path}: file {name[:200]!r} must have bytes and sha256")
    return fields


def find_damage(
    folder: Path,
    files: Files,
    *,
    verify: bool = True,
    share: tuple[int, int] = (0, 1),
    cache: "HashCache | None" = None,
    advance: Advance = lambda step: None,
) -> Iterator[Damage]:
    """Yield damaged files, in the manifest's order, reading several in parallel; without `verify` compare sizes only.

    `share` (i, n) checks every n-th file from the i-th on. `advance` is called with the bytes of each file.
    """
    mine = dict(list(files.items())[share[0] :: share[1]])
    hashes: Mapping[Path, str] = {}
    if cache is not None and verify:
        hashes = cache.hashes(folder / name for name, row in mine.items() if not _size_damage(folder, name, row))

    def check(name: str) -> Damage | None:
        row = mine[name]
        try:
            found = _size_damage(folder, name, row)
            if found is None and verify:
                intact = hashes[folder / name] == row["sha256"] if cache else _matches(folder / name, row)
                found = None if intact else Damage(name, MISMATCH)
        except OSError as error:
            found = Damage(name, f"cannot be read ({error.strerror})")
        advance(row["bytes"])
        return found

    pool = ThreadPoolExecutor()
    try:
        yield from (found for found in pool.map(check, mine) if found is not None)
    finally:
        pool.shutdown(cancel_futures=True)


def check_files(folder: Path, files: Files, **options: Any) -> None:
    """Raise `DSMoEError` for the first damaged file; options as in `find_damage`."""
    for found in find_damage(folder, files, **options):
        raise DSMoEError(f"{folder}: damaged: {found}")


def check_listed_files(folder: Path, names: Iterable[str], manifest: str = MODEL_MANIFEST) -> None:
    """Verify those files of a folder that its manifest lists; a folder without a manifest passes."""
    if (folder / manifest).is_file():
        files = read_manifest(folder / manifest, None).get("files", {})
        check_files(folder, {name: files[name] for name in names if name in files})


def hash_tree(folder: Path, *, exclude: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the `files` of a manifest: size and SHA-256 of every file in the folder except for `exclude`."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hash_file(path) for name, path in paths.items() if name not in exclude and name != JOURNAL}


def hash_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def hash_json(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, independent of field order and spacing."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def add_hash(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with its SHA-256 as the field `sha256`."""
    return {**fields, "sha256": hash_json(fields)}


def matches_own_hash(fields: Mapping[str, Any], *, required: bool = True) -> bool:
    """Return whether `sha256` is the hash of the other fields; without it, whether it is not `required`."""
    if "sha256" not in fields and not required:
        return True
    return fields.get("sha256") == hash_json({name: value for name, value in fields.items() if name != "sha256"})


class HashCache:
    """Caches SHA-256 of files by size, times and inode in a JSON file, or in memory if that cannot be written."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self._known = read_json(path)

    def hashes(self, files: Iterable[Path]) -> dict[Path, str]:
        """Return the SHA-256 of each file; new ones are read in parallel. Raises `OSError` for an unreadable file."""
        files = list(files)
        stats = {file: (os.path.relpath(file, self._path.parent), _stat(file)) for file in files}
        unknown = [file for file, (key, stat) in stats.items() if self._lookup(key, stat) is None]
        with ThreadPoolExecutor() as pool:
            for file, row in zip(unknown, pool.map(hash_file, unknown), strict=True):
                key, stat = stats[file]
                self._known[key] = {"stat": stat, "sha256": row["sha256"]}
        if unknown:
            with contextlib.suppress(OSError):
                write_json(self._path, self._known)
        return {file: str(self._lookup(*stats[file])) for file in files}

    def _lookup(self, key: str, stat: list[int]) -> str | None:
        entry = self._known.get(key)
        return entry["sha256"] if isinstance(entry, dict) and entry.get("stat") == stat else None


def _stat(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _size_damage(folder: Path, name: str, row: Mapping[str, Any]) -> Damage | None:
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
        return Damage(name[:200], "is missing")
    if (size := path.stat().st_size) != row["bytes"]:
        return Damage(name, f"has {size} bytes, expected {row['bytes']}")
    return None


def _matches(path: Path, row: Mapping[str, Any]) -> bool:
    """Return whether the file has the SHA-256 of its row and, if the row has a `prefix`, its first bytes that of it."""
    prefix = row.get("prefix")
    left = prefix["bytes"] if prefix else 0
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(left, _READ_BYTES) or _READ_BYTES):
            digest.update(block)
            left = max(0, left - len(block))
            if prefix and not left:
                if digest.hexdigest() != prefix["sha256"]:
                    return False
                prefix = None
    return digest.hexdigest() == row["sha256"]
