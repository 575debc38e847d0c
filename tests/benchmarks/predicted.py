"""Predicted time of a compiled GPU program, read from its HLO text: `predict`.

Each launched operation takes as long as its bytes at the card's bandwidth, or its matmuls at the card's FLOP/s if that
is longer, by the shares of `plan.roofline`. A prediction to compare designs, not a measurement: nothing here has been
compared with a run on a GPU, and matmuls are not autotuned.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.hlo import KINDS, Bodies, Instruction, array_bytes, collectives, parse
from dsmoe_jax.plan.roofline import CROSSINGS, RANGE, Efficiency

_CONTRACTED: Final = re.compile(r"lhs_contracting_dim(?:ension)?s\"?[=:][\{\[]([\d,\"]*)[\}\]]")
# Not launched: no work, or work of the computations that they call. Communication is counted apart.
_FREE: Final = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "partition-id"),
    *("while", "conditional", "call", "iota"),
}
# Matmuls per pair of query and key of our kernels, half of the pairs being masked.
_KERNELS: Final = {"flash_attention_forward": 2, "flash_attention_dq": 3, "flash_attention_dkv": 4}
_READS_A_PART: Final = ("dynamic-slice", "gather", "slice")
_CALLERS: Final = ("while", "conditional", "call")


class Prediction(NamedTuple):
    """The predicted time of a program on one device."""

    seconds: tuple[float, float]  # slow and fast, launches and communication one after the other
    communication: tuple[float, float]  # of these
    launches: int
    flops: float  # of matmuls
    bytes: float  # read and written by launches
    unknown_loops: int  # loops of unknown length, which count as not run: overflow passes of dispatch

    def row(self) -> dict[str, object]:
        """Return the figures, rounded, labeled as a prediction."""
        slow_and_fast = [round(one, 3) for one in self.seconds]
        communication = [round(one, 3) for one in self.communication]
        return {
            "predicted_seconds": slow_and_fast,
            "predicted_communication": communication,
            "launches": self.launches,
            "loops_not_counted": self.unknown_loops,
        }


def predict(text: str, card: Card, mesh: Mapping[str, int]) -> Prediction:
    """Predict the time of a program within one node.

    Args:
        text: `compiled.as_text()`.
        card: The card.
        mesh: The size of each mesh axis, in order.
    """
    bodies, entry = parse(text)
    work = list(_work(bodies, entry, 1))
    loops = sum(one.trips is None for body in bodies.values() for one in body)
    moved = sum(
        one.bytes * one.count * CROSSINGS.get(one.kind, 1) * (one.ways - 1) / one.ways
        for one in collectives(text, mesh)
    )
    slow, fast = (sum(n * _seconds(flops, size, card, share) for n, flops, size in work) for share in RANGE)
    links = [moved / (card.link * share.link) for share in RANGE]
    return Prediction(
        seconds=(slow + links[0], fast + links[1]),
        communication=(links[0], links[1]),
        launches=sum(times for times, *_ in work),
        flops=sum(times * flops for times, flops, _ in work),
        bytes=sum(times * size for times, _, size in work),
        unknown_loops=loops,
    )


def _seconds(flops: float, size: float, card: Card, share: Efficiency) -> float:
    return max(flops / (card.flops * share.matmul), size / (card.bandwidth * share.bandwidth))


def _work(bodies: Bodies, name: str, times: int) -> Iterator[tuple[int, float, float]]:
    """Yield how often each operation is launched, its FLOPs and its bytes."""
    shapes = {one.name: one.shape for one in bodies.get(name, ())}
    for one in bodies.get(name, ()):
        if one.opcode in _CALLERS:
            inner = times * (one.trips or 0)
            for called in one.called if inner else ():
                yield from _work(bodies, called, inner)
        elif one.opcode in _FREE or one.opcode.endswith("-done") or one.kind in KINDS:
            continue
        else:
            fused = [each for called in one.called for each in bodies.get(called, ())]
            flops = _flops([one, *fused], shapes) + _kernel_flops(one, shapes)
            yield times, flops, _bytes(one, fused, shapes)


def _flops(instructions: list[Instruction], shapes: Mapping[str, str]) -> float:
    """Return the FLOPs of matmuls, fused or by a library."""
    shapes = {**shapes, **{one.name: one.shape for one in instructions}}
    total = 0.0
    for one in instructions:
        contracted = _CONTRACTED.search(one.rest)
        if contracted and (one.opcode == "dot" or "gemm" in one.rest or "matmul" in one.rest) and one.operands:
            left, depth = _dims(shapes.get(one.operands[0], "")), contracted[1].replace('"', "")
            if one.opcode == "fusion" or not left:
                continue
            total += 2 * math.prod(_dims(one.shape)) * math.prod(left[int(d)] for d in depth.split(",") if d)
    return total


def _kernel_flops(one: Instruction, shapes: Mapping[str, str]) -> float:
    """Return the FLOPs of our attention kernels, whose fourth and fifth operands are the queries and keys."""
    name = next((name for name in _KERNELS if one.opcode == "custom-call" and f"/{name}/" in one.rest), None)
    if name is None:
        return 0.0
    (B, T, N, H), keys = (_dims(shapes[operand]) for operand in one.operands[3:5])
    return _KERNELS[name] * 2 * B * N * T * keys[2] / 2 * H


def _bytes(one: Instruction, fused: list[Instruction], shapes: Mapping[str, str]) -> float:
    """Return the bytes that an operation reads and writes; of an operand that is only sliced, those of the slices."""
    parameters = {each.rest.split(")")[0]: each for each in fused if each.opcode == "parameter"}
    total = 0.0
    for index, name in enumerate(one.operands):
        whole = array_bytes(shapes.get(name, ""))
        if (parameter := parameters.get(str(index))) is not None:
            uses = [each for each in fused if parameter.name in each.operands]
            if uses and all(each.opcode in _READS_A_PART and each.operands[0] == parameter.name for each in uses):
                whole = min(whole, sum(array_bytes(each.shape) for each in uses))
            elif uses and all(_updates(each, parameter.name) for each in uses):
                whole = 0  # written in place
        total += whole
    updates = [each for each in fused or [one] if each.opcode == "dynamic-update-slice"]
    if updates:
        inner = {each.name: each.shape for each in fused} or shapes
        return total + sum(array_bytes(inner.get(each.operands[1], "")) for each in updates)
    return total + array_bytes(one.shape)


def _updates(one: Instruction, name: str) -> bool:
    return one.opcode == "dynamic-update-slice" and one.operands[0] == name


def _dims(shape: str) -> list[int]:
    """Return the dimensions of the first array of a shape."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []
