"""Where each tensor of a PyTorch `.bin` file lies, found without torch and without running its pickle.

Read `read_torch_file` first. A `.bin` file is a pickle that calls functions to build tensors, and a set of
raw storages they look into. `_Machine` follows the pickle opcode by opcode: what an opcode may do is a row of
`_OPCODES`, what may be called is a row of `_CALLS`, and there is nothing else. Python's own unpickler is not
used, not even restricted: by allowed names alone it can be made to set attributes on our functions (BUILD),
to allocate gigabytes (a memo index of 2**31) and to hash a nested tuple for years (a dictionary key).
"""

import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Final, cast

import ml_dtypes
import numpy as np

from dsmoe_jax.errors import DSMoEError

# Room for 12 thousand tensors a file, 40 opcodes and 150 bytes each. An opcode makes up to 110 bytes of objects, an
# entry of the zip's directory 600: a file must not be able to take more memory than its own size and a little.
MAX_PICKLE_BYTES: Final = 8 << 20
MAX_OPCODES: Final = 500_000
MAX_STRING: Final = 1 << 20
MAX_TENSORS: Final = 50_000  # two opcodes name one tensor again
MAX_DIRECTORY_BYTES: Final = 2 << 20
_MAX_GLOBAL: Final = 200  # of a line that names a module or a function
MAX_RANK: Final = 64  # numpy's own bound
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001

# What torch calls a storage, and its element.
_STORAGES: Final[dict[str, np.dtype]] = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    # Those of buffers alone.
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_WEIGHTS: Final = tuple(_STORAGES.values())[:3]
_BUFFER: Final = re.compile(r"(^|\.)(rotary_emb\.[a-z_]+|masked_bias|causal_mask|position_ids)$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a checkpoint: its element, its shape, and the bytes of the file it looks into."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: str  # name inside the checkpoint's folder
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None = None  # bytes; None is row by row


def read_torch_file(mapped: mmap.mmap, file: str) -> dict[str, TensorInfo]:
    """Find every tensor of a `.bin` file, zip (torch >= 1.6) or legacy; the storages themselves are not read.

    Raises ValueError, in one line, on anything that is not a flat dictionary of float32, float16 or bfloat16
    tensors lying inside their storages.
    """
    read = _read_zip if mapped[:4] == b"PK\x03\x04" else _read_legacy
    state, places = read(mapped)
    if not isinstance(state, dict):
        raise DSMoEError(f"holds a {type(state).__name__}, not a dictionary of tensors")
    if len(state) > MAX_TENSORS:
        raise DSMoEError(f"holds {len(state)} tensors; at most {MAX_TENSORS}")
    tensors = {name: _locate(name, entry, places, file) for name, entry in state.items()}
    # Tied weights are one storage under two names; a storage under a thousand names is a bomb.
    nbytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if nbytes > 2 * len(mapped):
        raise DSMoEError(f"has tensors of {nbytes} bytes in a file of {len(mapped)}; at most twice its size")
    return tensors


def is_buffer(name: str) -> bool:
    """Whether a tensor is what older releases of transformers stored beside weights: what the model computes itself."""
    return _BUFFER.search(name) is not None


def show(value: object) -> str:
    """Any value from an untrusted file in one short line: a nested value is named by its type only."""
    value = value[:160] if isinstance(value, str) else value
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:157]}..."


def count_elements(name: str, shape: tuple[int, ...], itemsize: int) -> int:
    """The number of elements of `shape`; ValueError where an array of that shape cannot exist."""
    if len(shape) > MAX_RANK:
        raise DSMoEError(f"tensor {show(name)} has {len(shape)} dimensions; at most {MAX_RANK}")
    if bad := [size for size in shape if not 0 <= size < 2**63]:
        raise DSMoEError(f"tensor {show(name)} has a dimension of {show(bad[0])}; it must be in [0, 2**63)")
    if math.prod(max(size, 1) for size in shape) * itemsize >= 2**63:
        raise DSMoEError(f"tensor {show(name)} has shape {show(str(shape))}: 2**63 bytes or more")
    return math.prod(shape)


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


_Places = dict[str, tuple[int, int]]  # a storage's key -> its first byte in the file, its length in bytes


