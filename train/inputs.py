"""What a run's folder was derived from: inputs known by their content, not by name or time. Start at `Derived`.

`run/inputs.json` (RECORD) has, for each folder that a run derives (its tokenizer, its token shards), the hashes of
the texts and the options that went into it.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.checkpoint.manifest import HashCache, hash_json
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.strict_json import read_json

from .data import PYTHON_STDLIB, find_files
from .data.formats import reader_of

RECORD: Final = "inputs.json"
_HASHES: Final = "hashes.json"
_SHORT: Final = 12  # digits of a SHA-256 in a message
_log = logging.getLogger(__name__)


def file_hashes(source: str | Path, out: Path) -> dict[str, str]:
    """SHA-256 of each file of a source, by path; those of unchanged files come from a cache in `out`."""
    files = [file.path for file in find_files(source, exclude=[out])]
    known = HashCache(out / _HASHES).hashes(files)
    return {str(path): known[path] for path in files}


class Source(NamedTuple):
    """A source by its name and its content: that of its files in their order, and how each is read."""

    name: str
    sha256: str

    @classmethod
    def read(cls, name: str, out: Path) -> "Source":
        """The source of that name; `ValueError` if it has no files."""
        return cls.of(name, file_hashes(name, out))

    @classmethod
    def of(cls, name: str, hashes: Mapping[str, str]) -> "Source":
        """The source of that name with these files, by their path, in their order."""
        files = [[reader_of(Path(path)).__name__, sha256] for path, sha256 in hashes.items()]
        return cls(name, hash_json({"files": files, "stdlib": name == PYTHON_STDLIB}))


class Change(NamedTuple):
    """A value that is not what it was."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        """In one line."""
        return f"{self.name}: {short(self.then)} -> {short(self.now)}"


def differences(then: Any, now: Any, name: str = "") -> Iterator[Change]:
    """Every value in which two JSON values differ, by its dotted name."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield Change(name, then, now)


def short(value: Any) -> str:
    """A value in a message, a SHA-256 by its first digits."""
    return f"{value[:_SHORT]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


class Derived:
    """The folders that a run derives from its inputs; each is made again when its inputs have changed.

    With `resuming` nothing is made again: checkpoints were trained on what is there, so a change raises `ValueError`.
    """

    def __init__(self, out: Path, *, resuming: bool):
        """Read the record of an earlier start, if there is one."""
        self._out, self._resuming = out, resuming
        self._record: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self._record = read_json(out / RECORD)

    def make(
        self,
        name: str,
        sources: Sequence[Source],
        options: Mapping[str, Any],
        write: Callable[[Path], None],
        digest: Callable[[Path], str] | None = None,
    ) -> None:
        """Have `write` make the folder `name` unless it is there already, made from the same inputs.

        Args:
          name: Of the folder, below that of the run.
          sources: What is read; copies under other names count as the same.
          options: All else that decides what is written, as JSON.
          write: Makes the folder, atomically.
          digest: The SHA-256 of what is in it, to find damage in a folder without a manifest of its own.
        """
        home, known = self._out / name, self._record.get(name)
        inputs = {"sources": [list(source) for source in sources], "options": dict(options)}
        if home.exists():
            changes = ["its inputs are not recorded"] if known is None else list(_changes(known, inputs))
            if not changes:
                said = None if known is None else known.get("sha256")
                if digest is not None and said is not None and digest(home) != said:
                    raise DSMoEError(f"{home}: has other bytes than were written; remove it to have it made again")
                return
            if self._resuming and known is not None:
                raise DSMoEError(f"{home}: cannot resume on other data: {'; '.join(changes)}")
            if self._resuming:
                _log.warning("%s: its inputs are not recorded; using it as it is", home)
            else:
                _log.info("%s: made again: %s", home, "; ".join(changes))
                shutil.rmtree(home)
        # Recorded first: the folder appears as a whole, so one that is there was made from what the record says.
        self._record[name] = inputs
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(self._out / RECORD, self._record)
        if not home.exists():
            write(home)
            if digest is not None:
                self._record[name] = {**inputs, "sha256": digest(home)}
                write_json(self._out / RECORD, self._record)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changed in the inputs of a folder."""
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
