"""Append records to a file of JSON lines that survives kills: `JsonLinesFile`."""

import json
import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe_jax.progress import plural

_log = logging.getLogger("dsmoe_jax")


class JsonLinesFile:
    """A file of strict JSON objects, one per line, unbuffered; the incomplete last line of a killed writer is removed.

    Attributes:
        is_new: Whether the file had no complete line when it was opened.
    """

    def __init__(self, path: Path):
        self._path = path
        # Unbuffered: a line that failed on a full disk is not written again at exit.
        self._file = path.open("ab", buffering=0)
        _truncate_incomplete_line(path)
        self.is_new = path.stat().st_size == 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _truncate_incomplete_line(path: Path) -> None:
    """Remove the incomplete last line of a killed writer."""
    with path.open("r+b") as file:
        if not (size := path.stat().st_size):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            complete = content.rfind(b"\n") + 1
        if complete < size:
            _log.info("Truncating incomplete last line of %s: %s", path, plural(size - complete, "byte"))
            file.truncate(complete)
