"""`DirectFile`: writes large files with direct I/O.

Buffered output would evict other pages from the page cache and costs more CPU time: on two cores, 4 GB took 1.3 s with
direct I/O and 2 to 8 s without, and hashing no longer waited for a core.
"""

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

_BUFFER: Final = 2 << 20
_BLOCK: Final = 4096  # size and alignment of direct writes


class DirectFile:
    """Creates a file and writes it sequentially with O_DIRECT where supported; closing fsyncs. `size`: bytes so far."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags & ~os.O_EXCL, 0o644)  # the failed attempt may have created it
        self._buffer = np.frombuffer(mmap.mmap(-1, _BUFFER), np.uint8)  # page-aligned
        self._filled = self.size = 0

    def write(self, data: memoryview | bytes) -> None:
        """Append the bytes."""
        rest = np.frombuffer(data, np.uint8)
        self.size += len(rest)
        while rest.size:
            count = min(len(rest), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == _BUFFER:
                self._flush(_BUFFER)

    def __enter__(self) -> "DirectFile":
        """Return the file."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Write the last block padded, truncate the padding and fsync."""
        try:
            if kind is None:
                self._flush(-(-self._filled // _BLOCK) * _BLOCK)
                os.ftruncate(self._file, self.size)
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def _flush(self, size: int) -> None:
        start = 0
        while start < size:
            start += os.write(self._file, self._buffer[start:size].data)
        self._filled = 0
