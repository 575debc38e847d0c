"""Readers of data files, selected by suffix (`FORMATS`). A reader yields an `Entry` per record, valid or malformed."""

import gzip
import importlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import MAX_DEPTH, check_depth

MAX_LINE_BYTES: Final = 32 << 20  # of a line or row, uncompressed; four times the longest books
MAX_TEXT_BYTES: Final = 1 << 30  # of a plain text file
_MAX_PARSED_BYTES: Final = 512 << 20  # estimated memory of a parsed line
_SMALL: Final = 1 << 20  # a shorter line cannot exceed it
_MAX_BLANK: Final = 1_000_000  # consecutive blank lines
_READ_BYTES: Final = 1 << 20
_ZSTD_BYTES: Final = 1 << 10  # per read: a block of 4 bytes may expand to 128 KiB
_ZSTD_WINDOW: Final = 1 << 27  # the limit of zstd without --long
LEFT_OUT: Final = object()  # the value of a record that `Columns.where` excludes


class Entry(NamedTuple):
    """A value in a file, or why it is malformed."""

    place: str  # ":LINE" after the file name, or "" for a text file
    value: Any  # text of a field, or all fields as a dict; None if malformed
    problem: str  # empty if valid
    bytes_read: int  # of the file so far


class Columns(NamedTuple):
    """The fields of a record to read: the text, and the allowed values of others."""

    text: str
    where: Mapping[str, Collection[str]] = {}


class Part(NamedTuple):
    """One of `count` parts of a file: a range of bytes whose lines, or of row groups whose rows, belong to it."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> range:
        """Return this part of `range(size)`."""
        return range(size * self.index // self.count, size * (self.index + 1) // self.count)


WHOLE: Final = Part()
# A path or, for an object store or the Hub, an object with its `name`, `open` and `stat`. None reads all fields.
Reader = Callable[[Path, Columns | None, Part], Iterator[Entry]]


def read_file(path: Path, columns: Columns | None, part: Part = WHOLE) -> Iterator[Entry]:
    """Iterate over the entries of a file, or of a part of one; `DSMoEError` if it is unreadable."""
    try:
        local = path if isinstance(path, Path) else path.local()
        yield from reader_of(path)(local, columns, part)
    except ModuleNotFoundError as error:
        raise DSMoEError(f"{path}: requires {error.name}: pip install 'dsmoe_jax[data]'") from None
    except Exception as error:  # the formats' libraries have no common base class
        raise DSMoEError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def reader_of(path: Path) -> Reader:
    """Return the reader for the suffix of a file, `read_text` for an unknown one."""
    return next((reader for end, reader in FORMATS.items() if path.name.lower().endswith(end)), read_text)


def read_text(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    """Read a file that is one text."""
    if columns is not None and columns.where:
        raise DSMoEError(f"a text file has no columns; where names {', '.join(columns.where)}")
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise DSMoEError(f"a text file may have at most {MAX_TEXT_BYTES:,} bytes, got {size:,}: split it or use .jsonl")
    with path.open("rb") as file:
        data = file.read(_READ_BYTES)
        if b"\0" not in data:  # else it is binary: the rest is not read
            data += file.read(MAX_TEXT_BYTES)
    try:
        text, problem = data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        text, problem = None, "is not UTF-8"
    if b"\0" in data:
        text, problem = None, "is not text: contains null bytes"
    yield Entry("", text, problem, size)


def _read_jsonl(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    with path.open("rb") as file:
        if part == WHOLE:
            yield from _lines(file, file, columns)
            return
        span = part.of(path.stat().st_size)
        if span.start:  # a line belongs to the part where it begins
            file.seek(span.start - 1)
            while (rest := file.readline(_READ_BYTES)) and not rest.endswith(b"\n"):
                pass
        yield from _lines(file, file, columns, span)


def _read_gzip(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    with path.open("rb") as file, gzip.GzipFile(fileobj=file) as lines:
        yield from _lines(lines, file, columns)


def _read_zstd(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    with path.open("rb") as file, io.BufferedReader(_Unzstd(file), _READ_BYTES) as lines:
        yield from _lines(lines, file, columns)


def _lines(lines: Any, file: BinaryIO, columns: Columns | None, span: range | None = None) -> Iterator[Entry]:
    """Read one JSON object per line, of those that begin in a span of the file; skip blank lines."""
    blank = 0
    first = span.start if span else 0
    for number in itertools.count(1):
        begin = file.tell() if span else 0
        if (span and begin >= span.stop) or not (line := lines.readline(MAX_LINE_BYTES + 1)):
            return
        if len(line) > MAX_LINE_BYTES:
            where = f"the line at byte {begin:,}" if first else f"line {number}"
            raise DSMoEError(f"a line may have at most {MAX_LINE_BYTES:,} bytes, {where} has more")
        blank = blank + 1 if line.isspace() else 0
        if blank > _MAX_BLANK:
            raise DSMoEError(f"lines {number - _MAX_BLANK} to {number} are blank")
        if not blank:
            place = f" at byte {begin:,}" if first else f":{number}"
            yield Entry(place, *_parsed(line, columns), file.tell() - first)


def _parsed(line: bytes, columns: Columns | None) -> tuple[Any, str]:
    # Measured: a key takes below 250 bytes, any other value below 80.
    if len(line) > _SMALL:
        size = 4 * len(line) + 250 * line.count(b":") + 80 * (line.count(b",") + line.count(b"["))
        if size > _MAX_PARSED_BYTES:
            return None, f"has JSON that may take {size:,} bytes in memory, more than {_MAX_PARSED_BYTES:,}"
    try:
        fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        return None, "is not UTF-8"
    except _BadLineError as error:
        return None, str(error)
    except (ValueError, RecursionError):
        return None, "is not JSON"
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        try:
            check_depth(fields)
        except ValueError as error:
            return None, str(error)
    return value_of(fields, columns) if isinstance(fields, dict) else (None, "is not a JSON object")


class _BadLineError(ValueError):
    """JSON with a duplicate key."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _BadLineError(f"has the key {twice[:80]!r} twice")
    return fields


def value_of(fields: dict[str, Any], columns: Columns | None) -> tuple[Any, str]:
    """Return the value of a record for an `Entry`, and why it is malformed."""
    if columns is None:
        return fields, ""
    field = columns.text
    if missing := next((name for name in (field, *columns.where) if name not in fields), None):
        return None, f"has no field {missing!r}"
    if any(str(fields[name]) not in allowed for name, allowed in columns.where.items()):
        return LEFT_OUT, ""
    if not isinstance(value := fields[field], str):
        return None, f"must have a string as {field!r}, got {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return None, "has a lone surrogate"
    return value, ""


class _Unzstd(io.RawIOBase):
    """A zstd file of one or more frames; unlike zstandard's reader it refuses truncated ones."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._begin = importlib.import_module("zstandard").ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        self._frame, self._begun = self._begin(), False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._begin(), False
            if not (data := data or self._file.read(_ZSTD_BYTES)):
                if self._begun:
                    raise EOFError("truncated")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _read_parquet(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    from .columnar import read_parquet

    return read_parquet(path, columns, part)


def _read_arrow(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    from .columnar import read_arrow

    return read_arrow(path, columns, part)


FORMATS: Final[dict[str, Reader]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_gzip,
    ".jsonl.zst": _read_zstd,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SPLITTABLE: Final = (".jsonl", ".parquet", ".arrow")
