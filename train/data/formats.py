"""Readers of data files, selected by suffix (`FORMATS`). A reader yields an `Entry` per record, valid or malformed."""

import gzip
import importlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
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
_ROWS: Final = 1024  # of a parquet file per batch
_ROWS_BYTES: Final = 64 << 20
_SMALL_COLUMN: Final = 256 << 20  # of a row group, uncompressed
_MAX_RATIO: Final = 200  # compression ratio of a larger column; that of text is 10


class Entry(NamedTuple):
    """A value in a file, or why it is malformed."""

    place: str  # ":LINE" after the file name, or "" for a text file
    value: Any  # text of a field, or all fields as a dict; None if malformed
    problem: str  # empty if valid
    bytes_read: int  # of the file so far


Reader = Callable[[Path, str | None], Iterator[Entry]]  # the field; None: all of them


def read_file(path: Path, field: str | None) -> Iterator[Entry]:
    """Iterate over the entries of a file; `DSMoEError` if it is unreadable."""
    try:
        yield from reader_of(path)(path, field)
    except ModuleNotFoundError as error:
        raise DSMoEError(f"{path}: requires {error.name}: pip install 'dsmoe_jax[data]'") from None
    except Exception as error:  # the formats' libraries have no common base class
        raise DSMoEError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def reader_of(path: Path) -> Reader:
    """Return the reader for the suffix of a file, `read_text` for an unknown one."""
    return next((reader for end, reader in FORMATS.items() if path.name.lower().endswith(end)), read_text)


def read_text(path: Path, field: str | None) -> Iterator[Entry]:
    """Read a file that is one text."""
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


def _read_jsonl(path: Path, field: str | None) -> Iterator[Entry]:
    with path.open("rb") as file:
        yield from _lines(file, file, field)


def _read_gzip(path: Path, field: str | None) -> Iterator[Entry]:
    with path.open("rb") as file, gzip.GzipFile(fileobj=file) as lines:
        yield from _lines(lines, file, field)


def _read_zstd(path: Path, field: str | None) -> Iterator[Entry]:
    with path.open("rb") as file, io.BufferedReader(_Unzstd(file), _READ_BYTES) as lines:
        yield from _lines(lines, file, field)


def _read_parquet(path: Path, field: str | None) -> Iterator[Entry]:
    """Read a column of texts, or all columns of each row."""
    parquet = importlib.import_module("pyarrow.parquet")
    size, row = path.stat().st_size, 0
    with parquet.ParquetFile(path) as file:
        texts = _small_texts(file.metadata)
    # Dictionary encoding stores a long text shared by many rows once.
    with parquet.ParquetFile(path, read_dictionary=texts) as file:
        if field is not None and field not in file.schema_arrow.names:
            raise DSMoEError(f"has no column {field!r}, only {', '.join(file.schema_arrow.names)}")
        for group in range(file.num_row_groups):
            rows = _rows_at_once(file.metadata.row_group(group), field, row)
            names = None if field is None else [field]
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                if (longest := max(map(_longest, batch.columns), default=0)) > MAX_LINE_BYTES:
                    where = f"rows {row + 1} to {row + batch.num_rows}"
                    raise DSMoEError(f"a row may have at most {MAX_LINE_BYTES:,} bytes, got {longest:,} in {where}")
                # Per row: converting a dictionary entry makes a new string each time.
                for values in zip(*batch.columns, strict=True):
                    row += 1
                    fields = dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))
                    yield Entry(f":{row}", *_value_of(fields, field), size * row // file.metadata.num_rows)


def _small_texts(metadata: Any) -> list[str]:
    """Return the text columns to read dictionary-encoded; refuse decompression bombs."""
    large, texts = set(), set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name, size = column.path_in_schema, column.total_uncompressed_size
            if column.physical_type == "BYTE_ARRAY":
                texts.add(name)
            if size > _SMALL_COLUMN:
                large.add(name)
                if size > _MAX_RATIO * column.total_compressed_size:
                    raise DSMoEError(f"column {name} expands from {column.total_compressed_size:,} to {size:,} bytes")
    return sorted(texts - large)


def _longest(column: Any) -> int:
    """Return the bytes of the longest text of a column, at any depth."""
    arrow, compute = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.compute")
    kind = column.type
    if arrow.types.is_dictionary(kind):
        return compute.max(compute.binary_length(column.dictionary)).as_py() or 0
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        return _longest(column.values)
    if arrow.types.is_struct(kind):
        return max((_longest(column.field(i)) for i in range(kind.num_fields)), default=0)
    return 0


def _rows_at_once(group: Any, field: str | None, done: int) -> int:
    """Return the rows per batch of a row group; refuse rows that are too large."""
    columns = [group.column(i) for i in range(group.num_columns)]
    read = [column for column in columns if field is None or column.path_in_schema.split(".")[0] == field]
    mean = sum(column.total_uncompressed_size for column in read) // max(group.num_rows, 1)
    if mean > MAX_LINE_BYTES:
        average = f"got {mean:,} on average from row {done + 1}"
        raise DSMoEError(f"a row may have at most {MAX_LINE_BYTES:,} bytes, {average}")
    return min(max(_ROWS_BYTES // max(mean, 1), 1), _ROWS)


def _lines(lines: Any, file: BinaryIO, field: str | None) -> Iterator[Entry]:
    """Read one JSON object per line; skip blank lines."""
    blank = 0
    for number in itertools.count(1):
        if not (line := lines.readline(MAX_LINE_BYTES + 1)):
            return
        if len(line) > MAX_LINE_BYTES:
            raise DSMoEError(f"a line may have at most {MAX_LINE_BYTES:,} bytes, line {number} has more")
        blank = blank + 1 if line.isspace() else 0
        if blank > _MAX_BLANK:
            raise DSMoEError(f"lines {number - _MAX_BLANK} to {number} are blank")
        if not blank:
            yield Entry(f":{number}", *_parsed(line, field), file.tell())


def _parsed(line: bytes, field: str | None) -> tuple[Any, str]:
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
    return _value_of(fields, field) if isinstance(fields, dict) else (None, "is not a JSON object")


class _BadLineError(ValueError):
    """JSON with a duplicate key."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _BadLineError(f"has the key {twice[:80]!r} twice")
    return fields


def _value_of(fields: dict[str, Any], field: str | None) -> tuple[Any, str]:
    if field is None:
        return fields, ""
    if field not in fields:
        return None, f"has no field {field!r}"
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


FORMATS: Final[dict[str, Reader]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_gzip,
    ".jsonl.zst": _read_zstd,
    ".parquet": _read_parquet,
}
