"""Readers of columnar files, by pyarrow: `read_parquet`, and `read_arrow` for what datasets' `save_to_disk` writes."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError

from . import formats
from .formats import Columns, Entry, Part, value_of

_ROWS: Final = 1024  # of a parquet file per batch
_ROWS_BYTES: Final = 64 << 20
_SMALL_COLUMN: Final = 256 << 20  # of a row group, uncompressed
_MAX_RATIO: Final = 200  # compression ratio of a larger column; that of text is 10


def read_parquet(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    """Read the named columns, or all, of the row groups of a part; see `read_file`."""
    parquet = importlib.import_module("pyarrow.parquet")
    with contextlib.ExitStack() as stack:
        source = path if isinstance(path, Path) else stack.enter_context(path.open("rb"))
        metadata = stack.enter_context(parquet.ParquetFile(source)).metadata
        # Dictionary encoding stores a long text shared by many rows once.
        file = stack.enter_context(parquet.ParquetFile(source, read_dictionary=_small_texts(metadata)))
        _check_columns(file.schema_arrow.names, columns)
        mine = part.of(file.num_row_groups)
        row = sum(metadata.row_group(group).num_rows for group in range(mine.start))
        total = sum(metadata.row_group(group).num_rows for group in mine)
        first, size = row, len(part.of(path.stat().st_size))
        names = None if columns is None else list(dict.fromkeys([columns.text, *columns.where]))
        for group in mine:
            rows = _rows_at_once(metadata.row_group(group), names, row)
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                yield from _entries(batch, columns, row, lambda row: size * (row - first) // total)
                row += batch.num_rows


def read_arrow(path: Path, columns: Columns | None, part: Part) -> Iterator[Entry]:
    """Read the record batches of a part of an Arrow file, in the stream or the file format; see `read_file`."""
    arrow, ipc = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.ipc")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(arrow.memory_map(str(path)) if isinstance(path, Path) else path.open("rb"))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        stream: Any = ipc.open_file(source) if is_file else ipc.open_stream(source)
        _check_columns(stream.schema.names, columns)

        def batches(stream: Any) -> Iterator[Any]:
            return map(stream.get_batch, range(stream.num_record_batches)) if is_file else iter(stream)

        counts = [batch.num_rows for batch in batches(stream)]
        if not is_file:
            source.seek(0)
            stream = ipc.open_stream(source)
        mine = part.of(len(counts))
        row = first = sum(counts[: mine.start])
        total, size = sum(counts[mine.start : mine.stop]), len(part.of(path.stat().st_size))
        for number, batch in enumerate(batches(stream)):
            if number in mine:
                if columns is not None:
                    batch = batch.select(list(dict.fromkeys([columns.text, *columns.where])))
                for start in range(0, batch.num_rows, _ROWS):
                    some = batch.slice(start, _ROWS)
                    yield from _entries(some, columns, row, lambda row: size * (row - first) // total)
                    row += some.num_rows


def _check_columns(names: Sequence[str], columns: Columns | None) -> None:
    for name in () if columns is None else (columns.text, *columns.where):
        if name not in names:
            raise DSMoEError(f"has no column {name!r}, only {', '.join(names)}")


def _entries(batch: Any, columns: Columns | None, row: int, bytes_read: Any) -> Iterator[Entry]:
    """Yield the rows of a batch, the first of which is row `row` + 1 of the file."""
    if (longest := max(map(_longest, batch.columns), default=0)) > formats.MAX_LINE_BYTES:
        where = f"rows {row + 1} to {row + batch.num_rows}"
        raise DSMoEError(f"a row may have at most {formats.MAX_LINE_BYTES:,} bytes, got {longest:,} in {where}")
    # Per row: converting a dictionary entry makes a new string each time.
    for number, values in enumerate(zip(*batch.columns, strict=True), start=row + 1):
        fields = dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))
        yield Entry(f":{number}", *value_of(fields, columns), bytes_read(number))


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
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        return compute.max(compute.binary_length(column)).as_py() or 0
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        return _longest(column.values)
    if arrow.types.is_struct(kind):
        return max((_longest(column.field(i)) for i in range(kind.num_fields)), default=0)
    return 0


def _rows_at_once(group: Any, names: Sequence[str] | None, done: int) -> int:
    """Return the rows per batch of a row group; refuse rows that are too large."""
    columns = [group.column(i) for i in range(group.num_columns)]
    read = [column for column in columns if names is None or column.path_in_schema.split(".")[0] in names]
    mean = sum(column.total_uncompressed_size for column in read) // max(group.num_rows, 1)
    if mean > formats.MAX_LINE_BYTES:
        average = f"got {mean:,} on average from row {done + 1}"
        raise DSMoEError(f"a row may have at most {formats.MAX_LINE_BYTES:,} bytes, {average}")
    return min(max(_ROWS_BYTES // max(mean, 1), 1), _ROWS)
