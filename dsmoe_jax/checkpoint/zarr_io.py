"""Arrays in zarr files that Orbax reads: one file per parameter, written by `ArrayWriter`, mapped by `open_array`.

Orbax writes the metadata (`write_skeleton`) but not the arrays: it would need several times the largest array in
memory, and its file names do not contain the parameter. A file is the array in C order followed by an index of its
inner chunks, 16 bytes each: zarr 3's sharding codec without compression, so that a few experts can be read alone.
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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import log_level
from dsmoe_jax.storage.direct_io import DirectFile
from dsmoe_jax.storage.manifest import hash_file
from dsmoe_jax.storage.strict_json import read_json

STATE: Final = "state"  # Orbax's directory for the tree of arrays
CHUNK_BYTES: Final = 1 << 20  # of an array in memory while it is written; a cast needs about ten of them
_WORKERS: Final = 6  # some wait for the disk while others hash, at most 2 GB/s per core
_STAMPS: Final = (  # file of the skeleton, pattern of a time or path in it, replacement
    ("_CHECKPOINT_METADATA", r'(_timestamp_nsecs": )\d+', r"\g<1>0"),
    ("commit_success.txt", r"(successful) to .*", r"\1"),
)
_INNER_CHUNK_BYTES: Final = 8 << 20  # an expert of the 16B has 5.8 MB
_OS_ERROR: Final = re.compile(r"os_error_code='(\d+)'")  # in a message from tensorstore
_hooks: list[Callable[[Any], Any]] = []  # the previous sys.unraisablehook
Chunks = Iterable[np.ndarray]  # consecutive parts of an array, in C order
Shape = tuple[int, ...]
DTYPES: Final[dict[str, np.dtype]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class ArrayRecord(NamedTuple):
    """The manifest's entries for an array."""

    tensor: dict[str, Any]  # dtype, shape, and SHA-256 of the bytes in C order
    files: dict[str, dict[str, Any]]  # bytes and sha256 by path in the parameter directory
    note: Any = None  # JSON from the source of the array, such as the rounding error of a cast


def write_skeleton(folder: Path, dtypes: Mapping[str, np.dtype]) -> None:
    """Write an Orbax checkpoint with one element per array; collective. `strip_timestamps` follows on one process."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt, saving.use_zarr3, saving.use_compression = False, True, False
    saving.enable_write_sharding_file = False
    with context, orbax_write_errors(folder):
        ocp.save(str(folder), {name: np.zeros((1,), dtype) for name, dtype in dtypes.items()})


def strip_timestamps(folder: Path) -> None:
    """Remove creation time and path from the skeleton, so that equal arrays give equal bytes."""
    for file, pattern, text in _STAMPS:
        path = folder / file
        if path.is_file():
            path.write_text(re.sub(pattern, text, path.read_text(encoding="utf-8")), encoding="utf-8")


def quiet_orbax() -> AbstractContextManager[None]:
    """Silence Orbax's warnings about checkpoints without an OCDBT database."""
    return log_level("absl", logging.ERROR)


@contextlib.contextmanager
def orbax_write_errors(path: Path) -> Iterator[None]:
    """Convert errors of Orbax and tensorstore while writing `path` to the underlying `OSError`; silence stacks."""
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
    """Writes arrays into a skeleton in parallel; calls `done(name, record)` from any thread once one is on disk."""

    def __init__(self, folder: Path, done: Callable[[str, ArrayRecord], object]):
        self._folder, self._done = folder, done
        self._pool = ThreadPoolExecutor(_WORKERS, "array")
        self._free = threading.Semaphore(_WORKERS)
        self._writing: list[Future] = []
        self._stopped = False

    def write(self, name: str, shape: Shape, dtype: np.dtype, chunks: Chunks, note: Callable = lambda: None) -> None:
        """Wait for a free worker, which bounds the arrays in memory, and start writing; `note()` is called last."""
        self._free.acquire()
        if self._stopped:
            self._free.release()
            return
        writing = self._pool.submit(self._write, name, shape, dtype, chunks, note)
        writing.add_done_callback(lambda _: self._free.release())
        self._writing.append(writing)

    def __enter__(self) -> "ArrayWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for the workers and raise their first error."""
        self._stopped = kind is not None or self._stopped
        self._pool.shutdown()
        if kind is None:
            for writing in self._writing:
                writing.result()

    def _write(self, name: str, shape: Shape, dtype: np.dtype, chunks: Chunks, note: Callable[[], Any]) -> None:
        try:
            home = self._folder / STATE / name
            if home.exists():  # the skeleton's one element
                shutil.rmtree(home)
            home.mkdir()
            (home / "zarr.json").write_text(json.dumps(_spec(shape, dtype)), encoding="utf-8")
            digest = hashlib.sha256()
            path = home / _file(len(shape))
            path.parent.mkdir(parents=True)
            with DirectFile(path) as out:
                for chunk in chunks:
                    if self._stopped:  # after an error elsewhere
                        return
                    data = raw_bytes(chunk)
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
    """Return a read-only memory-mapped array; raise `DSMoEError` if `ArrayWriter` did not write it."""
    home = folder / STATE / name
    spec = read_json(home / "zarr.json")
    try:
        shape, dtype = tuple(spec["shape"]), DTYPES[spec["data_type"]]
        fits = spec == _spec(shape, dtype)
    except (LookupError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise DSMoEError(f"{home / 'zarr.json'}: is not the metadata of an array written by this package")
    path = home / _file(len(shape))
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file is a ValueError
        raise DSMoEError(f"{path}: cannot be read: {error}") from None
    size, index = math.prod(shape) * dtype.itemsize, _index(shape, dtype)
    if len(mapped) != size + len(index) or mapped[size:] != index:
        raise DSMoEError(f"{path}: {len(mapped)} bytes, or their index, do not match an array of {list(shape)} {dtype}")
    return np.ndarray(shape, dtype, mapped)


def tensor_bytes(tensor: Mapping[str, Any]) -> int:
    """Return the bytes of a tensor from its manifest entry; raise `DSMoEError` for a malformed entry."""
    try:
        return math.prod(map(operator.index, tensor["shape"])) * DTYPES[tensor["dtype"]].itemsize
    except (KeyError, TypeError):
        raise DSMoEError(f"{str(dict(tensor))[:200]} is not the shape and dtype of a tensor") from None


def row_chunks(array: np.ndarray, limit: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
    """Split an array along its first axis into chunks of at most `limit` bytes, or of one row."""
    rows = max(1, limit // max(1, math.prod(array.shape[1:]) * array.itemsize))
    for start in range(0, array.shape[0], rows):
        yield array[start : start + rows]


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of an array in C order, copied only if it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _file(rank: int) -> Path:
    return Path("c", *["0"] * rank)


def _inner_chunks(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the number of inner chunks: the fewest equal ones of at most `_INNER_CHUNK_BYTES`."""
    least = -(-math.prod(shape) * dtype.itemsize // _INNER_CHUNK_BYTES)
    return next((n for n in range(max(1, least), min(shape[0], 1 << 16) + 1) if shape[0] % n == 0), 1)


def _index(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    count = _inner_chunks(shape, dtype)
    size = math.prod(shape) * dtype.itemsize // count
    return np.array([(i * size, size) for i in range(count)], "<u8").tobytes()


def _spec(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """Return the `zarr.json` of an array (zarr 3 core specification, sharding codec 1.0)."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = [shape[0] // _inner_chunks(shape, dtype), *shape[1:]]
    sharding = {"chunk_shape": inner, "codecs": [little], "index_codecs": [little]}
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
