"""Locate the tensors of a PyTorch `.bin` file without torch and without unpickling. Start at `read_torch_file`.

A `.bin` file is a pickle that calls functions to build tensors, and raw storages. `_Machine` interprets the opcodes in
`_OPCODES` and the functions in `_CALLS`. A restricted Python unpickler could still be made to set attributes of our
functions (BUILD), allocate gigabytes (a memo index of 2**31) and hash a nested tuple for years (a dictionary key).
"""

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Final, cast

import ml_dtypes
import numpy as np

from dsmoe_jax.errors import DSMoEError

from .tensor_info import MAX_RANK, TensorInfo, count_elements, is_buffer, quote

# Enough for 12,000 tensors per file at 40 opcodes and 150 bytes each. An opcode allocates up to 110 bytes and an entry
# of the zip directory 600, so these limits bound memory.
MAX_PICKLE_BYTES: Final = 8 << 20
MAX_OPCODES: Final = 500_000
MAX_STRING: Final = 1 << 20
MAX_TENSORS: Final = 50_000  # two opcodes repeat a tensor
MAX_DIRECTORY_BYTES: Final = 2 << 20
_MAX_GLOBAL: Final = 200  # length of a module or function name
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001

_WEIGHTS: Final = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
_BUFFERS: Final = tuple(map(np.dtype, (np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_)))
_NAMES: Final = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES: Final = {f"torch.{name}Storage": d for name, d in zip(_NAMES, _WEIGHTS + _BUFFERS, strict=True)}


def read_torch_file(mapped: mmap.mmap, file: str) -> dict[str, TensorInfo]:
    """Locate the tensors of a `.bin` file, zip (torch >= 1.6) or legacy, which must contain a flat state dict."""
    read = _read_zip if mapped[:4] == b"PK\x03\x04" else _read_legacy
    state, ranges = read(mapped)
    if not isinstance(state, dict):
        raise DSMoEError(f"holds a {type(state).__name__}, not a dictionary of tensors")
    if len(state) > MAX_TENSORS:
        raise DSMoEError(f"holds {len(state)} tensors; at most {MAX_TENSORS}")
    tensors = {name: _locate(name, entry, ranges, file) for name, entry in state.items()}
    # Tied weights share a storage; one shared by a thousand names is a decompression bomb.
    nbytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if nbytes > 2 * len(mapped):
        raise DSMoEError(f"has tensors of {nbytes} bytes in a file of {len(mapped)}; at most twice its size")
    return tensors


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_Ranges = dict[str, tuple[int, int]]  # storage key -> offset in the file, size in bytes


def _locate(name: str, tensor: object, ranges: _Ranges, file: str) -> TensorInfo:
    """Convert a view of a storage into a location in the file, within the bounds of the storage."""
    if not isinstance(tensor, _Tensor):
        raise DSMoEError(f"entry {quote(name)} is {quote(tensor)}, not a tensor")
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    dtype = _STORAGES[storage.kind]
    if dtype not in _WEIGHTS and not is_buffer(name):
        raise DSMoEError(f"tensor {quote(name)} has dtype {storage.kind}; weights are F32, F16 or BF16")
    if storage.key not in ranges:
        raise DSMoEError(f"tensor {quote(name)} needs storage {quote(storage.key)}, which is not in the file")
    start, nbytes = ranges[storage.key]
    if storage.numel * dtype.itemsize != nbytes:
        declared = f"storage {quote(storage.key)} as {quote(storage.numel)} x {dtype}"
        raise DSMoEError(f"tensor {quote(name)} declares {declared}; it has {nbytes} bytes")
    count = count_elements(name, shape, dtype.itemsize)
    if len(strides) != len(shape) or min(strides, default=0) < 0 or tensor.offset < 0:
        raise DSMoEError(f"tensor {quote(name)} has a negative offset or stride, or strides of another rank")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= storage.numel:
        raise DSMoEError(f"tensor {quote(name)} reaches element {quote(last)} of a storage of {storage.numel}")
    # A stride of 0 repeats elements: without this limit a file of 100 bytes could declare a terabyte.
    if count > storage.numel:
        raise DSMoEError(f"tensor {quote(name)} repeats {storage.numel} stored elements into {count}")
    # Strides of dimensions of size 1 are unused and may be too large for numpy.
    steps = tuple((stride if size > 1 else 1) * dtype.itemsize for size, stride in zip(shape, strides, strict=True))
    return TensorInfo(dtype, shape, file, start + (tensor.offset * dtype.itemsize if count else 0), steps)


