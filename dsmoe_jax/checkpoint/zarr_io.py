"""Arrays on disk, as Orbax reads them: one zarr array a parameter, all its bytes in one file, row after row.

`ArrayWriter` writes them as their bytes come, whatever their size, and hashes on the way; `open_array` maps one.
Orbax itself writes the frame around them (`write_skeleton`), so its metadata are Orbax's own; its
way of writing arrays holds several times the largest one in memory, and gives files that do not tell their tensor.

A file is the array in C order, then an index of its parts, 16 bytes each: zarr 3's sharding codec without compression.
A reader of a few experts, or of a few rows, reads those parts alone.
"""

import contextlib
import hashlib
import json
import logging
import math
import mmap
import operator
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.direct_io import DirectFile
from dsmoe_jax.storage.strict_json import read_json

FRAME: Final = "state"  # the folder that Orbax makes for the one tree in a checkpoint
CHUNK_BYTES: Final = 1 << 20  # what is in memory of an array while it is written; a cast holds some ten of them
_WORKERS: Final = 6  # while some wait for the disk others hash, at 2 GB/s a core at best
_STAMPS: Final = (  # file of the frame, what names a time or a place in it, what stands there instead
    ("_CHECKPOINT_METADATA", r'(_timestamp_nsecs": )\d+', r"\g<1>0"),
    ("commit_success.txt", r"(successful) to .*", r"\1"),
)
_PART_BYTES: Final = 8 << 20  # an expert of the 16B has 5.8 MB
_OS_ERROR: Final = re.compile(r"os_error_code='(\d+)'")  # in a message of tensorstore
_hooks: list[Callable[[Any], Any]] = []  # that of before for what nobody can catch
_DTYPES: Final[dict[str, np.dtype]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class ArrayRecord(NamedTuple):
    """What the manifest says of an array: its tensor (dtype, shape, SHA-256 of its bytes in C order) and its files."""

    tensor: dict[str, Any]
    files: dict[str, dict[str, Any]]  # by path below the checkpoint's parameters: bytes and SHA-256
    note: Any = None  # what the one who gave the pieces has to say


def write_skeleton(folder: Path, dtypes: Mapping[str, np.dtype]) -> None:
    """Have Orbax make the checkpoint `folder`, its arrays of one element each; all processes must call it.

    Call `strip_timestamps` once, from one process, when all have returned.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_zarr3, saving.use_compression = False, True, False
    saving.enable_write_sharding_file = False
    with context, orbax_write_errors(folder):
        ocp.save(str(folder), {name: np.zeros((1,), dtype) for name, dtype in dtypes.items()})


def strip_timestamps(folder: Path) -> None:
    """Take out of the frame when and where it was made: the same arrays give the same bytes everywhere."""
    for file, pattern, text in _STAMPS:
        path = folder / file
        if path.is_file():
            path.write_text(re.sub(pattern, text, path.read_text(encoding="utf-8")), encoding="utf-8")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Without what Orbax says of checkpoints that hold no OCDBT database: that its files were not found."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def orbax_write_errors(path: Path) -> Iterator[None]:
    """What Orbax and tensorstore raise as they write `path`, as the `OSError` that it was, and nothing beside it.

    Orbax logs the stacks of its threads as well, and Python those of callbacks into event loops that are closed by
    then: hundreds of lines for a full disk, which say no more, some of them after the exception.
    """
    if sys.unraisablehook is not _ignore_closed_loops:
        _hooks[:] = [sys.unraisablehook]
        sys.unraisablehook = _ignore_closed_loops
        logging.getLogger("absl").addFilter(_is_not_of_a_thread)
    with quiet_orbax():
        try:
            yield
        except (OSError, ValueError) as error:
            found = _OS_ERROR.search(str(error))
            number = int(found[1]) if found else getattr(error, "errno", None)
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(path)) from None


def _ignore_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _hooks[0](unraisable)


def _is_not_of_a_thread(record: logging.LogRecord) -> bool:
    return "_SignalingThread" not in record.getMessage()


class ArrayWriter:
    """Writes arrays into a frame, a few at a time, and tells `done` of each, from any thread, once it is on disk.

    Leave the `with` block to have waited for all of them.
    """

    def __init__(self, folder: Path, done: Callable[[str, ArrayRecord], object]):
        self._folder = folder
        self._done = done
        self._pool = ThreadPoolExecutor(_WORKERS, "array")
        self._free = threading.Semaphore(_WORKERS)
        self._writing: list[Future] = []
        self._stopped = False

    def write(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        pieces: Iterable[np.ndarray],
        note: Callable[[], Any] = lambda: None,
    ) -> None:
        """Begin to write one array from `pieces`, which follow one another in C order; `note` is asked after the last.

        Waits for a worker that is free, so no more arrays are held than are being written.
        """
        self._free.acquire()
        if self._stopped:
            self._free.release()
            return
        writing = self._pool.submit(self._write, name, shape, dtype, pieces, note)
        writing.add_done_callback(lambda _: self._free.release())
        self._writing.append(writing)

    def __enter__(self) -> "ArrayWriter":
        """The writer."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for what is on its way to the disk; raise what went wrong there."""
        self._stopped = kind is not None or self._stopped
        self._pool.shutdown()
        if kind is None:
            for writing in self._writing:
                writing.result()

    def _write(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray], note: Callable[[], Any]
    ) -> None:
        try:
            home, file = _describe(self._folder, name, shape, dtype)
            digest = hashlib.sha256()
            path = home / file
            path.parent.mkdir(parents=True)
            with DirectFile(path) as out:
                for piece in pieces:
                    if self._stopped:  # another array failed, or the one who waits gave up
                        return
                    data = raw_bytes(piece)
                    digest.update(data)
                    out.write(data)
                if out.size != (size := math.prod(shape) * dtype.itemsize):
                    raise AssertionError(f"{name} got {out.size} bytes of {size}")
                tensor = {"dtype": dtype.name, "shape": list(shape), "sha256": digest.hexdigest()}
                index = _index(shape, dtype)
                digest.update(index)
                out.write(index)
            files = {
                path.relative_to(self._folder).as_posix(): {"bytes": out.size, "sha256": digest.hexdigest()},
                (home / "zarr.json").relative_to(self._folder).as_posix(): hash_file(home / "zarr.json"),
            }
            self._done(name, ArrayRecord(tensor, files, note()))
        except BaseException:
            self._stopped = True
            raise


