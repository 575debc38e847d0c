"""Tokenizer and token shards that a run derives from its inputs, identified by content. Start at `DerivedFolders`."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.manifest import HashCache, hash_json
from dsmoe_jax.storage.strict_json import read_json

from .data import PYTHON_STDLIB, find_files
from .data.formats import reader_of

RECORD: Final = "inputs.json"  # hashes of the inputs and options of each derived folder
HASHES: Final = "hashes.json"
WAY_OUT: Final = "pass the earlier value, or another --output-dir"
_SHORT: Final = 12  # digits of a SHA-256 in a message
# Options of earlier versions, by their present names.
_RENAMED: Final = {"data.holdout": "data.val_fraction"}
_log = logging.getLogger(__name__)


def file_hashes(source: str | Path, out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a source, by path, with a cache in `out`; of remote ones that of a version."""
    files = find_files(source, exclude=[out])
    known = HashCache(out / HASHES).hashes(file.path for file in files if isinstance(file.path, Path))
    return {str(file.path): known.get(file.path) or hash_json({"file": file.identity()}) for file in files}


class Source(NamedTuple):
    """Name of a source, and the hash of its files in order and their readers."""

    name: str
    sha256: str

    @classmethod
    def read(cls, name: str, out: Path) -> "Source":
        """Hash the files of a source; `DSMoEError` if there are none."""
        return cls.of(name, file_hashes(name, out))

    @classmethod
    def of(cls, name: str, hashes: Mapping[str, str]) -> "Source":
        """Return the source from its file hashes, by path, in order."""
        files = [[reader_of(Path(path)).__name__, sha256] for path, sha256 in hashes.items()]
        return cls(name, hash_json({"files": files, "stdlib": name == PYTHON_STDLIB}))


class Change(NamedTuple):
    """A changed value."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.name}: {short(self.old)} -> {short(self.new)}"


def differences(old: Any, new: Any, name: str = "") -> Iterator[Change]:
    """Iterate over the changes between two JSON values, by dotted name."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield Change(name, old, new)


def short(value: Any) -> str:
    """Format a value for a message; a SHA-256 is shortened."""
    return f"{value[:_SHORT]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


class DerivedFolders:
    """Folders rebuilt when their inputs change; if `resuming`, an error: the checkpoints were trained on them."""

    def __init__(self, out: Path, *, resuming: bool):
        """Read the record of an earlier start, if any."""
        self._out, self._resuming = out, resuming
        self._record: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self._record = read_json(out / RECORD)
        for entry in self._record.values():
            if isinstance(entry, dict) and isinstance(options := entry.get("options"), dict):
                entry["options"] = {_RENAMED.get(name, name): value for name, value in options.items()}

    def option(self, folder: str, name: str) -> Any:
        """Return a recorded option of the first folder with this prefix; None if there is none."""
        found = (entry["options"] for key, entry in self._record.items() if key.startswith(folder))
        return next(found, {}).get(name)

    def make(
        self,
        name: str,
        sources: Sequence[Source],
        options: Mapping[str, Any],
        write: Callable[[Path], None],
        digest: Callable[[Path], str] | None = None,
        field: str = "data.sources",
    ) -> None:
        """Write a folder unless it exists and its sources, by content, and options are unchanged.

        `write` is atomic; `digest` detects damage in a folder without a manifest; `field` names the sources in errors.
        """
        folder, known = self._out / name, self._record.get(name)
        inputs = {"sources": [list(source) for source in sources], "options": dict(options)}
        if folder.exists():
            changes = "inputs not recorded" if known is None else "; ".join(_changes(known, inputs, field))
            if known is not None and not changes:
                if digest is not None and known.get("sha256") not in (None, digest(folder)):
                    raise DSMoEError(f"{folder}: damaged: SHA-256 mismatch; remove it to rebuild it")
                return
            if self._resuming and known is not None:
                raise DSMoEError(f"{folder}: cannot resume on changed data: {changes}; {WAY_OUT}")
            if self._resuming:
                _log.warning("%s: inputs not recorded; using it unchecked", folder)
            else:
                _log.info("Rebuilding %s: %s", folder, changes)
                shutil.rmtree(folder)
        # Recorded before the folder is written, so that an existing folder always matches its record.
        self._record[name] = inputs
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(self._out / RECORD, self._record)
        if not folder.exists():
            write(folder)
            if digest is not None:
                self._record[name] = {**inputs, "sha256": digest(folder)}
                write_json(self._out / RECORD, self._record)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], field: str) -> Iterator[str]:
    """Describe the changes in the inputs of a folder."""
    before, after = (list(starmap(Source, inputs["sources"])) for inputs in (old, new))
    if len(before) != len(after):
        yield f"--{field}: {', '.join(s.name for s in before)} -> {', '.join(s.name for s in after)}"
    for one, other in zip(before, after, strict=False):
        if one.sha256 != other.sha256:
            same_name = one.name == other.name
            yield (f"--{field}: {other.name} has changed" if same_name else f"--{field}: {one.name} -> {other.name}")
    yield from map(str, differences(old["options"], new["options"]))
