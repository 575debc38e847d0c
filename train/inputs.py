"""Folders that a run derives from its inputs. Start at `DerivedFolders`.

Inputs are identified by content, not by name or time. `run/inputs.json` (RECORD) has, for each derived folder
(tokenizer, token shards), the hashes of the texts and the options that it was made from.
"""

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

RECORD: Final = "inputs.json"
_HASHES: Final = "hashes.json"
_SHORT: Final = 12  # digits of a SHA-256 in a message
# Options of earlier versions, by their present names.
_RENAMED: Final = {"data.holdout": "data.val_fraction"}
_log = logging.getLogger(__name__)


def file_hashes(source: str | Path, out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a source, by path, with a cache in `out`."""
    files = [file.path for file in find_files(source, exclude=[out])]
    known = HashCache(out / _HASHES).hashes(files)
    return {str(path): known[path] for path in files}


class Source(NamedTuple):
    """A source by name, and by content: its files in order, and their readers."""

    name: str
    sha256: str

    @classmethod
    def read(cls, name: str, out: Path) -> "Source":
        """Hash the source of that name; `DSMoEError` if it has no files."""
        return cls.of(name, file_hashes(name, out))

    @classmethod
    def of(cls, name: str, hashes: Mapping[str, str]) -> "Source":
        """Return the source of that name with these file hashes, by path, in order."""
        files = [[reader_of(Path(path)).__name__, sha256] for path, sha256 in hashes.items()]
        return cls(name, hash_json({"files": files, "stdlib": name == PYTHON_STDLIB}))


class Change(NamedTuple):
    """A changed value."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.name}: {short(self.then)} -> {short(self.now)}"


def differences(then: Any, now: Any, name: str = "") -> Iterator[Change]:
    """Iterate over the changes between two JSON values, by dotted name."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield Change(name, then, now)


def short(value: Any) -> str:
    """Format a value for a message; a SHA-256 is shortened."""
    return f"{value[:_SHORT]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


class DerivedFolders:
    """The folders that a run derives from its inputs, rebuilt when these change.

    With `resuming` a change is refused instead: checkpoints were trained on what is there.
    """

    def __init__(self, out: Path, *, resuming: bool):
        """Read the record of an earlier start, if there is one."""
        self._out, self._resuming = out, resuming
        self._record: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self._record = read_json(out / RECORD)
        for entry in self._record.values():
            if isinstance(entry, dict) and isinstance(options := entry.get("options"), dict):
                entry["options"] = {_RENAMED.get(name, name): value for name, value in options.items()}

    def make(
        self,
        name: str,
        sources: Sequence[Source],
        options: Mapping[str, Any],
        write: Callable[[Path], None],
        digest: Callable[[Path], str] | None = None,
    ) -> None:
        """Make a folder, unless it exists and was made from the same inputs."""
        folder, known = self._out / name, self._record.get(name)
        inputs = {"sources": [list(source) for source in sources], "options": dict(options)}
        if folder.exists():
            changes = ["inputs not recorded"] if known is None else list(_changes(known, inputs))
            if not changes:
                recorded = None if known is None else known.get("sha256")
                if digest is not None and recorded is not None and digest(folder) != recorded:
                    raise DSMoEError(f"{folder}: damaged: SHA-256 mismatch; remove it to have it made again")
                return
            if self._resuming and known is not None:
                raise DSMoEError(f"{folder}: cannot resume on changed data: {'; '.join(changes)}")
            if self._resuming:
                _log.warning("%s: inputs not recorded; using it unchecked", folder)
            else:
                _log.info("Rebuilding %s: %s", folder, "; ".join(changes))
                shutil.rmtree(folder)
        # Recorded first: the folder is written atomically, so one that exists was made from what is recorded.
        self._record[name] = inputs
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(self._out / RECORD, self._record)
        if not folder.exists():
            write(folder)
            if digest is not None:
                self._record[name] = {**inputs, "sha256": digest(folder)}
                write_json(self._out / RECORD, self._record)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe the changes in the inputs of a folder."""
    before, after = (list(starmap(Source, inputs["sources"])) for inputs in (then, now))
    if len(before) != len(after):
        yield f"data.sources: {', '.join(s.name for s in before)} -> {', '.join(s.name for s in after)}"
    for old, new in zip(before, after, strict=False):
        if old.sha256 != new.sha256:
            yield (
                f"data.sources: {new.name} has changed"
                if old.name == new.name
                else f"data.sources: {old.name} -> {new.name}"
            )
    yield from map(str, differences(then["options"], now["options"]))
