"""The mesh, and which of its axes each logical axis of the model is split over.

A layer names logical axes; this file alone knows the mesh. Read `_TABLE` to see the whole strategy.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

AXIS_NAMES: Final = ("data", "fsdp", "expert", "tensor")

# fmt: off
_TABLE: Final[dict[str | None, str | None]] = {
    # logical      mesh
    "embed":      "fsdp",
    "heads":      "tensor",
    "kv_heads":   "tensor",
    "ffn":        "tensor",
    "experts":    "expert",
    "expert_ffn": "tensor",
    "vocab":      "tensor",
    None:         None,
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of parallelism splits the work; at most one may be -1, "the rest of the devices"."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all).

    Raises `ValueError` for a size that is neither positive nor -1, for two -1, and for a mesh that needs more
    devices than there are or leaves some unused.
    """
    sizes = list(dataclasses.astuple(config or MeshConfig()))
    devices = list(jax.devices() if devices is None else devices)
    named = ", ".join(f"{name}={size}" for name, size in zip(AXIS_NAMES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh ({named}): every size must be positive, at most one -1")
    if -1 in sizes:
        rest, left_over = divmod(len(devices), math.prod(size for size in sizes if size != -1))
        if left_over or not rest:
            raise ValueError(f"mesh ({named}) does not divide {len(devices)} devices")
        sizes[sizes.index(-1)] = rest
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh ({named}) needs {math.prod(sizes)} devices, there are {len(devices)}")
    # Auto: the compiler propagates the shardings of the weights (make_mesh alone would ask for explicit ones).
    return Mesh(np.asarray(devices).reshape(sizes), AXIS_NAMES, axis_types=(AxisType.Auto,) * len(AXIS_NAMES))


def as_mesh(mesh: Mesh | MeshConfig | None) -> Mesh | None:
    """The mesh itself, whichever way it was described; None stands for the default device alone."""
    return make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh


def sharding(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | None) -> Sharding:
    """Where the array called `name` lies, from the logical name of each of its axes.

    Raises `ValueError` naming the array and the numbers where a size does not divide.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    placed = [_TABLE[axis] for axis in axes]
    for size, logical, axis in zip(shape, axes, placed, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f"{name}: {logical} of size {size} does not divide over {axis}={mesh.shape[axis]}")
    return NamedSharding(mesh, PartitionSpec(*placed))