def _locate(name: str, tensor: object, places: _Places, file: str) -> TensorInfo:
    """Turn a view on a storage into bytes of the file, once no element of it can lie outside the storage."""
    if not isinstance(tensor, _Tensor):
        raise DSMoEError(f"entry {show(name)} is {show(tensor)}, not a tensor")
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    dtype = _STORAGES[storage.kind]
    if dtype not in _WEIGHTS and not is_buffer(name):
        raise DSMoEError(f"tensor {show(name)} has dtype {storage.kind}; weights are F32, F16 or BF16")
    if storage.key not in places:
        raise DSMoEError(f"tensor {show(name)} needs storage {show(storage.key)}, which the file lacks")
    start, nbytes = places[storage.key]
    if storage.numel * dtype.itemsize != nbytes:
        raise DSMoEError(
            f"tensor {show(name)} says storage {show(storage.key)} holds {show(storage.numel)} x {dtype}; "
            f"it has {nbytes} bytes"
        )
    count = count_elements(name, shape, dtype.itemsize)
    if len(strides) != len(shape) or min(strides, default=0) < 0 or tensor.offset < 0:
        raise DSMoEError(f"tensor {show(name)} has a negative offset or stride, or strides of another rank")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= storage.numel:
        raise DSMoEError(f"tensor {show(name)} reaches element {show(last)} of a storage of {storage.numel}")
    # A stride of 0 repeats elements: without this bound a file of 100 bytes could claim a terabyte.
    if count > storage.numel:
        raise DSMoEError(f"tensor {show(name)} repeats {storage.numel} stored elements into {count}")
    # The stride of a dimension of one element is never used, and may be too large for numpy.
    steps = tuple((stride if size > 1 else 1) * dtype.itemsize for size, stride in zip(shape, strides, strict=True))
    return TensorInfo(dtype, shape, file, start + (tensor.offset * dtype.itemsize if count else 0), steps)


def _ordered_dict(*items: object) -> dict:
    if items:
        raise DSMoEError("calls collections.OrderedDict with arguments; torch fills it afterwards")
    return {}