def _ordered_dict(*items: object) -> dict:
    if items:
        raise DSMoEError("calls collections.OrderedDict with arguments")
    return {}


def _tensor(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> _Tensor:
    # Metadata such as "conjugate" and "negative" would change all values.
    if not isinstance(storage, _Storage) or type(offset) is not int or metadata:
        raise DSMoEError("calls _rebuild_tensor_v2 with arguments torch does not write")
    for sizes in (shape, strides):
        if type(sizes) is not tuple or len(sizes) > MAX_RANK or any(type(size) is not int for size in sizes):
            raise DSMoEError(f"has a shape or stride that is no tuple of at most {MAX_RANK} integers")
    return _Tensor(storage, offset, shape, strides)


def _parameter(data, requires_grad, hooks) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise DSMoEError(f"calls _rebuild_parameter with {quote(data)}, not a tensor")
    return data


_CALLS: Final[dict[str, Callable]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


class _Machine:
    """Stack, marks and memo of a pickle; dictionary keys must be strings."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def protocol(self, number: int) -> None:
        if number > 2:
            raise DSMoEError(f"is a pickle of protocol {number}; only protocol 2 is supported")

    def pop(self, count: int) -> list:
        if count > len(self.stack):
            raise IndexError
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def pop_to_mark(self) -> list:
        return self.pop(len(self.stack) - self.marks.pop())

    def push_global(self, name: str) -> None:
        name = name.replace(" ", ".", 1)
        if name not in _CALLS and name not in _STORAGES:
            raise DSMoEError(f"imports {quote(name)}; allowed are {', '.join(_CALLS)} and torch's storages")
        self.stack.append(_Global(name))

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _Global) or function.name not in _CALLS or type(arguments) is not tuple:
            raise DSMoEError(f"calls {quote(getattr(function, 'name', function))}, which is not allowed")
        self.stack.append(_CALLS[function.name](*arguments))

    def push_storage(self) -> None:
        match self.stack.pop():
            case ("storage", _Global(name=kind), str(key), str(), int(numel), *view) if view in ([], [None]):
                storage = _Storage(kind, key, numel)
            case _:
                raise DSMoEError("has a persistent id other than ('storage', type, key, location, size)")
        if kind not in _STORAGES or numel < 0 or self.storages.setdefault(key, storage) != storage:
            definition = f"{quote(key)}: {quote(numel)} x {kind}"
            raise DSMoEError(f"has an invalid or conflicting definition of storage {definition}")
        self.stack.append(storage)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise DSMoEError(f"sets {len(items)} keys and values on {quote(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise DSMoEError(f"has key {quote(key)}, which is not a string or a duplicate")
            target[key] = value

    def append_items(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise DSMoEError(f"appends to {quote(self.stack[-1])}")
        self.stack[-1].extend(items)

    def set_attributes(self) -> None:
        """Drop `_metadata`, the module versions of a state dict."""
        target, state = self.pop(2)
        if type(target) is not dict or type(state) is not dict or state.keys() != {"_metadata"}:
            raise DSMoEError(f"sets attributes other than _metadata on {quote(target)}")
        self.stack.append(target)


# fmt: off
_OPCODES: Final[dict[str, Callable[[_Machine, Any], object]]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"), lambda m, arg: m.stack.append(arg)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, arg: m.memo.update({arg: m.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, arg: m.stack.append(m.memo[arg])),
    "PROTO":        lambda m, arg: m.protocol(arg),
    "STOP":         lambda m, _: None,
    "MARK":         lambda m, _: m.marks.append(len(m.stack)),
    "NONE":         lambda m, _: m.stack.append(None),
    "NEWTRUE":      lambda m, _: m.stack.append(True),
    "NEWFALSE":     lambda m, _: m.stack.append(False),
    "EMPTY_TUPLE":  lambda m, _: m.stack.append(()),
    "TUPLE1":       lambda m, _: m.stack.append(tuple(m.pop(1))),
    "TUPLE2":       lambda m, _: m.stack.append(tuple(m.pop(2))),
    "TUPLE3":       lambda m, _: m.stack.append(tuple(m.pop(3))),
    "TUPLE":        lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "EMPTY_LIST":   lambda m, _: m.stack.append([]),
    "APPEND":       lambda m, _: m.append_items(m.pop(1)),
    "APPENDS":      lambda m, _: m.append_items(m.pop_to_mark()),
    "EMPTY_DICT":   lambda m, _: m.stack.append({}),
    "SETITEM":      lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS":     lambda m, _: m.set_items(m.pop_to_mark()),
    "GLOBAL":       lambda m, arg: m.push_global(arg),
    "REDUCE":       lambda m, _: m.call(),
    "BUILD":        lambda m, _: m.set_attributes(),
    "BINPERSID":    lambda m, _: m.push_storage(),
}
# fmt: on


def _read_global(stream: io.BytesIO) -> str:
    module, name = stream.readline(_MAX_GLOBAL), stream.readline(_MAX_GLOBAL)
    if not module.endswith(b"\n") or not name.endswith(b"\n"):
        raise DSMoEError(f"imports {quote(str(module + name))}, which is not a module and a name")
    return f"{module[:-1].decode('ascii')} {name[:-1].decode('ascii')}"


def _read_string(stream: io.BytesIO) -> str:
    if (size := int.from_bytes(stream.read(4), "little")) > MAX_STRING:
        raise DSMoEError(f"has a string of {size} bytes; at most {MAX_STRING}")
    if len(data := stream.read(size)) < size:
        raise DSMoEError(f"has a string of {size} bytes, but only {len(data)} follow")
    return data.decode()


# pickletools' readers of these two opcodes have no length limit.
_READERS: Final[dict[str, Callable[[io.BytesIO], Any]]] = {"GLOBAL": _read_global, "BINUNICODE": _read_string}
_BY_CODE: Final = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _operations(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield each opcode's name and argument up to STOP; unlike `pickletools.genops`, check opcodes before arguments."""
    while code := stream.read(1):
        opcode = _BY_CODE.get(code)
        if opcode is None:
            raise DSMoEError(f"has unknown pickle opcode {code!r}")
        if opcode.name not in _OPCODES:
            raise DSMoEError(f"uses pickle opcode {opcode.name}, which is not allowed")
        reader = opcode.arg and _READERS.get(opcode.name, opcode.arg.reader)
        yield opcode.name, reader and reader(stream)
        if opcode.name == "STOP":
            return
    raise DSMoEError("pickle exhausted before seeing STOP")


def _unpickle(stream: io.BytesIO, opcodes_left: Iterator[int]) -> tuple[Any, dict[str, _Storage]]:
    """Return the value of the next pickle in the stream and its storages."""
    machine, count = _Machine(), 0
    try:
        for name, argument in _operations(stream):
            if next(opcodes_left, None) is None:
                raise DSMoEError(f"has pickles of more than {MAX_OPCODES} opcodes")
            _OPCODES[name](machine, argument)
            count += 1
    except ValueError:
        raise
    except Exception as error:  # empty stack, unknown memo entry, too few arguments …
        raise DSMoEError(f"has a damaged pickle: {type(error).__name__} at opcode {count}") from error
    if len(machine.stack) != 1:
        raise DSMoEError(f"has a pickle that ends with {len(machine.stack)} values; it must be 1")
    return machine.stack[0], machine.storages


def _read_zip(mapped: mmap.mmap) -> tuple[Any, _Ranges]:
    """Read torch >= 1.6: a zip of `<root>/data.pkl` and an uncompressed `<root>/data/<key>` for each storage."""
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], _Directory(mapped)))
    except _TooLargeError as error:
        raise DSMoEError(str(error)) from None
    except Exception as error:  # zipfile raises half a dozen types
        raise DSMoEError(f"is truncated or not a zip archive: {quote(str(error))}") from error
    ranges: _Ranges = {}
    end = 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        if member.filename in ranges:
            raise DSMoEError(f"has member {quote(member.filename)} twice")
        if member.header_offset < end:
            raise DSMoEError(f"has member {quote(member.filename)} inside the one before it")
        ranges[member.filename] = start, size = _member_range(mapped, member)
        end = start + size
    if end > archive.start_dir:
        raise DSMoEError(f"has members up to byte {end}, its directory starts at {archive.start_dir}")
    pickles = [name for name in ranges if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DSMoEError(f"has {len(pickles)} members called <root>/data.pkl; it must be 1")
    root = pickles[0].removesuffix("data.pkl")
    start, size = ranges.get(f"{root}byteorder", (0, 0))
    if size and mapped[start : start + min(size, 16)] != b"little":
        raise DSMoEError("has a byteorder other than little")
    start, size = ranges[f"{root}data.pkl"]
    if size > MAX_PICKLE_BYTES:
        raise DSMoEError(f"has a data.pkl of {size} bytes; at most {MAX_PICKLE_BYTES}")
    state, storages = _unpickle(io.BytesIO(mapped[start : start + size]), iter(range(MAX_OPCODES)))
    prefix = f"{root}data/"
    data = {name.removeprefix(prefix): value for name, value in ranges.items() if name.startswith(prefix)}
    if unused := data.keys() - storages.keys():
        raise DSMoEError(f"has storage {quote(min(unused))}, which no tensor uses")
    return state, data


class _TooLargeError(Exception):
    """Not caught by zipfile, unlike errors of known types."""


class _Directory:
    """A file for `zipfile` that limits the size of the directory, whose entries take 600 bytes of memory each."""

    def __init__(self, mapped: mmap.mmap):
        self.mapped, self.seek, self.tell = mapped, mapped.seek, mapped.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = None) -> bytes:
        size = len(self.mapped) - self.mapped.tell() if size is None or size < 0 else size
        if size > MAX_DIRECTORY_BYTES:
            raise _TooLargeError(f"has a zip directory of {size} bytes; at most {MAX_DIRECTORY_BYTES}")
        return self.mapped.read(size)


