"""Malformed and hostile files.

The first half assembles safetensors headers, pickles, zips and legacy files byte by byte; the second, from `good`
on, mutates a valid checkpoint at random.
"""

import functools
import io
import json
import math
import pickle
import pickletools
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import _FOREIGN, _LIMITS
from dsmoe_jax.convert.reader import CheckpointReader
from tests.helpers.hf_folder import INDEX, hf_tensors, random_params, tiny, write_hf


def assert_rejected(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        CheckpointReader(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# safetensors


def entry(begin: int, end: int, shape: list, dtype: object = "F32", **rest: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **rest}


def built(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# .bin files: an assembler of pickles


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return group(*map(number, values))


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


REBUILD = named("torch._utils", "_rebuild_tensor_v2")
HOOKS = named("collections", "OrderedDict") + b")R"
ROW = {"kind": "Float", "key": "0", "numel": 4, "offset": 0, "shape": (4,), "stride": (1,)}


def storage(kind: str, key: str, numel: int, *more: bytes) -> bytes:
    return group(text("storage"), named("torch", f"{kind}Storage"), text(key), text("cpu"), number(numel), *more) + b"Q"


def tensor(**changes) -> bytes:
    row = {**ROW, **changes}
    place = storage(row["kind"], row["key"], row["numel"])
    view = number(row["offset"]) + numbers(*row["shape"]) + numbers(*row["stride"])
    return REBUILD + group(place, view, b"\x89", HOOKS) + b"R"


def state(*items: tuple[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in items) + b"u."


FOUR = np.arange(4, dtype=np.float32).tobytes()
GOOD = state(("w", tensor()))


def zip_file(content: bytes = GOOD, storages: dict[str, bytes] | None = None, **kwargs) -> bytes:
    extra: dict[str, bytes] = kwargs.pop("extra", {"r/byteorder": b"little", "r/version": b"3\n"})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **kwargs) as archive:
        archive.writestr("r/data.pkl", content)
        for key, data in ({"0": FOUR} if storages is None else storages).items():
            archive.writestr(f"r/data/{key}", data)
        for name, data in extra.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def legacy_file(
    content: bytes = GOOD, keys: object = ("0",), data: bytes = struct.pack("<q", 4) + FOUR, **head
) -> bytes:
    head = {"magic": 0x1950A86A20F9469CFC6C, "protocol": 1001, "system": {"little_endian": True}, **head}
    first = b"".join(pickle.dumps(value, 2) for value in head.values())
    return first + content + pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + data


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def called(module: str, name: str, argument: str = "touch ran") -> bytes:
    return opcodes(named(module, name), group(text(argument)), b"R")


# Valid checkpoints and mutations of their files


@functools.cache
def good(form: str) -> dict[str, bytes]:
    """Return the files of a small valid checkpoint: `single` or `shards` (safetensors), `zip` or `legacy` (.bin)."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_hf(Path(name), SMALL, random_params(SMALL), shards=2 if form == "shards" else 1)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if form in ("single", "shards"):
        return files
    tensors = hf_tensors(SMALL, random_params(SMALL))
    names = {name: f"{key}" for key, name in enumerate(tensors)}
    content = state(
        *((name, tensor(**row_by_row(names[name], array.shape, array.size))) for name, array in tensors.items())
    )
    storages = {names[name]: array.tobytes() for name, array in tensors.items()}
    if form == "zip":
        weights = zip_file(content, storages)
    else:
        data = b"".join(struct.pack("<q", len(raw) // 4) + raw for raw in storages.values())
        weights = legacy_file(content, tuple(storages), data)
    return {"config.json": files["config.json"], "pytorch_model.bin": weights}


def row_by_row(key: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return {"key": key, "numel": size, "shape": shape, "stride": strides}


SMALL = tiny(
    vocab_size=8, hidden_size=8, intermediate_size=4, moe_intermediate_size=2, num_attention_heads=2,
    num_key_value_heads=1, n_routed_experts=2, n_shared_experts=1,
)  # fmt: skip

# fmt: off
NUMBERS = (0, 1, 2, 3, 7, 8, 16, -1, -8, 255, 65535, 2**31 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64,
           10**30, 10**400, 0.0, -0.0, 0.5, 8.0, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "F16", "F32", "BF16", "F64", "I8", "F8_E4M3", "silu", "gelu", "softmax", "sigmoid", "deepseek",
         "yarn", "linear", "dynamic", "..", ".", "../model.safetensors", "/etc/passwd", "/dev/zero", "a\0b", "a\nb",
         "\ud800", "😀", "\x1b[2J", "config.json", "model.safetensors", "format", "pt", "x" * 300, "x" * 3000)
# fmt: on


def any_value(r: Random) -> Any:
    kind = r.randrange(8)
    if kind < 3:
        return r.choice(NUMBERS)
    if kind < 5:
        return r.choice(TEXTS)
    return r.choice(
        (None, True, False, [], {}, [[]], {"": {}}, [1, 2], ["a"], {"type": "linear", "factor": 2.0}, deep(r))
    )


def deep(r: Random) -> list:
    value: list = []
    for _ in range(r.choice((5, 70, 400))):
        value = [value]
    return value


def spoil_node(r: Random, parent: dict | list, key: Any) -> None:
    """Change the child `key` of a parsed JSON document."""
    value = parent[key]
    match r.randrange(7):
        case 0:
            parent[key] = any_value(r)
        case 1 if type(value) is int:
            parent[key] = value + r.choice((-8, -4, -1, 1, 4, 8, value, -2 * value))
        case 2:
            del parent[key]
        case 3 if isinstance(parent, dict):
            parent[r.choice((f"{key}x", *TEXTS))] = parent.pop(key)
        case 4 if isinstance(parent, dict):
            parent[r.choice((f"{key}x", *TEXTS))] = value
        case 4 if isinstance(parent, list):
            parent.insert(key, value)
        case 5:
            other = r.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], value
        case 6:
            parent[key] = r.choice(([value], {"a": value}, str(value)))
        case _:
            parent[key] = list(reversed(value)) if isinstance(value, list) else any_value(r)


def spoil_tree(r: Random, document: Any) -> None:
    """Make one to three changes anywhere in a parsed JSON document."""
    for _ in range(r.choice((1, 1, 2, 3))):
        node = document
        while node:
            key = r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node))
            child = node[key]
            if isinstance(child, dict | list) and child and r.random() < 0.8:
                node = child
                continue
            spoil_node(r, node, key)
            break


def spoil_json(r: Random, data: bytes) -> bytes:
    document = json.loads(data)
    spoil_tree(r, document)
    return spoil_spelling(r, written(document))


def written(document: Any) -> bytes:
    """Return JSON with everything Python can write: NaN, lone surrogates, integers of any length."""
    return json.dumps(document).encode()


def spoil_spelling(r: Random, text: bytes) -> bytes:
    """Sometimes add text that `json.dumps` never writes: duplicate keys, spaces, leading zeros, a second document."""
    if r.random() < 0.8:
        return text
    old, new = r.choice(
        ((b'": ', b'": 0, "a": '), (b"{", b' {"a": 1, "a": 2, '), (b" 0", b" -0"), (b" 0", b" 00"), (b" 8", b" 8e0"),
         (b" 8", b" 8.0"), (b", ", b",, "), (b"}", b"}}"), (b"{", b"\n{"), (b"}", b"} "), (b'"', b'"\xff'),
         (b'"', b"'"), (b" 1", b" " + b"1" * 5000))
    )  # fmt: skip
    return text.replace(old, new, r.choice((1, 1, -1)))


def spoil_bytes(r: Random, data: bytes) -> bytes:
    """Make one to three flips, insertions, deletions or cuts, half of them near the start or the end."""
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 3))):
        span = len(changed) or 1
        at = r.choice((r.randrange(span), r.randrange(min(span, 600)), span - 1 - r.randrange(min(span, 200))))
        match r.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([r.randrange(256)])
            case 1:
                changed[at:at] = bytes([r.randrange(256)]) * r.choice((1, 8, 1000))
            case 2:
                del changed[at : at + r.choice((1, 4, 100))]
            case 3:
                del changed[at:]
            case 4:
                changed[at : at + 8] = r.choice((bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7))
            case 5:
                changed[at:at] = changed[at : at + r.choice((1, 16, 500))]
    return bytes(changed)


def spoil_safetensors(r: Random, data: bytes) -> bytes:
    """Mutate the header as JSON, its length, or the data after it."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    text, length = data[8 : 8 + size], None
    match r.randrange(6):
        case 0 | 1 | 2:
            spoil_tree(r, header)
            text = spoil_spelling(r, written(header))
        case 3:  # usually still valid
            names = [name for name in header if name != "__metadata__"]
            one, other = r.choice(names), r.choice(names)
            header[one], header[other] = header[other], header[one]
            header[one]["shape"] = r.choice((header[one]["shape"][::-1], [1, *header[one]["shape"]]))
            header["__metadata__"] = r.choice(({}, {"a": "b\n"}, {"format": "😀"}, {"format": 1}, None))
            text = written(header) + b" " * r.randrange(9)
        case 4:
            length = r.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**62, 2**63, 2**64 - 1, 8_000_001))
        case 5:
            rest = spoil_bytes(r, rest)
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def spoil_zip(r: Random, data: bytes) -> bytes:
    """Mutate fields of headers and directory; compress, duplicate or rename members."""
    changed = bytearray(data)
    if r.randrange(8) == 0:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        damaged = r.randrange(len(members))
        name, content = members[damaged]
        members[damaged] = (r.choice((name, "x", "/", "../x", "r/x", f"{name}\0x", "q/data.pkl", "x" * 3000)), content)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for i, (name, content) in enumerate(members):
                deflated = i == damaged and r.random() < 0.5
                archive.writestr(name, content, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED)
        return buffer.getvalue()
    for _ in range(r.choice((1, 1, 2))):
        magic, fields = r.choice((
            (b"PK\x01\x02", ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4), (46, 2))),
            (b"PK\x03\x04", ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 2))),
            (b"PK\x05\x06", ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
        ))  # fmt: skip
        places = [found.start() for found in re.finditer(re.escape(magic), bytes(changed))]
        if not places:
            break
        start, other, (offset, width) = r.choice(places), r.choice(places), r.choice(fields)
        old = int.from_bytes(changed[start + offset : start + offset + width], "little")
        new = r.choice((0, 1, 8, old + 1, old - 1, 2 * old, r.randrange(1 << 8 * width), (1 << 8 * width) - 1))
        value = r.choice((new.to_bytes(8, "little", signed=new < 0), changed[other + offset : other + offset + width]))
        changed[start + offset : start + offset + width] = value[:width]
    return bytes(changed)