def open_array(folder: Path, name: str) -> np.ndarray:
    """A read-only view on the array's mapped file; it stays valid as long as something holds it.

    Raises `ValueError`, in one line, where the files are not as `ArrayWriter` writes them.
    """
    home = folder / FRAME / name
    spec = read_json(home / "zarr.json")
    try:
        shape, dtype = tuple(spec["shape"]), _DTYPES[spec["data_type"]]
        fits = spec == _spec(shape, dtype)
    except (LookupError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise DSMoEError(f"{home / 'zarr.json'}: does not describe an array as this package writes it")
    path = home / _file(len(shape))
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file is a ValueError
        raise DSMoEError(f"{path}: cannot be read: {error}") from None
    size = math.prod(shape) * dtype.itemsize
    if len(mapped) != size + len(_index(shape, dtype)) or mapped[size:] != _index(shape, dtype):
        raise DSMoEError(f"{path}: {len(mapped)} bytes, or another index than an array of {list(shape)} {dtype} has")
    return np.ndarray(shape, dtype, mapped)


def tensor_bytes(tensor: Mapping[str, Any]) -> int:
    """How many bytes a tensor has of which a manifest gives dtype and shape; `ValueError` where that is no tensor."""
    try:
        return math.prod(map(operator.index, tensor["shape"])) * _DTYPES[tensor["dtype"]].itemsize
    except (KeyError, TypeError):
        raise DSMoEError(f"{str(dict(tensor))[:200]} does not describe a tensor") from None


def row_chunks(array: np.ndarray, limit: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
    """The array in runs along its first axis of at most `limit` bytes, or of one row."""
    rows = max(1, limit // max(1, math.prod(array.shape[1:]) * array.itemsize))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def raw_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in C order, copied only where it lies otherwise."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def hash_file(path: Path) -> dict[str, Any]:
    """The size and the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _describe(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Path, Path]:
    """Put the real array's description in the place of the frame's; returns its folder and, below it, its file."""
    home = folder / FRAME / name
    if home.exists():  # a run that was killed just here has removed it
        shutil.rmtree(home)
    home.mkdir()
    (home / "zarr.json").write_text(json.dumps(_spec(shape, dtype)), encoding="utf-8")
    return home, _file(len(shape))


def _file(rank: int) -> Path:
    return Path("c", *["0"] * rank)


def _parts(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Into how many equal runs of rows the array is divided: the fewest of at most `_PART_BYTES`."""
    least = -(-math.prod(shape) * dtype.itemsize // _PART_BYTES)
    return next((n for n in range(max(1, least), min(shape[0], 1 << 16) + 1) if shape[0] % n == 0), 1)


def _index(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    parts = _parts(shape, dtype)
    size = math.prod(shape) * dtype.itemsize // parts
    return np.array([(i * size, size) for i in range(parts)], "<u8").tobytes()


def _spec(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """The `zarr.json` of an array (zarr 3 core specification, sharding codec 1.0)."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    part = [shape[0] // _parts(shape, dtype), *shape[1:]]
    sharding = {"chunk_shape": part, "codecs": [little], "index_codecs": [little]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "fill_value": 0.0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
