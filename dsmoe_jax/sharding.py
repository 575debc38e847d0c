"""The mesh, and which of its axes each logical axis of the model is split over.

A layer names logical axes; this file alone knows the mesh. Read `_TABLE` to see the whole strategy.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from dsmoe_jax.axes import Array

DATA, FSDP, EXPERT, TENSOR = AXIS_NAMES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES: Final = (DATA, FSDP, EXPERT)  # tokens are split over all that does not split a layer's width

# fmt: off
_TABLE: Final[dict[str | None, str | tuple[str, ...] | None]] = {
    # logical      mesh
    "batch":      BATCH_AXES,
    "embed":      FSDP,
    "heads":      TENSOR,
    "kv_heads":   TENSOR,
    "ffn":        TENSOR,
    "experts":    EXPERT,
    "expert_ffn": TENSOR,
    "vocab":      TENSOR,
    "cache":      (*BATCH_AXES, TENSOR),  # rows of the batch times key-value heads
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


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array, from the logical name of each of its own."""
    return PartitionSpec(*(_TABLE[axis] for axis in axes))


def sharding(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | None) -> Sharding:
    """Where the array called `name` lies, from the logical name of each of its axes.

    Raises `ValueError` naming the array and the numbers where a size does not divide.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    check_divides(name, shape, axes, mesh)
    return NamedSharding(mesh, spec(axes))


def check_divides(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises `ValueError` naming the array and the numbers where one of its sizes does not divide over the mesh."""
    for size, logical in zip(shape, axes, strict=True):
        if ways := _ways(_TABLE[logical], mesh, size):
            raise ValueError(f"{name}: {logical} of size {size} does not divide over {ways}")


def _ways(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh, size: int) -> str:
    """The mesh axes, with their sizes, that `size` does not divide over; empty if it does."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    if not size % math.prod(mesh.shape[name] for name in names):
        return ""
    return " · ".join(f"{name}={mesh.shape[name]}" for name in names)


def place_batch(mesh: Mesh | None, *arrays: Any) -> tuple[Array, ...]:
    """Arrays [B, …] on the devices that take part in a training step: rows split over the data, fsdp and expert axes.

    Raises `ValueError` with the numbers where the batch does not divide.
    """
    return tuple(
        jax.device_put(array, sharding("batch", np.shape(array), ("batch", *(None,) * (np.ndim(array) - 1)), mesh))
        for array in arrays
    )


def current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` that the function being traced runs on, if it is one of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map every device is on its own.
    free = not mesh.empty and mesh.axis_names == AXIS_NAMES and not mesh.manual_axes
    return mesh if free else None


def constrain(x: Array, axes: tuple[str | None, ...], *, whole: bool = False) -> Array:
    """`x`, laid as its logical axes say under the current mesh.

    An axis that does not divide is placed by the compiler, or with `whole` not split.
    """
    if (mesh := current_mesh()) is None:
        return x
    otherwise = None if whole else PartitionSpec.UNCONSTRAINED
    placed = [
        otherwise if _ways(_TABLE[axis], mesh, size) else _TABLE[axis] for size, axis in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*placed))


def mesh_of(params: Mapping[str, Any]) -> contextlib.AbstractContextManager:
    """The context to call a model's function in: the mesh that its parameters lie on, if they lie on one.

    Not for traced parameters: see `traceable_mesh_of`.
    """
    mesh = _concrete_mesh(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def traceable_mesh_of(params: Mapping[str, Any]) -> contextlib.AbstractContextManager:
    """`mesh_of`, inside of JAX transformations too: of their types, parameters keep the mesh but not its devices."""
    mesh = jax.typeof(_first_leaf(params)).sharding.mesh
    return contextlib.nullcontext() if mesh.empty else jax.sharding.use_abstract_mesh(mesh)


def pin_to_mesh_of(params: Mapping[str, Any], x: Array) -> Array:
    """`x`, replicated over the devices of parameters that a traced function closes over; others are left as they are.

    A constant of a traced function loses its devices, and without any argument on them the function would be compiled
    for one device.
    """
    mesh = _concrete_mesh(params)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _concrete_mesh(params: Mapping[str, Any]) -> Mesh | None:
    leaf = _first_leaf(params)
    place = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None


def _first_leaf(params: Mapping[str, Any]) -> Any:
    return jax.tree.leaves(next(iter(params.values())))[0]  # one is enough: this stands in every step