def _tensor(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> _Tensor:
    # The metadata may say "conjugate" or "negative", which would change every value.
    if not isinstance(storage, _Storage) or type(offset) is not int or metadata:
        raise DSMoEError("calls _rebuild_tensor_v2 with arguments torch does not write")
    for sizes in (shape, strides):
        if type(sizes) is not tuple or len(sizes) > MAX_RANK or any(type(size) is not int for size in sizes):
            raise DSMoEError(f"has a shape or stride that is no tuple of at most {MAX_RANK} integers")
    return _Tensor(storage, offset, shape, strides)


def _parameter(data, requires_grad, hooks) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise DSMoEError(f"calls _rebuild_parameter with {show(data)}, not a tensor")
    return data


_CALLS: Final[dict[str, Callable]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


class _Machine:
    """A pickle's stack, its marks and its memo; every dictionary key is a string, every step is O(1)."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def protocol(self, number: int) -> None:
        if number > 2:
            raise DSMoEError(f"is a pickle of protocol {number}; torch writes and reads protocol 2")

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
            raise DSMoEError(f"asks for {show(name)}; allowed are {', '.join(_CALLS)} and torch's storages")
        self.stack.append(_Global(name))

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _Global) or function.name not in _CALLS or type(arguments) is not tuple:
            raise DSMoEError(f"calls {show(getattr(function, 'name', function))}, which is no function here")
        self.stack.append(_CALLS[function.name](*arguments))

    def push_storage(self) -> None:
        match self.stack.pop():
            case ("storage", _Global(name=kind), str(key), str(), int(numel), *view) if view in ([], [None]):
                storage = _Storage(kind, key, numel)
            case _:
                raise DSMoEError("has a persistent id other than ('storage', type, key, location, size)")
        if kind not in _STORAGES or numel < 0 or self.storages.setdefault(key, storage) != storage:
            raise DSMoEError(f"describes storage {show(key)} wrongly or in two ways: {show(numel)} x {kind}")
        self.stack.append(storage)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise DSMoEError(f"sets {len(items)} keys and values on {show(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise DSMoEError(f"has key {show(key)}, which is no string or is there twice")
            target[key] = value

    def append_items(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise DSMoEError(f"appends to {show(self.stack[-1])}")
        self.stack[-1].extend(items)

    def set_attributes(self) -> None:
        """A state_dict carries `_metadata`, the versions of its modules: no weights, so it is dropped."""
        target, state = self.pop(2)
        if type(target) is not dict or type(state) is not dict or state.keys() != {"_metadata"}:
            raise DSMoEError(f"sets attributes other than _metadata on {show(target)}")
        self.stack.append(target)


# fmt: off
_OPCODES: Final[dict[str, Callable[[_Machine, Any], object]]] = {
    "PROTO":        lambda m, arg: m.protocol(arg),
    "STOP":         lambda m, _: None,
    "MARK":         lambda m, _: m.marks.append(len(m.stack)),
    "NONE":         lambda m, _: m.stack.append(None),
    "NEWTRUE":      lambda m, _: m.stack.append(True),
    "NEWFALSE":     lambda m, _: m.stack.append(False),
    "BININT":       lambda m, arg: m.stack.append(arg),
    "BININT1":      lambda m, arg: m.stack.append(arg),
    "BININT2":      lambda m, arg: m.stack.append(arg),
    "LONG1":        lambda m, arg: m.stack.append(arg),
    "BINUNICODE":   lambda m, arg: m.stack.append(arg),
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
    "BINPUT":       lambda m, arg: m.memo.update({arg: m.stack[-1]}),
    "LONG_BINPUT":  lambda m, arg: m.memo.update({arg: m.stack[-1]}),
    "BINGET":       lambda m, arg: m.stack.append(m.memo[arg]),
    "LONG_BINGET":  lambda m, arg: m.stack.append(m.memo[arg]),
    "GLOBAL":       lambda m, arg: m.push_global(arg),
    "REDUCE":       lambda m, _: m.call(),
    "BUILD":        lambda m, _: m.set_attributes(),
    "BINPERSID":    lambda m, _: m.push_storage(),
}
# fmt: on


def _read_global(stream: io.BytesIO) -> str:
    module, name = stream.readline(_MAX_GLOBAL), stream.readline(_MAX_GLOBAL)
    if not module.endswith(b"\n") or not name.endswith(b"\n"):
        raise DSMoEError(f"asks for {show(str(module + name))}, which is no module and name in two lines")
    return f"{module[:-1].decode('ascii')} {name[:-1].decode('ascii')}"


def _read_string(stream: io.BytesIO) -> str:
    if (size := int.from_bytes(stream.read(4), "little")) > MAX_STRING:
        raise DSMoEError(f"has a string of {size} bytes; at most {MAX_STRING}")
    if len(data := stream.read(size)) < size:
        raise DSMoEError(f"has a string of {size} bytes, of which {len(data)} are there")
    return data.decode()


# For two opcodes pickletools' own readers take whatever length they are told.
_READERS: Final[dict[str, Callable[[io.BytesIO], Any]]] = {"GLOBAL": _read_global, "BINUNICODE": _read_string}


_BY_CODE: Final = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _operations(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Each opcode's name and argument up to STOP, as `pickletools.genops` has them.

    It reads an argument before one can say that the opcode has no business here: some are as long as the file, and
    its errors repeat them.
    """
    while code := stream.read(1):
        opcode = _BY_CODE.get(code)
        if opcode is None:
            raise DSMoEError(f"has unknown pickle opcode {code!r}")
        if opcode.name not in _OPCODES:
            raise DSMoEError(f"uses pickle opcode {opcode.name}, which no tensor needs")
        reader = opcode.arg and _READERS.get(opcode.name, opcode.arg.reader)
        yield opcode.name, reader and reader(stream)
        if opcode.name == "STOP":
            return
    raise DSMoEError("pickle exhausted before seeing STOP")


def _unpickle(stream: io.BytesIO, opcodes_left: Iterator[int]) -> tuple[Any, dict[str, _Storage]]:
    """The value of the pickle that starts here and the storages it names; the stream is left behind it."""
    machine = _Machine()
    count = 0
    try:
        for name, argument in _operations(stream):
            if next(opcodes_left, None) is None:
                raise DSMoEError(f"has pickles of more than {MAX_OPCODES} opcodes")
            _OPCODES[name](machine, argument)
            count += 1
    except ValueError:
        raise
    except Exception as error:  # An empty stack, an unknown memo entry, a call with too few arguments ...
        raise DSMoEError(f"has a damaged pickle: {type(error).__name__} at opcode {count}") from error
    if len(machine.stack) != 1:
        raise DSMoEError(f"has a pickle that ends with {len(machine.stack)} values; it must be 1")
    return machine.stack[0], machine.storages


def _read_zip(mapped: mmap.mmap) -> tuple[Any, _Places]:
    """Torch >= 1.6: a zip of `<root>/data.pkl` and one uncompressed `<root>/data/<key>` a storage."""
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], _Directory(mapped)))
    except _TooLargeError as error:
        raise DSMoEError(str(error)) from None
    except Exception as error:  # zipfile answers damage with half a dozen types
        raise DSMoEError(f"is cut short or is not a zip archive: {show(str(error))}") from error
    places: _Places = {}
    end = 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        if member.filename in places:
            raise DSMoEError(f"has member {show(member.filename)} twice")
        if member.header_offset < end:
            raise DSMoEError(f"has member {show(member.filename)} inside the one before it")
        places[member.filename] = start, size = _member_place(mapped, member)
        end = start + size
    if end > archive.start_dir:
        raise DSMoEError(f"has members up to byte {end}, its directory starts at {archive.start_dir}")
    pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DSMoEError(f"has {len(pickles)} members called <root>/data.pkl; it must be 1")
    root = pickles[0].removesuffix("data.pkl")
    start, size = places.get(f"{root}byteorder", (0, 0))
    if size and mapped[start : start + min(size, 16)] != b"little":
        raise DSMoEError("has a byteorder other than little")
    start, size = places[f"{root}data.pkl"]
    if size > MAX_PICKLE_BYTES:
        raise DSMoEError(f"has a data.pkl of {size} bytes; at most {MAX_PICKLE_BYTES}")
    state, storages = _unpickle(io.BytesIO(mapped[start : start + size]), iter(range(MAX_OPCODES)))
    prefix = f"{root}data/"
    data = {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}
    if unused := data.keys() - storages.keys():
        raise DSMoEError(f"has storage {show(min(unused))}, which no tensor uses")
    return state, data


