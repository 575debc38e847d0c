"""Read memory-mapped, validated tensors of a Hugging Face checkpoint folder by name. Start at `CheckpointReader`."""

import contextlib
import mmap
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import MAX_JSON_BYTES, parse_json, read_json

from .tensor_info import TensorInfo, count_elements, is_buffer, quote
from .torch_pickle import read_torch_file

MAX_NAME: Final = 250  # characters of a tensor name, bytes of a file name

SAFETENSORS_DTYPES: Final = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_OTHERS: Final = {"F64": "f8", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
_BUFFER_DTYPES: Final = SAFETENSORS_DTYPES | {code: np.dtype(kind) for code, kind in _OTHERS.items()}


_LFS_POINTER: Final = b"version https://git-lfs"
_DAMAGED: Final = "is damaged or not a safetensors file"


def read_safetensors(mapped: mmap.mmap, file: str) -> dict[str, TensorInfo]:
    """Locate the tensors of a safetensors file: 8 bytes of header length, the header in JSON, the data."""
    if mapped[: len(_LFS_POINTER)] == _LFS_POINTER:
        raise DSMoEError("is a Git LFS pointer, not weights; `git lfs pull` downloads them")
    length = int.from_bytes(mapped[:8], "little")
    if length > MAX_JSON_BYTES:
        raise DSMoEError(f"{_DAMAGED}: has a header of {length} bytes; at most {MAX_JSON_BYTES}")
    data = 8 + length
    if data > len(mapped):
        raise DSMoEError(f"{_DAMAGED}: has a header up to byte {data} of a file of {len(mapped)}")
    try:
        header = parse_json(mapped[8:data])
    except DSMoEError as error:
        raise DSMoEError(f"{_DAMAGED}: its header {error}") from None
    if mapped[8:9] != b"{":  # the format allows no space before it
        raise DSMoEError("has a header that does not start with {")
    _check_metadata(header.pop("__metadata__", {}))

    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name in list(header):
        match header.pop(name):  # the header shrinks as `tensors` grows
            case {"dtype": str(code), "shape": list(sizes), "data_offsets": [begin, end], **rest} if not rest:
                pass
            case _:
                raise DSMoEError(f"must describe tensor {quote(name)} by dtype, shape and data_offsets only")
        if bad := [number for number in (*sizes, begin, end) if type(number) is not int]:
            raise DSMoEError(f"tensor {quote(name)} has {quote(bad[0])} for a dimension or an offset")
        dtype, shape = (_BUFFER_DTYPES if is_buffer(name) else SAFETENSORS_DTYPES).get(code), tuple(sizes)
        if dtype is None:
            raise DSMoEError(f"tensor {quote(name)} has dtype {quote(code)}; weights are F32, F16 or BF16")
        nbytes = count_elements(name, shape, dtype.itemsize) * dtype.itemsize
        if end - begin != nbytes:
            bounds = f"{quote(begin)} to {quote(end)}"
            raise DSMoEError(f"tensor {quote(name)} spans {bounds}; its shape and dtype need {nbytes} bytes")
        tensors[name] = TensorInfo(dtype, shape, file, data + begin)
        ranges.append((begin, end, name))

    filled = 0
    for begin, end, name in sorted(ranges):
        if begin != filled:
            raise DSMoEError(f"tensor {quote(name)} starts at {quote(begin)}; the one before it ends at {filled}")
        filled = end
    if filled != len(mapped) - data:
        raise DSMoEError(f"has tensors up to byte {quote(filled)} of its data; it has {len(mapped) - data} bytes")
    return tensors


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise DSMoEError("has a __metadata__ that is not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise DSMoEError(f"has __metadata__ {quote(key)} that is {quote(value)}, not a string")
        (key + value).encode()  # raises for a lone surrogate


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file in a checkpoint; links must not lead outside.

    Exception: in the hub cache `snapshots/<revision>/` links to the sibling `blobs/`, which may link to the `blobs/`
    shared by all repositories (huggingface_hub 2).
    """
    home = Path(os.path.realpath(folder))
    try:
        path = Path(os.path.realpath(folder / name, strict=True))
    except OSError as error:
        raise DSMoEError(f"{folder / name}: cannot be opened: {error.strerror}") from error
    stores = [folder / "blobs" for folder in home.parents[1:3]] if home.parent.name == "snapshots" else []
    if not any(path.is_relative_to(home) for home in [home, *stores]):
        end = repr(str(path))[-200:-1]  # a path may contain line breaks
        raise DSMoEError(f"{folder / name}: links to {end}, outside the checkpoint")
    if not path.is_file():
        raise DSMoEError(f"{folder / name}: is not a regular file")
    return path


_Parser = Callable[[mmap.mmap, str], dict[str, TensorInfo]]
_Layout = tuple[str, bool, _Parser]  # file, whether it is an index, parser
Layouts = tuple[_Layout, ...]

# In order of preference.
LAYOUTS: Final[Layouts] = (
    ("model.safetensors.index.json", True, read_safetensors),
    ("model.safetensors", False, read_safetensors),
    ("pytorch_model.bin.index.json", True, read_torch_file),
    ("pytorch_model.bin", False, read_torch_file),
)


def read_index(path: Path) -> dict[str, str]:
    """Return an index's map from tensor to shard; shards are weight files in the same folder."""
    path_inside(path.parent, path.name)  # rejects links that lead outside
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise DSMoEError(f"{path}: weight_map must be a non-empty object")
    end = Path(path.name.removesuffix(".index.json")).suffix
    for tensor, file in shards.items():
        name = file.removeprefix("./") if isinstance(file, str) else ""
        is_name = name.isprintable() and "/" not in name and "\\" not in name and len(name.encode()) <= MAX_NAME
        if not is_name or not name.endswith(end):
            rule = f"a shard must be a {end} file in the same folder"
            raise DSMoEError(f"{path}: tensor {quote(tensor)} is in {quote(name or file)}; {rule}")
        shards[tensor] = name
    return shards


def choose_layout(
    exists: Callable[[str], bool], shards_of: Callable[[str], Collection[str]], layouts: Layouts = LAYOUTS
) -> _Layout | None:
    """Choose which weights of a folder to read; None if there are none.

    As in transformers, an index with missing shards is ignored if there is a single file. A single file and a complete
    set of shards are an error, since programs differ in which they read.
    """
    found = [layout for layout in layouts if exists(layout[0])]
    if len(found) < 2 or not found[0][1] or found[0][0] != f"{found[1][0]}.index.json":
        return found[0] if found else None
    (index, *_), single = found[:2]
    try:
        shards = set(shards_of(index))
    except DSMoEError:
        return single
    if shards != {single[0]} and all(map(exists, shards)):
        raise DSMoEError(f"holds two checkpoints, {single[0]} and the shards of {index}; remove one of them")
    return found[0] if shards == {single[0]} else single


class CheckpointReader(contextlib.AbstractContextManager["CheckpointReader"]):
    """Reads tensors of a Hugging Face checkpoint folder on demand.

    Opening validates only headers and indexes. The files must not change while the reader or one of its arrays exists.
    """

    tensors: dict[str, TensorInfo]
    ignored: list[str]  # files and tensors: other layouts, stale indexes and shards, recomputed buffers

    def __init__(self, folder: str | Path, layouts: Layouts = LAYOUTS):
        self.folder = Path(folder)
        self.tensors, self.ignored = {}, []
        self._maps: dict[str, mmap.mmap] = {}
        if not self.folder.is_dir():
            raise DSMoEError(f"{self.folder}: no such folder")
        name, is_index, parse = self._find_weights(layouts)
        index = read_index(self.folder / name) if is_index else None
        for file in dict.fromkeys(index.values()) if index else [name]:
            for tensor, info in self._read_file(file, parse).items():
                if len(tensor) > MAX_NAME or not tensor.isprintable():
                    rule = f"must have at most {MAX_NAME} characters, all printable"
                    raise DSMoEError(f"{self.folder / file}: tensor name {quote(tensor)} {rule}")
                if tensor in self.tensors:
                    both = f"{quote(self.tensors[tensor].file)} and {quote(file)}"
                    raise DSMoEError(f"{self.folder}: tensor {quote(tensor)} is in both {both}")
                if is_buffer(tensor):
                    self.ignored.append(tensor)
                    continue
                if index and tensor not in index:
                    raise DSMoEError(f"{self.folder / file}: tensor {quote(tensor)} is not in {name}")
                self.tensors[tensor] = info
        for tensor, file in (index or {}).items():
            if is_buffer(tensor):
                continue
            if tensor not in self.tensors or self.tensors[tensor].file != file:
                raise DSMoEError(f"{self.folder / file}: tensor {quote(tensor)} of {name} is missing")
        if not self.tensors:
            raise DSMoEError(f"{self.folder / name}: has no tensors")
        ends = tuple({Path(name.removesuffix(".index.json")).suffix for name, _, _ in layouts})
        others = sorted({*os.listdir(self.folder)} - {name, *self._maps})
        self.ignored += [other for other in others if other.removesuffix(".index.json").endswith(ends)]

    def read(self, name: str) -> np.ndarray:
        """Return a read-only view of the mapped tensor, valid after closing; it may be strided or unaligned."""
        info = self.tensors.get(name)
        if info is None:
            raise DSMoEError(f"{self.folder}: has no tensor {quote(name)}")
        if info.file not in self._maps:
            raise DSMoEError(f"{self.folder}: the reader is closed, cannot read tensor {quote(name)}")
        if 0 in info.shape:
            empty = np.zeros(info.shape, info.dtype)
            empty.flags.writeable = False
            return empty
        # numpy checks again that shape and strides stay inside the file.
        return np.ndarray(info.shape, info.dtype, self._maps[info.file], info.offset, info.strides)

    def __exit__(self, *_: object) -> None:
        """Release the files; each remains mapped while an array read from it exists."""
        self._maps.clear()

    def _find_weights(self, layouts: Layouts) -> _Layout:
        def exists(file: str) -> bool:
            return os.path.lexists(self.folder / file)  # opening a dangling link raises an error

        try:
            chosen = choose_layout(exists, lambda index: read_index(self.folder / index).values(), layouts)
        except ValueError as error:
            raise DSMoEError(f"{self.folder}: {error}") from None
        if chosen is None:
            names = ", ".join(name for name, _, _ in layouts)
            raise DSMoEError(f"{self.folder}: no weights; looked for {names}")
        return chosen

    def _read_file(self, name: str, parse: _Parser) -> dict[str, TensorInfo]:
        path = path_inside(self.folder, name)
        try:
            if path.stat().st_size == 0:
                raise DSMoEError("is empty")
            with path.open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return parse(self._maps[name], name)
        except (OSError, ValueError) as error:
            raise DSMoEError(f"{self.folder / name}: {error}") from error
