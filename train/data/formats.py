"""Text files of every format, read entry by entry. Start at `FORMATS`: how a name ends says how the file is read.

A reader yields an `Entry` for each text (or, asked for no field, each whole object) and for each place where one should
be; it decides nothing about broken ones.
"""

import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

_READ_BYTES: Final = 1 << 20
_ZSTD_BYTES: Final = 1 << 16  # at once: they may become a thousand times as many
_ROWS: Final = 1024  # of a parquet file, at once


class Entry(NamedTuple):
    """A value of a file, or what is wrong at its place."""

    place: str  # in the file, to follow its name: ":LINE", or "" where the file is the text
    value: Any  # the text of a field, or all fields as a dict; None if there is none
    problem: str  # if there is no value
    done: int  # bytes of the file that are read


Reader = Callable[[Path, str | None], Iterator[Entry]]  # the field; None: all of them


def read_file(path: Path, field: str | None) -> Iterator[Entry]:
    """The entries of a file; `ValueError` in one line if it cannot be read to its end."""
    try:
        yield from reader_of(path)(path, field)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading it needs {error.name}: pip install 'dsmoe_jax[data]'") from None
    except Exception as error:  # the libraries of the formats have no common class
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def reader_of(path: Path) -> Reader:
    """How the file is read: by the end of its name, else as one text."""
    return next((reader for end, reader in FORMATS.items() if path.name.lower().endswith(end)), read_text)


def read_text(path: Path, field: str | None) -> Iterator[Entry]:
    """The file is one text."""
    data = path.read_bytes()
    try:
        text, problem = data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        text, problem = None, "is not UTF-8"
    if b"\0" in data:
        text, problem = None, "is not text: it has zero bytes"
    yield Entry("", text, problem, len(data))


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
    """Each row of the column is a text, or each row has all fields."""
    parquet = importlib.import_module("pyarrow.parquet")
    size, row = path.stat().st_size, 0
    with parquet.ParquetFile(path) as file:
        if field is not None and field not in file.schema_arrow.names:
            raise ValueError(f"it has no column {field!r}, only {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=_ROWS, columns=None if field is None else [field]):
            for fields in batch.to_pylist():
                row += 1
                yield Entry(f":{row}", *_value_of(fields, field), size * row // file.metadata.num_rows)


def _lines(lines: Any, file: BinaryIO, field: str | None) -> Iterator[Entry]:
    """The field of each line's JSON object, or the object; blank lines are none."""
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            yield Entry(f":{number}", *_parsed(line, field), file.tell())


def _parsed(line: bytes, field: str | None) -> tuple[Any, str]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "is not UTF-8"
    except (ValueError, RecursionError):
        return None, "is not JSON"
    if not isinstance(fields, dict):
        return None, "is not a JSON object"
    return _value_of(fields, field)


def _value_of(fields: dict[str, Any], field: str | None) -> tuple[Any, str]:
    if field is None:
        return fields, ""
    if field not in fields:
        return None, f"has no field {field!r}"
    if not isinstance(value := fields[field], str):
        return None, f"has a {type(value).__name__} as {field!r}, not a text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return None, "has half of a surrogate pair"
    return value, ""


class _Unzstd(io.RawIOBase):
    """The bytes in a zstd file of one or more frames. zstandard's own reader takes a torn file for a whole one."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._begin = importlib.import_module("zstandard").ZstdDecompressor().decompressobj
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
                    raise EOFError("its end is missing")
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