class _TooLargeError(Exception):
    """Zipfile swallows some errors of the file it reads, but none of a type that is new to it."""


class _Directory:
    """The file as `zipfile` sees it, which would read a directory of any length and keep 600 bytes an entry."""

    def __init__(self, mapped: mmap.mmap):
        self.mapped, self.seek, self.tell = mapped, mapped.seek, mapped.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = None) -> bytes:
        size = len(self.mapped) - self.mapped.tell() if size is None or size < 0 else size
        if size > MAX_DIRECTORY_BYTES:
            raise _TooLargeError(f"has a zip directory of {size} bytes; at most {MAX_DIRECTORY_BYTES}")
        return self.mapped.read(size)


def _member_place(mapped: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a stored member's bytes lie. Its own header is asked, since only that knows its length."""
    name, offset, size = show(member.filename), member.header_offset, member.file_size
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != size or member.flag_bits & 1:
        raise DSMoEError(f"has compressed or encrypted member {name}; torch stores them as they are")
    if not 0 <= offset <= len(mapped) - 30 or mapped[offset : offset + 4] != b"PK\x03\x04":
        raise DSMoEError(f"has member {name} at byte {offset}, where no member starts")
    name_size, extra_size = struct.unpack("<HH", mapped[offset + 26 : offset + 30])
    encoded = member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")
    if mapped[offset + 30 : offset + 30 + name_size] != encoded:
        raise DSMoEError(f"has member {name}, whose own header gives another name")
    start = offset + 30 + name_size + extra_size
    if start + size > len(mapped):
        raise DSMoEError(f"has member {name} up to byte {start + size} of a file of {len(mapped)}")
    return start, size


def _read_legacy(mapped: mmap.mmap) -> tuple[Any, _Places]:
    """Torch < 1.6: five pickles (magic, protocol, system, state, keys), then each storage with its size."""
    stream, left = io.BytesIO(mapped[:MAX_PICKLE_BYTES]), iter(range(MAX_OPCODES))
    if mapped[:2] != b"\x80\x02" or _unpickle(stream, left)[0] != _LEGACY_MAGIC:
        raise DSMoEError("is neither a torch zip archive nor a legacy torch file")
    if (protocol := _unpickle(stream, left)[0]) != _LEGACY_PROTOCOL:
        raise DSMoEError(f"has legacy protocol {show(protocol)}; it must be {_LEGACY_PROTOCOL}")
    system = _unpickle(stream, left)[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DSMoEError("was not written by a little-endian machine")
    state, storages = _unpickle(stream, left)
    keys, _ = _unpickle(stream, left)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys):
        raise DSMoEError(f"has {show(keys)} where the list of its storages must be")
    places: _Places = {}
    position = stream.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in places:
            raise DSMoEError(f"lists storage {show(key)} twice, or no tensor uses it")
        dtype = _STORAGES[storage.kind]
        if dtype not in _WEIGHTS:
            raise DSMoEError(f"has a storage of {storage.kind}; weights are F32, F16 or BF16")
        numel, position = int.from_bytes(mapped[position : position + 8], "little"), position + 8
        if numel != storage.numel or position + numel * dtype.itemsize > len(mapped):
            left = max(0, len(mapped) - position)
            given = f"announced are {numel} and {left} bytes follow"
            raise DSMoEError(f"storage {show(key)} must be {show(storage.numel)} x {dtype}; {given}")
        places[key] = (position, numel * dtype.itemsize)
        position += numel * dtype.itemsize
    if position != len(mapped):
        raise DSMoEError(f"has {len(mapped) - position} bytes after its last storage")
    return state, places
