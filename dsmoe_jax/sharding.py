"""The device mesh, and the mapping of logical axes to mesh axes. Start at `_TABLE`."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsmoe_jax.axes import Array
from dsmoe_jax.errors import DSMoEError

DATA, FSDP, EXPERT, TENSOR = AXIS_NAMES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES: Final = (DATA, FSDP, EXPERT)  # tokens are sharded over all axes but tensor

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
    "cache":      (*BATCH_AXES, TENSOR),  # sequences times key-value heads
    None:         None,
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The size of each mesh axis; at most one may be -1, for the remaining devices.

    Attributes:
        data: Devices of data parallelism: parameters are replicated.
        fsdp: Devices of fully sharded data parallelism: parameters and optimizer state are sharded; -1: all others.
        expert: Devices of expert parallelism: each has a part of the experts.
        tensor: Devices of tensor parallelism: heads and feed-forward widths are sharded.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Create a mesh.

    Args:
        config: The axis sizes; default `MeshConfig()`.
        devices: Default: all devices.

    Returns:
        The mesh, with automatic axes.

    Raises:
        DSMoEError: A size is neither positive nor -1, two are -1, or the sizes do not match the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config or MeshConfig(), len(devices))
    # Auto: the compiler propagates the shardings of weights (the default of jax.make_mesh is Explicit).
    return Mesh(np.asarray(devices).reshape(sizes), AXIS_NAMES, axis_types=(AxisType.Auto,) * len(AXIS_NAMES))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Return the size of each axis on this number of devices; raise `DSMoEError` as `make_mesh` does."""
    sizes = list(dataclasses.astuple(config))
    named = ", ".join(f"{name}={size}" for name, size in zip(AXIS_NAMES, sizes, strict=True))
    for name, size in zip(AXIS_NAMES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise DSMoEError(f"mesh axis {name} must be a positive int or -1, got {size!r:.80}")
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise DSMoEError(f"mesh ({named}): sizes must be positive, at most one -1")
    if -1 in sizes:
        rest, left_over = divmod(devices, math.prod(size for size in sizes if size != -1))
        if left_over or not rest:
            raise DSMoEError(f"mesh ({named}) does not divide {devices} devices")
        sizes[sizes.index(-1)] = rest
    if math.prod(sizes) != devices:
        rest, left_over = divmod(devices, math.prod(sizes) // sizes[AXIS_NAMES.index(FSDP)])
        way_out = "" if left_over else f"; set fsdp to -1 or {rest}"
        raise DSMoEError(f"mesh ({named}) needs {math.prod(sizes)} devices, there are {devices}{way_out}")
    return tuple(sizes)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """Create a mesh without devices, for shapes of shards."""
    return AbstractMesh(mesh_sizes(config, devices), AXIS_NAMES)


def as_mesh(mesh: Mesh | MeshConfig | None) -> Mesh | None:
    """Return the mesh of a config or mesh; None means the default device."""
    if not isinstance(mesh, Mesh | MeshConfig | None):
        raise DSMoEError(f"mesh must be a Mesh, a MeshConfig or None, got {mesh!r:.80}")
    if not isinstance(mesh, Mesh):
        return make_mesh(mesh) if mesh is not None else None
    if mesh.axis_names != AXIS_NAMES or any(kind != AxisType.Auto for kind in mesh.axis_types):
        axes = ", ".join(f"{name} ({kind.name})" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        wanted = f"the Auto axes {', '.join(AXIS_NAMES)}, as from `dsmoe_jax.make_mesh(MeshConfig(…))`"
        raise DSMoEError(f"mesh must have {wanted}; got {axes}")
    return mesh


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Map logical axes to a partition spec."""
    return PartitionSpec(*(_TABLE[axis] for axis in axes))


def sharding(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | None) -> Sharding:
    """Return the sharding of an array; `name` is for the error if a size does not divide."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    check_divides(name, shape, axes, mesh)
    return NamedSharding(mesh, spec(axes))


def shard_shape(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh, *, gather: str = ""
) -> tuple[int, ...]:
    """Return the shape of a device's shard, optionally with the mesh axis `gather` undone; raise if it is uneven."""
    check_divides(name, shape, axes, mesh)
    ways = [math.prod(mesh.shape[axis] for axis in mesh_axes(logical) if axis != gather) for logical in axes]
    return tuple(size // parts for size, parts in zip(shape, ways, strict=True))


def mesh_axes(logical: str | None) -> tuple[str, ...]:
    """Return the mesh axes of a logical axis."""
    axes = _TABLE[logical]
    return (axes,) if isinstance(axes, str) else axes or ()


def check_divides(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raise if a size does not divide over the mesh."""
    for size, logical in zip(shape, axes, strict=True):
        if ways := _ways(_TABLE[logical], mesh, size):
            raise DSMoEError(f"{name}: {logical} of size {size} does not divide over {ways}")


def check_count(count: int, noun: str, axis: str, mesh: Mesh | AbstractMesh) -> None:
    """Raise if a number of heads does not divide over the mesh; the size of a weight may."""
    if ways := _ways(_TABLE[axis], mesh, count):
        raise DSMoEError(f"{count} {noun} do not divide over {ways}")


def _ways(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh, size: int) -> str:
    """Format the mesh axes that `size` does not divide over; empty if it does."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    if not size % math.prod(mesh.shape[name] for name in names):
        return ""
    return " · ".join(f"{name}={mesh.shape[name]}" for name in names)


def place_batch(mesh: Mesh | None, *arrays: Any) -> tuple[Array, ...]:
    """Shard arrays [B, …] over the data, fsdp and expert axes; None: the default device."""
    axes = [("batch", *(None,) * (np.ndim(array) - 1)) for array in arrays]
    places = [sharding("batch", np.shape(array), names, mesh) for array, names in zip(arrays, axes, strict=True)]
    return tuple(map(jax.device_put, arrays, places))


def current_mesh() -> AbstractMesh | None:
    """Return the mesh set by `jax.set_mesh`; None without our axes, or in a `shard_map` (manual axes)."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and mesh.axis_names == AXIS_NAMES and not mesh.manual_axes else None


def constrain(x: Array, axes: tuple[str | None, ...], *, replicate: bool = False) -> Array:
    """Constrain `x` to its logical axes under the current mesh; uneven axes are unconstrained or replicated."""
    if (mesh := current_mesh()) is None:
        return x
    uneven = None if replicate else PartitionSpec.UNCONSTRAINED
    sizes = zip(x.shape, (_TABLE[axis] for axis in axes), strict=True)
    placed = [uneven if _ways(names, mesh, size) else names for size, names in sizes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*placed))


def divides(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> bool:
    """Whether an array with these logical axes divides over the current mesh, if any."""
    mesh = current_mesh()
    return mesh is None or not any(_ways(_TABLE[axis], mesh, size) for size, axis in zip(shape, axes, strict=True))


def on_each_device(
    run: Callable[..., Array], axes: Sequence[tuple[str | None, ...]], out: tuple[str | None, ...]
) -> Callable[..., Array]:
    """Apply a function to each device's shards, for kernels that XLA cannot partition.

    Args:
        run: The function of arrays. It must not communicate, and integer arrays alone may be replicated.
        axes: The logical axes of its arguments, which must divide over the mesh.
        out: Those of its result.

    Returns:
        The function of whole arrays; `run` itself without a mesh.
    """
    if current_mesh() is None:
        return run
    # The kernels, interpreted, do not pass JAX's check of varying axes.
    split = jax.shard_map(run, in_specs=tuple(map(spec, axes)), out_specs=spec(out), check_vma=False)
    return jax.jit(split)  # JAX has no eager shard_map of a `custom_vjp`


def mesh_of(params: Mapping[str, Any]) -> contextlib.AbstractContextManager:
    """Set the mesh of a model's parameters, if any, within the context; not for traced parameters."""
    mesh = concrete_mesh(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def traceable_mesh_of(params: Mapping[str, Any]) -> contextlib.AbstractContextManager:
    """Set the abstract mesh (without devices) of parameters, which may be traced, within the context."""
    mesh = jax.typeof(_first_leaf(params)).sharding.mesh
    return contextlib.nullcontext() if mesh.empty else jax.sharding.use_abstract_mesh(mesh)


def pin_to_mesh_of(params: Mapping[str, Any], x: Array) -> Array:
    """Replicate `x` over the mesh of closed-over parameters, whose devices a traced function would not see."""
    mesh = concrete_mesh(params)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def concrete_mesh(params: Mapping[str, Any]) -> Mesh | None:
    """Return the mesh of a model's parameters; None on a single device or under tracing."""
    leaf = _first_leaf(params)
    place = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None


def _first_leaf(params: Mapping[str, Any]) -> Any:
    return jax.tree.leaves(next(iter(params.values())))[0]  # not all leaves: this runs every step
