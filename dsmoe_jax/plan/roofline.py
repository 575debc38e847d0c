"""Estimated time of a step: matmuls, memory and communication over what the card can do. Start at `estimate`.

A range, not a measurement: nothing here has been compared with a run on a GPU.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from jax.sharding import AbstractMesh

from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.collectives import Traffic
from dsmoe_jax.plan.workload import Workload
from dsmoe_jax.sharding import AXIS_NAMES
from dsmoe_jax.train.metrics import flops_per_token


class Efficiency(NamedTuple):
    """The shares of the card's figures that a program reaches."""

    matmul: float  # of the FLOP/s, in dense matmuls
    experts: float  # of the FLOP/s, in the routed experts
    bandwidth: float
    link: float
    overlap: float  # share of the communication that is hidden behind computation


# Slow and fast end. Experts: marin's Grug MoE in JAX reached 24 to 28 % MFU on 8 H100 with Triton kernels; batched
# matmuls compute 1.25 times the rows.
RANGE: Final = (Efficiency(0.45, 0.25, 0.6, 0.6, 0.0), Efficiency(0.70, 0.50, 0.85, 0.85, 0.8))
# Bytes that cross a device's links, as a multiple of the bytes of `Traffic` times (ways - 1) / ways: rings.
CROSSINGS: Final[Mapping[str, float]] = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}
_ACTIVE_STATE: Final = 7  # fp32 values read or written per parameter by AdamW: weight, gradient, two moments


class Estimate(NamedTuple):
    """Seconds of a step for one `Efficiency`."""

    matmul: float
    memory: float  # of the optimizer, which is bound by bandwidth
    node: float  # communication within nodes
    network: float  # between nodes
    overlap: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        communication, hidden = self.node + self.network, self.overlap * min(self.matmul, self.node + self.network)
        return self.matmul + self.memory + communication - hidden

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory, NVLink or network."""
        times = {"compute": self.matmul, "memory": self.memory, "links": self.node, "network": self.network}
        return max(times, key=lambda name: times[name])


def estimate(work: Workload, card: Card, traffic: Sequence[Traffic]) -> tuple[Estimate, Estimate]:
    """Return the slow and the fast estimate of a training step."""
    dense, experts = flops(work)
    node, network = split_by_network(work.mesh, card, traffic)
    touched = _ACTIVE_STATE * 4 * sum(work.elements_of(weight) for weight in work.parameters.trained)
    slow, fast = (
        Estimate(
            matmul=dense / (card.flops * one.matmul) + experts / (card.flops * one.experts),
            memory=touched / (card.bandwidth * one.bandwidth),
            node=node / (card.link * one.link),
            network=network / (card.network * one.link),
            overlap=one.overlap,
        )
        for one in RANGE
    )
    return slow, fast


def flops(work: Workload) -> tuple[float, float]:
    """Return the FLOPs of a step on a device, recomputation included: of dense matmuls and of the routed experts."""
    model, tokens = work.model, work.parts * work.tokens / work.ways("tensor")
    # Forward 1, gradients of activations 1 and of weights 1, recomputation 1; LoRA has no gradients of base weights.
    passes = 2 + (not work.adapts) + (work.config.step.remat == "full")
    per_token = flops_per_token(model, work.length) / 3
    D, F, K = model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok or 0
    experts = work.moe_layers * K * 6 * D * F
    # The expert FFN saves no hidden rows: its backward pass recomputes them even without remat.
    expert_passes = 3 + (not work.adapts)
    return tokens * passes * (per_token - experts), tokens * expert_passes * experts


def split_by_network(mesh: AbstractMesh, card: Card, traffic: Sequence[Traffic]) -> tuple[float, float]:
    """Return the bytes per step that cross a device's links within its node, and its network adapter.

    Devices are in mesh order, the last axis fastest, and nodes hold consecutive ones.
    """
    node = network = 0.0
    for one in traffic:
        ways = math.prod(mesh.shape[axis] for axis in one.axes)
        local = _local_ways(mesh, card, one.axes)
        moved = one.bytes * CROSSINGS.get(one.kind, 1)
        node += moved * (local - 1) / local
        # Rings pass through each node once, all adapters of the node in parallel; an all-to-all goes to all others.
        share = 1 if one.kind == "all-to-all" else 1 / local
        network += moved * share * (ways - local) / ways
    return node, network


def _local_ways(mesh: AbstractMesh, card: Card, axes: tuple[str, ...]) -> int:
    """Return the devices of a group that are in one node."""
    stride, local = 1, 1
    for axis in reversed(AXIS_NAMES):
        size = mesh.shape[axis]
        if axis in axes:
            local *= max(1, math.gcd(size, max(1, card.per_node // stride)))
        stride *= size
    return local


def model_flops(work: Workload) -> float:
    """Return the model FLOPs of a step on all devices, by which MFU is defined."""
    return work.sequences * work.length * flops_per_token(work.model, work.length)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens per second of all devices and model FLOPs utilization, slow and fast."""

    step: tuple[float, float]  # seconds, slow then fast
    tokens: tuple[float, float]
    mfu: tuple[float, float]

    @classmethod
    def of(cls, work: Workload, card: Card, estimates: Sequence[Estimate]) -> "Speed":
        """Return the speed by two estimates."""
        slow, fast = (one.seconds for one in estimates)
        tokens, peak = work.sequences * work.length, card.flops * work.mesh.size
        full = model_flops(work)
        return cls((slow, fast), (tokens / slow, tokens / fast), (full / slow / peak, full / fast / peak))
