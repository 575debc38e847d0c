"""The texts of a source. Start at `documents`; files.py finds the files, formats.py reads them."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance, plural

from .files import PYTHON_STDLIB, SourceFile, resolve_source
from .formats import FORMATS, LEFT_OUT, WHOLE, Columns, Entry, Part, read_file, read_text, reader_of

# A line of one repeated character, like "# ------".
_RULER: Final = re.compile(r"^[ \t]*#?[ \t]*([^\w\s])\1{7,}.*\n", re.MULTILINE)
_NAMED_LINES: Final = 10  # malformed lines logged per file
_GIVE_UP: Final = 1000  # malformed lines at the start of a file after which reading stops
_log = logging.getLogger(__name__)
FileParts = Iterable[tuple[SourceFile, Part]]


class Document(NamedTuple):
    """A text and its location: FILE, FILE:LINE of .jsonl, FILE:ROW of .parquet."""

    where: str
    text: str


class Selection(NamedTuple):
    """Which texts of a source are read.

    Attributes:
        field: The field of a line, or the column, that holds the text.
        where: Allowed values of other fields; records with another value are skipped and counted.
        min_chars: Shorter texts are skipped and counted.
        max_malformed_fraction: Malformed lines of a file that are skipped and logged; more are an error.
    """

    field: str = "text"
    where: Mapping[str, Collection[str]] = {}
    min_chars: int = 0
    max_malformed_fraction: float = 0.01


class Counts(Counter[str]):
    """Texts of a source, and what was skipped, by reason: `texts`, `blank`, `short`, `excluded`, `files`."""

    def log(self, source: str | Path, columns: Columns | None) -> None:
        """Log one line per reason; raise `DSMoEError` if there are no texts."""
        if self["files"]:
            expected = "without UTF-8 text" if columns else f"of formats other than {', '.join(FORMATS)}"
            _log.info("%s: skipped %s %s", source, plural(self["files"], "file"), expected)
        for reason, what in {"blank": "blank text", "short": "short text", "excluded": "record"}.items():
            if self[reason]:
                why = " by a filter" if reason == "excluded" else ""
                _log.info("%s: skipped %s%s", source, plural(self[reason], what), why)
        if not self["texts"]:
            left_out = " that passes the filters" if self["short"] or self["excluded"] else ""
            raise DSMoEError(f"{source}: no {'text' if columns else 'examples'} found{left_out}")


def documents(
    source: str | Path,
    *,
    field: str = "text",
    where: Mapping[str, Collection[str]] | None = None,
    min_chars: int = 0,
    max_malformed_fraction: float = 0.01,
    exclude: Iterable[Path] = (),
    advance: Advance = lambda step: None,
) -> Iterator[Document]:
    """Iterate over the texts of a source, in deterministic order.

    Each line or row of a .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow file is a document; every other UTF-8 file
    is one. Blank texts are skipped.

    Args:
        source: A file, a folder (recursive, sorted by relative path), a pattern like `data/*.parquet`, or
            `python-stdlib`; `find_files` says which files are left out.
        field: The field of a line or row that holds the text.
        where: Allowed values of other fields; records with another value are skipped.
        min_chars: Shorter texts are skipped.
        max_malformed_fraction: Malformed lines of a file that are skipped and logged; more are an error.
        exclude: Files and folders to leave out.
        advance: Called with the number of bytes read.

    Raises:
        DSMoEError: A file cannot be read or has too many malformed lines, or the source holds no text.
    """
    found = resolve_source(source, exclude)
    found.log(source)
    selection, counts = Selection(field, where or {}, min_chars, max_malformed_fraction), Counts()
    yield from read_texts(source, ((file, WHOLE) for file in found.files), selection, counts, advance)
    counts.log(source, Columns(field))


def read_texts(
    source: str | Path, files: FileParts, selection: Selection, counts: Counts, advance: Advance
) -> Iterator[Document]:
    """Iterate over the texts of parts of a source's files; `counts` receives what is found and skipped."""
    clean = functools.partial(_RULER.sub, "") if str(source) == PYTHON_STDLIB else str
    columns = Columns(selection.field, selection.where)
    reading: dict[str, Any] = {"max_malformed_fraction": selection.max_malformed_fraction, "advance": advance}
    for place, value in _read(files, columns, counts=counts, **reading):
        text = clean(value)
        if not text or text.isspace():
            counts["blank"] += 1
        elif len(text) < selection.min_chars:
            counts["short"] += 1
        else:
            counts["texts"] += 1
            yield Document(place, text)


