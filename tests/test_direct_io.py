"""Direct I/O: files have exactly the written bytes."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.storage import direct_io
from dsmoe_jax.storage.direct_io import DirectFile


def some_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a file system without O_DIRECT."""
    original = os.open

    def opened(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, *rest)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the cache"])
@pytest.mark.parametrize("sizes", [[1], [4096], [4095, 2, 5000], [100] * 300, [9000, 1, 8192, 3], []], ids=str)
def test_writes_of_all_sizes_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], direct: bool
):
    monkeypatch.setattr(direct_io, "_BUFFER", 8192)
    if not direct:
        refuse_direct(monkeypatch)
    pieces = [some_bytes(size) for size in sizes]

    with DirectFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)

    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.size == sum(sizes)


def test_an_existing_file_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"mine")

    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == b"mine"
