"""A compiled program, read from its HLO text: `parse`, and its communication: `collectives`."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

_BITS: Final = {"pred": 8, "bf16": 16, "f16": 16} | {f"{k}{n}": n for k in "suf" for n in (2, 4, 8, 16, 32, 64)}
KINDS: Final = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COMPUTATION: Final = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION: Final = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
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


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def kind(self) -> str:
        """The opcode; that of a collective also if it only starts one."""
        return self.opcode.removesuffix("-start")

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """The names of the computations that this one calls."""
        found = (several or one for several, one in _CALLED.findall(self.rest))
        return [name.strip().lstrip("%") for names in found for name in names.split(",")]

    @property
    def trips(self) -> int | None:
        """How often it runs what it calls; None for a loop of unknown length."""
        if self.opcode != "while":
            return 1
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else None


Bodies: TypeAlias = Mapping[str, Sequence[Instruction]]  # by name of the computation


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    ways: int  # devices per group
    bytes: int  # per device: the gathered result, or the operand that is reduced or exchanged
    count: int  # executions per call of the program


def parse(text: str) -> tuple[Bodies, str]:
    """Return the instructions of each computation of a program, and the name of the entry.

    Args:
        text: `compiled.as_text()`.
    """
    bodies: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, entry = header[2], header[2] if header[1] else entry
            bodies[name] = []
        elif name and (found := _INSTRUCTION.match(line)):
            bodies[name].append(Instruction(*found.groups()))
    return bodies, entry


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a program.

    Args:
        text: `compiled.as_text()`.
        mesh: The size of each mesh axis, in order.
    """
    bodies, entry = parse(text)
    counts = _executions(bodies, entry)
    result = []
    for name, instructions in bodies.items():
        for one in instructions:
            if one.kind not in KINDS or not counts[name]:
                continue
            axes, ways = _axes(one.rest, mesh)
            if ways > 1:
                operands = _OPERANDS.match(one.shape)  # an asynchronous start returns (operands, results)
                results = one.shape[operands.end() :] if operands else one.shape
                size = array_bytes(results) * (ways if one.kind == "reduce-scatter" else 1)
                result.append(Collective(one.kind, axes, ways, size, counts[name]))
    return result


def _executions(bodies: Bodies, entry: str) -> collections.Counter[str]:
    """Return how often each computation runs."""
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for one in bodies.get(name, ()):
            for called in one.called:
                # Loops of unknown length are the overflow passes of dispatch: none if routing is balanced.
                visit(called, times * (one.trips or 0))

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