def _member_range(mapped: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Return offset and size of the data of an uncompressed member, after its header of variable length."""
    name, offset, size = quote(member.filename), member.header_offset, member.file_size
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != size or member.flag_bits & 1:
        raise DSMoEError(f"has compressed or encrypted member {name}")
    if not 0 <= offset <= len(mapped) - 30 or mapped[offset : offset + 4] != b"PK\x03\x04":
        raise DSMoEError(f"has member {name} at byte {offset}, where there is no member header")
    name_size, extra_size = struct.unpack("<HH", mapped[offset + 26 : offset + 30])
    encoded = member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")
    if mapped[offset + 30 : offset + 30 + name_size] != encoded:
        raise DSMoEError(f"has member {name}, whose header has another name")
    start = offset + 30 + name_size + extra_size
    if start + size > len(mapped):
        raise DSMoEError(f"has member {name} up to byte {start + size} of a file of {len(mapped)}")
    return start, size


def _read_legacy(mapped: mmap.mmap) -> tuple[Any, _Ranges]:
    """Read torch < 1.6: five pickles (magic, protocol, system, state, keys), then each storage with its size."""
    stream, left = io.BytesIO(mapped[:MAX_PICKLE_BYTES]), iter(range(MAX_OPCODES))
    if mapped[:2] != b"\x80\x02" or _unpickle(stream, left)[0] != _LEGACY_MAGIC:
        raise DSMoEError("is neither a torch zip archive nor a legacy torch file")
    if (protocol := _unpickle(stream, left)[0]) != _LEGACY_PROTOCOL:
        raise DSMoEError(f"has legacy protocol {quote(protocol)}; it must be {_LEGACY_PROTOCOL}")
    system = _unpickle(stream, left)[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DSMoEError("was not written on a little-endian machine")
    state, storages = _unpickle(stream, left)
    keys, _ = _unpickle(stream, left)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys):
        raise DSMoEError(f"must list its storages, got {quote(keys)}")
    ranges: _Ranges = {}
    position = stream.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in ranges:
            raise DSMoEError(f"lists storage {quote(key)} twice, or no tensor uses it")
        dtype = _STORAGES[storage.kind]
        if dtype not in _WEIGHTS:
            raise DSMoEError(f"has a storage of {storage.kind}; weights are F32, F16 or BF16")
        numel, position = int.from_bytes(mapped[position : position + 8], "little"), position + 8
        if numel != storage.numel or position + numel * dtype.itemsize > len(mapped):
            actual = f"{numel} in {max(0, len(mapped) - position)} bytes"
            raise DSMoEError(f"storage {quote(key)} must be {quote(storage.numel)} x {dtype}, got {actual}")
        ranges[key] = (position, numel * dtype.itemsize)
        position += numel * dtype.itemsize
    if position != len(mapped):
        raise DSMoEError(f"has {len(mapped) - position} bytes after its last storage")
    return state, ranges