def read_source(
    source: str | Path,
    *,
    parse: Callable[[Any], Any],
    max_malformed_fraction: float,
    exclude: Iterable[Path],
    advance: Advance = lambda step: None,
) -> Iterator[tuple[str, Any]]:
    """Iterate over (location, parsed record) of a source, without its text files; see `documents`.

    A line is malformed if `parse` raises `ValueError`.
    """
    found, counts = resolve_source(source, exclude), Counts()
    found.log(source)
    files = ((file, WHOLE) for file in found.files)
    for place, record in _read(files, None, parse, max_malformed_fraction, counts, advance):
        counts["texts"] += 1
        yield place, record
    counts.log(source, None)


def _read(
    files: FileParts,
    columns: Columns | None,
    parse: Callable[[Any], Any] = lambda value: value,
    max_malformed_fraction: float = 0.0,
    counts: Counts | None = None,
    advance: Advance = lambda step: None,
) -> Iterator[tuple[str, Any]]:
    """Iterate over (location, value) of parts of files; without `columns` of whole records."""
    counts = Counts() if counts is None else counts
    for file, part in files:
        is_text = reader_of(file.path) is read_text
        if is_text and columns is None:
            if file.named:
                raise DSMoEError(f"{file.path}: must be one of {', '.join(FORMATS)}")
            counts["files"] += 1
            continue
        malformed, done = _MalformedLines(file.path, max_malformed_fraction), 0
        for entry in read_file(file.path, columns, part):
            advance(entry.bytes_read - done)
            done = entry.bytes_read
            if is_text and entry.value is None:
                if file.named:
                    raise DSMoEError(f"{file.path}: {entry.problem}")
                counts["files"] += 1
                continue
            if entry.value is not None:
                try:
                    entry = entry._replace(value=parse(entry.value))
                except ValueError as error:
                    entry = entry._replace(value=None, problem=str(error))
            if not malformed.count(entry):
                continue
            if entry.value is LEFT_OUT:
                counts["excluded"] += 1
            else:
                yield f"{file.path}{entry.place}", entry.value
        malformed.check()


class _MalformedLines:
    """Counts the lines of a file, and those that are malformed."""

    def __init__(self, path: Path, max_fraction: float):
        self._path, self._max = path, max_fraction
        self._lines = self._malformed = 0
        self._first = ""

    def count(self, entry: Entry) -> bool:
        """Count the entry; log it and return False if it is malformed."""
        self._lines += 1
        if entry.value is not None:
            return True
        self._malformed += 1
        line = f"{self._path}{entry.place} {entry.problem}"
        self._first = self._first or line
        if self._malformed <= _NAMED_LINES:
            _log.warning("Skipping malformed line: %s", line)
        if self._malformed == self._lines == _GIVE_UP:
            raise DSMoEError(f"{self._path}: the first {_GIVE_UP} lines are all malformed: {self._first}")
        return False

    def check(self) -> None:
        """Raise `DSMoEError` if too many lines were malformed."""
        if self._malformed > self._max * self._lines or 0 < self._malformed == self._lines:
            problem = f"{self._malformed} of {self._lines} lines are malformed, at most {100 * self._max:g} % may be"
            raise DSMoEError(f"{self._path}: {problem}; the first: {self._first}")
        if self._malformed:
            _log.warning("%s: skipped %s of %d", self._path, plural(self._malformed, "malformed line"), self._lines)