def spoil_pickle(r: Random, content: bytes) -> bytes:
    """Delete, duplicate, swap, change or insert one to three opcodes and their arguments."""
    starts = [position for _, _, position in pickletools.genops(content)]
    parts = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(r.choice((1, 1, 2, 3))):
        at, other = r.randrange(len(parts)), r.randrange(len(parts))
        match r.randrange(7):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, parts[at])
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts.insert(at, r.choice(OPCODES))
            case 4:
                parts[at] = r.choice(OPCODES)
            case 5:
                parts[at] = spoil_bytes(r, parts[at])
            case 6:
                numbers = [i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J")]
                if numbers:
                    parts[r.choice(numbers)] = number(r.choice([n for n in NUMBERS[:19] if isinstance(n, int)]))
        if not parts:
            break
    return b"".join(parts)


# fmt: off
OPCODES = (
    *(named(*name) for name in (("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"),
      ("subprocess", "Popen"), ("collections", "OrderedDict"), ("torch", "FloatStorage"), ("torch", "LongStorage"),
      ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("x" * 5000, "y"), ("é", ""))),
    text("touch ran"), text("_metadata"), text("x" * 3000), b"X\xff\xff\xff\xff", b"X\0\0\0\x40",
    b"X\2\0\0\0\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8c\xffa", b"\x8a\xff", b"\x8a\x08" + b"\x7f" * 8, b"\x8a\x00",
    b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8,
    b"\x96" + b"\xff" * 8, b"L" + b"1" * 5000 + b"L\n", b"I" + b"9" * 5000 + b"\n", b"Fjunk\n", b"S'touch ran'\n",
    b"Vx\n", b"(", b")", b"]", b"}", b"0", b"1", b"2", b".", b"a", b"b", b"d", b"e", b"l", b"o", b"s", b"t", b"u",
    b"N", b"R", b"Q", b"P0\n", b"\x81", b"\x82\x01", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x91", b"\x92",
    b"\x93", b"\x94", b"\x80\x02", b"\x80\x04", b"\x95" + b"\xff" * 8, b"q\x00", b"q\x07", b"h\x00", b"h\x07",
    b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"K\x00", b"K\xff",
    b"M\xff\xff", b"G" + b"\x7f" * 8, b"\x97", b"\x98", b"\xff", b"ios\nsystem\n", b"g0\n", b"p0\n",
)
# fmt: on


def spoil_bin(r: Random, data: bytes) -> bytes:
    """Mutate only the pickle of the tensors in a zip or legacy file."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        content = spoil_pickle(r, members.pop("r/data.pkl"))
        storages = {name[7:]: raw for name, raw in members.items() if name.startswith("r/data/")}
        return zip_file(content, storages)
    stream = io.BytesIO(data)
    bounds = [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        bounds.append(stream.tell())
    damaged = r.choice((0, 1, 2, 3, 3, 3, 3, 4))
    start, end = bounds[damaged : damaged + 2]
    return data[:start] + spoil_pickle(r, data[start:end]) + data[end:]


def spoil_storage(r: Random, data: bytes) -> bytes:
    """Change bytes of one tensor only."""
    raw = r.choice([array.tobytes() for array in hf_tensors(SMALL, random_params(SMALL)).values()])
    start = data.index(raw)
    changed = bytearray(data)
    for _ in range(r.randrange(1, 4)):
        changed[start + r.randrange(len(raw))] = r.randrange(256)
    return bytes(changed)


def spoil_config(r: Random, data: bytes) -> bytes:
    """Set one to three fields of this or related models to extreme values or other types."""
    fields = json.loads(data)
    known = [*_LIMITS, *_FOREIGN, "rope_scaling", "architectures", "model_type", "auto_map", "extra"]
    for _ in range(r.choice((1, 1, 2, 3))):
        field = r.choice(known)
        bounds = _LIMITS[field][1:] if field in _LIMITS else (0, 1)
        fields[field] = r.choice((*bounds, bounds[1] + 1, bounds[0] - 1, any_value(r)))
    return spoil_spelling(r, written(fields))


# Checkpoint, file and mutation; all are equally frequent.
MUTATIONS: dict[str, tuple[str, str, Callable[[Random, bytes], bytes]]] = {
    "safetensors, header":   ("single", "model.safetensors", spoil_safetensors),
    "safetensors, bytes":    ("single", "model.safetensors", spoil_bytes),
    "safetensors, tensor":   ("single", "model.safetensors", spoil_storage),
    "shard, header":         ("shards", "model-00001-of-00002.safetensors", spoil_safetensors),
    "index":                 ("shards", INDEX, spoil_json),
    "index, bytes":          ("shards", INDEX, spoil_bytes),
    "config":                ("single", "config.json", spoil_config),
    "config, JSON":          ("single", "config.json", spoil_json),
    "config, bytes":         ("single", "config.json", spoil_bytes),
    "zip, headers":          ("zip", "pytorch_model.bin", spoil_zip),
    "zip, bytes":            ("zip", "pytorch_model.bin", spoil_bytes),
    "zip, pickle":           ("zip", "pytorch_model.bin", spoil_bin),
    "zip, tensor":           ("zip", "pytorch_model.bin", spoil_storage),
    "legacy, pickle":        ("legacy", "pytorch_model.bin", spoil_bin),
    "legacy, bytes":         ("legacy", "pytorch_model.bin", spoil_bytes),
    "legacy, tensor":        ("legacy", "pytorch_model.bin", spoil_storage),
}  # fmt: skip
