"""Accelerators: memory, compute and bandwidths, `CARDS`."""

import dataclasses
import math
from typing import Final

from dsmoe_jax.errors import DSMoEError, closest
from dsmoe_jax.xla_options import MEMORY_FRACTION


@dataclasses.dataclass(frozen=True)
class Card:
    """An accelerator; bandwidths are in bytes per second and direction.

    Attributes:
        memory: Bytes.
        flops: Dense bf16 FLOP/s, without sparsity.
        bandwidth: Of the device memory.
        link: To the other devices of a node, by NVLink or PCIe.
        network: To other nodes, per device.
        per_node: Devices of a node.
        platform: Whose compiler makes the programs, "gpu" or "cpu".
    """

    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    platform: str = "gpu"

    @property
    def usable(self) -> float:
        """The bytes that JAX may allocate (`XLA_PYTHON_CLIENT_MEM_FRACTION`, set by `set_environment`)."""
        return self.memory * (MEMORY_FRACTION if self.platform == "gpu" else 1)


# Memory and bandwidth: OpenXLA's specs (xla/backends/gpu/target_config/specs). FLOP/s, NVLink and PCIe: NVIDIA's data
# sheets, half of the figures "with sparsity" and of bidirectional ones. Network: one adapter per GPU, of 200 Gb/s in a
# DGX A100, 400 Gb/s in a DGX H100, H200 or B200; 100 Gb/s in servers of L40S. The CPU is the machine of the reports in
# tests/benchmarks (2 cores, fp32); its simulated devices share their memory.
# fmt: off
CARDS: Final[dict[str, Card]] = {
    #                 memory           FLOP/s   memory B/s  link B/s  network B/s
    "h100":      Card( 84_942_979_072, 989e12,  3.352e12,   450e9,    50e9),
    "h200":      Card(151_397_597_184, 989e12,  4.80e12,    450e9,    50e9),
    "a100_80gb": Card( 85_097_971_712, 312e12,  2.039e12,   300e9,    25e9),
    "a100_40gb": Card( 42_331_013_120, 312e12,  1.555e12,   300e9,    25e9),
    "l40s":      Card( 47_608_692_736, 362e12,  0.864e12,    32e9,    12.5e9),
    "b200":      Card(191_501_107_200, 2250e12, 8.00e12,    900e9,    50e9),
    "cpu":       Card( 25_000_000_000, 0.42e12, 0.04e12,     10e9,    1.25e9, 1, "cpu"),
}
# fmt: on


def card_name(name: str) -> str:
    """Return the key of a card, whose name may be in any case; raise `DSMoEError` if it is unknown."""
    key = name.lower().replace("-", "_")
    if key not in CARDS:
        own = "with --device-memory, --device-tflops, --device-bandwidth, --link-bandwidth and --network-bandwidth"
        close = next((card for card in CARDS if key and card.startswith(key)), None) or closest(key, CARDS)
        near = f": did you mean {close}?" if close else ""
        raise DSMoEError(f"device must be one of {', '.join(CARDS)}, got {name!r}{near}; set other figures {own}")
    return key


def card_of(
    name: str, *, memory: float | None = None, tflops: float | None = None, **gb_per_second: float | None
) -> Card:
    """Return a card, with the caller's own figures where they are given.

    Args:
        name: A key of `CARDS`, in any case.
        memory: GB.
        tflops: Dense bf16 TFLOP/s.
        gb_per_second: GB/s by field: `bandwidth`, `link`, `network`.

    Returns:
        The card.

    Raises:
        DSMoEError: The card is unknown, or a figure is not positive and finite.
    """
    key = card_name(name)
    figures = {"memory": (memory, 1e9), "flops": (tflops, 1e12)}
    figures |= {field: (value, 1e9) for field, value in gb_per_second.items()}
    given = {field: (value, unit) for field, (value, unit) in figures.items() if value is not None}
    for field, (value, unit) in given.items():
        if not 0 < value * unit < math.inf:
            raise DSMoEError(f"device figures must be positive and finite, got {value:g} for {field}")
    return dataclasses.replace(CARDS[key], **{field: value * unit for field, (value, unit) in given.items()})
