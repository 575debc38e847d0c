"""Pieces of sources: the units of work of `tokenize`, the same for any number of processes. Start at `cut`."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from .files import SourceFile
from .formats import SPLITTABLE, WHOLE, Part

PIECES: Final = 256  # at least, of large sources
SMALLEST: Final = 16 << 20  # bytes of a piece, unless its sources are smaller
LARGEST: Final = 512 << 20  # of a piece; larger if a file cannot be divided


class PiecePart(NamedTuple):
    """Part of a file of a source, by its number."""

    source: int
    file: SourceFile
    part: Part

    @property
    def size(self) -> int:
        """Bytes of the file in this part."""
        return len(self.part.of(self.file.path.stat().st_size))


Piece = Sequence[PiecePart]


def cut(files: Sequence[tuple[int, SourceFile]]) -> Sequence[Piece]:
    """Cut files, with the numbers of their sources, into pieces.

    Files of lines, of row groups and of record batches are divided; small files are put together. A piece has at least
    `SMALLEST` and about `LARGEST` bytes at most, and there are `PIECES` of them or more between these limits.
    """
    sizes = [file.path.stat().st_size for _, file in files]
    target = min(max(sum(sizes) // PIECES, SMALLEST), LARGEST)
    pieces: list[list[PiecePart]] = []
    left = 0  # bytes until the last piece is full
    for (source, file), size in zip(files, sizes, strict=True):
        count = max(-(-size // target), 1) if file.path.name.lower().endswith(SPLITTABLE) else 1
        for part in map(Part, range(count), [count] * count) if count > 1 else (WHOLE,):
            if left <= 0:
                pieces.append([])
                left = target
            pieces[-1].append(PiecePart(source, file, part))
            left -= len(part.of(size))
    return pieces
