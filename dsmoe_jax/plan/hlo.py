"""Collectives of a compiled program, read from its HLO text. Start at `collectives`."""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

_BITS: Final = {"pred": 8, "bf16": 16, "f16": 16} | {f"{k}{n}": n for k in "suf" for n in (2, 4, 8, 16, 32, 64)}
KINDS: Final = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COMPUTATION: Final = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION: Final = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY: Final = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED: Final = re.compile(
    r"\b(?:calls|to_apply|body|called_computations|branch_computations)=(?:\{(.*?)\}|%?([\w.\-]+))"
)
_OPERANDS: Final = re.compile(r"\(\(.*?\), ")
_TRIPS: Final = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Three notations: lists of devices, an iota of a shape, and axes of a mesh, whose devices may be permuted.
_LISTED: Final = re.compile(r"replica_groups=\{(\{.*?\})\}")
_IOTA: Final = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BY_AXES: Final = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\(\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))? "
    r"\{(?P<used>[^}]*)\}"
)


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    ways: int  # devices per group
    bytes: int  # per device: the gathered result, or the operand that is reduced or exchanged
    count: int  # executions per call of the program


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a program.

    Args:
        text: `compiled.as_text()`.
        mesh: The size of each mesh axis, in order.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, entry = header[2], header[2] if header[1] else entry
            bodies[name] = []
        elif name and (found := _INSTRUCTION.match(line)):
            bodies[name].append((found[1], found[2], found[3]))
    counts = _executions(bodies, entry)
    result = []
    for name, instructions in bodies.items():
        for shape, opcode, rest in instructions:
            kind = opcode.removesuffix("-start")
            if kind not in KINDS or not counts[name]:
                continue
            axes, ways = _axes(rest, mesh)
            if ways > 1:
                operands = _OPERANDS.match(shape)  # an asynchronous start returns (operands, results)
                results = shape[operands.end() :] if operands else shape
                size = array_bytes(results) * (ways if kind == "reduce-scatter" else 1)
                result.append(Collective(kind, axes, ways, size, counts[name]))
    return result


def _executions(bodies: Mapping[str, list[tuple[str, str, str]]], entry: str) -> collections.Counter[str]:
    """Return how often each computation runs."""
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for _, opcode, rest in bodies.get(name, ()):
            trips = _TRIPS.search(rest)
            # Loops of unknown length are the overflow passes of dispatch: none if routing is balanced.
            inner = times * (1 if opcode != "while" else int(trips[1]) if trips else 0)
            for several, one in _CALLED.findall(rest):
                for called in (several or one).split(","):
                    visit(called.strip().lstrip("%"), inner)

    visit(entry, 1)
    return counts


def array_bytes(shape: str) -> int:
    """Return the bytes of an array or a tuple."""
    arrays = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return sum(
        _BITS.get(dtype, 32) * math.prod(map(int, dims.split(",") if dims else ())) // 8 for dtype, dims in arrays
    )


def _axes(rest: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes along which the devices of a group differ, and the devices per group."""
    group = _first_group(rest, math.prod(mesh.values()))
    places = np.unravel_index(group, tuple(mesh.values()))
    return tuple(axis for axis, at in zip(mesh, places, strict=True) if len(set(at.tolist())) > 1), len(group)


def _first_group(rest: str, devices: int) -> np.ndarray:
    """Return the devices of the first group of a collective."""
    if listed := _LISTED.search(rest):
        return np.array(_ints(re.findall(r"\{([\d,]+)\}", listed[1])[0]))
    if iota := _IOTA.search(rest):
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))[0]
    if not (found := _BY_AXES.search(rest)):
        return np.arange(devices)
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found["axes"])}
    ids = _iota(found["shape"], found["order"]) if found["shape"] else np.arange(devices)
    index: list[Any] = []
    ids, keep = ids.reshape(tuple(sizes.values())), {}
    for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found["used"]):
        keep[name] = (int(before or 1), int(part or sizes[name]))
    for name, size in sizes.items():
        before, part = keep.get(name, (1, 1))
        stride = size // (before * part)  # a part of an axis: `before` × part × stride
        index.append(slice(0, part * stride, stride) if name in keep else slice(0, 1))
    return ids[tuple(index)].reshape(-1)


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _ints(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids if order is None else ids.transpose(_ints(order))).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
