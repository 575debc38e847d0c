"""Where text comes from: files, folders, patterns, Python's own sources. Start at `documents`."""

import glob
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from dsmoe_jax.progress import Advance

from .formats import Entry, read_file, read_text, reader_of

PYTHON_STDLIB: Final = "python-stdlib"
# Not of the library itself, or not the same on every machine.
_NOT_STDLIB: Final = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_NOT_STDLIB_BEGINS: Final = ("config-", "_sysconfigdata")
# A line of one character over and over, like "# ------", in a comment or not.
_RULER: Final = re.compile(r"^[ \t]*#?[ \t]*([^\w\s])\1{7,}.*\n", re.MULTILINE)
_HEXADECIMAL: Final = re.compile(rb"\b0x[0-9a-fA-F]")
_TABLE: Final = 64  # such numbers: files of the library have fewer than 50, or more than 100
_NAMED_LINES: Final = 10  # broken lines of a file that the log names
_HOPELESS: Final = 1000  # lines from the start without a text: the rest need not be read

_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text and where it came from: FILE, FILE:LINE of a .jsonl, FILE:ROW of a .parquet."""

    where: str
    text: str


class TextFile(NamedTuple):
    """A file of a source. One that the user named must be text; among those that were found, others are passed over."""

    path: Path
    named: bool


def documents(
    source: str | Path, *, field: str = "text", most_broken: float = 0.01, advance: Advance = lambda step: None
) -> Iterator[Document]:
    """The texts of a source, always in the same order.

    `source` is a file, a folder (with all below it, in the order of the relative paths, hidden ones left out), a
    pattern like `data/*.parquet`, or `python-stdlib`. Of a .jsonl, .jsonl.gz, .jsonl.zst or .parquet each line or row
    is a document, its text in `field`; every other file is one, if it is UTF-8. Blank texts are none.

    Broken lines (not JSON, or without that field) are counted and named in the log. Raises `ValueError` in one line
    where more than the share `most_broken` of a file's lines are, or all; where a file cannot be read to its end; and
    where the source holds no text at all. `advance` is told of the bytes of the files as they are read.
    """
    count = blank = passed = 0
    clean = _without_rulers if str(source) == PYTHON_STDLIB else str
    for file in find_files(source):
        lines = Lines(file.path, most_broken)
        done, as_text = 0, reader_of(file.path) is read_text
        for entry in read_file(file.path, field):
            advance(entry.done - done)
            done = entry.done
            if entry.value is None and as_text:
                if file.named:
                    raise ValueError(f"{file.path}: {entry.problem}")
                passed += 1
            elif lines.whole(entry) and entry.value is not None:
                if (text := clean(entry.value)) and not text.isspace():
                    count += 1
                    yield Document(f"{file.path}{entry.place}", text)
                else:
                    blank += 1
        lines.end()
    if blank or passed:
        _log.info("%s: passed over %d blank texts and %d files that are not UTF-8 text", source, blank, passed)
    if not count:
        raise ValueError(f"{source}: holds no text")


def source_bytes(source: str | Path) -> int:
    """The size of all files of a source."""
    return sum(file.path.stat().st_size for file in find_files(source))


def find_files(source: str | Path) -> list[TextFile]:
    """The files of a source, each once; `ValueError` if there are none."""
    path = Path(source)
    if str(source) == PYTHON_STDLIB:
        return _stdlib()
    if os.path.lexists(path):
        files = _below(path) if path.is_dir() else [TextFile(path, True)]
    elif glob.has_magic(str(source)):
        matches = map(Path, sorted(glob.glob(str(source), recursive=True)))
        files = [file for m in matches for file in (_below(m) if m.is_dir() else [TextFile(m, False)])]
    else:
        raise ValueError(f"{source}: does not exist")
    if strange := [file.path for file in files if file.named and not file.path.is_file()]:
        raise ValueError(f"{strange[0]}: is not a regular file")
    # A pattern with ** finds a folder and what is in it.
    unique = {os.path.abspath(file.path): file for file in files if file.path.is_file()}
    if not unique:
        raise ValueError(f"{source}: no files")
    return list(unique.values())


def _below(folder: Path) -> list[TextFile]:
    found = []
    for home, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(home) / name for name in names if not name.startswith(".")]
    return [TextFile(path, False) for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix())]


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror})")


def _stdlib() -> list[TextFile]:
    """Python's own sources without site-packages and test suites: the same on every machine with this Python.

    Left out are the few files with characters beyond ASCII, tables of characters (codecs, known by their hexadecimal
    numbers), and the rulers of all others (`_without_rulers`): there the same tokens come many at a time and seldom
    elsewhere, and their gradient is so large that training takes the batch for an accident.
    """
    library = Path(sysconfig.get_paths()["stdlib"])

    def belongs(path: Path) -> bool:
        parts = path.relative_to(library).parts
        return not any(part in _NOT_STDLIB or part.startswith(_NOT_STDLIB_BEGINS) for part in parts)

    sources = (file for file in _below(library) if file.path.suffix == ".py" and belongs(file.path))
    contents = ((file, file.path.read_bytes()) for file in sources)
    return [file for file, text in contents if text.isascii() and len(_HEXADECIMAL.findall(text)) < _TABLE]


def _without_rulers(text: str) -> str:
    return _RULER.sub("", text)


class Lines:
    """How many lines of a file there were, and how many were broken."""

    def __init__(self, path: Path, most_broken: float):
        self._path, self._most = path, most_broken
        self._count = self._broken = 0
        self._first = ""

    def whole(self, entry: Entry) -> bool:
        """Count the entry and name it in the log if it is broken."""
        self._count += 1
        if entry.value is not None:
            return True
        self._broken += 1
        line = f"{self._path}{entry.place} {entry.problem}"
        self._first = self._first or line
        if self._broken <= _NAMED_LINES:
            _log.warning("%s: left out", line)
        if self._broken == self._count == _HOPELESS:
            raise ValueError(f"{self._path}: the first {_HOPELESS} lines are all broken: {self._first}")
        return False

    def end(self) -> None:
        """`ValueError` if too many were broken."""
        if self._broken > self._most * self._count or 0 < self._broken == self._count:
            raise ValueError(
                f"{self._path}: {self._broken} of {self._count} lines are broken, "
                f"at most {100 * self._most:g} % may be; the first: {self._first}"
            )
        if self._broken:
            _log.warning("%s: left out %d broken lines of %d", self._path, self._broken, self._count)
