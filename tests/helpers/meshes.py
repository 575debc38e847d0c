"""Meshes of the 8 simulated devices, and the shard shapes of parameters on them."""

import contextlib

import jax

from dsmoe_jax.model import DeepSeekMoE, shardings, split
from dsmoe_jax.sharding import MeshConfig, make_mesh

MESHES = {
    "fsdp=8": MeshConfig(fsdp=8),
    "expert=8": MeshConfig(fsdp=1, expert=8),
    "expert=4,fsdp=2": MeshConfig(fsdp=2, expert=4),
    "expert=2,tensor=2,fsdp=2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data=2,expert=4": MeshConfig(data=2, fsdp=1, expert=4),
}


def on_mesh(mesh: str | None) -> contextlib.AbstractContextManager:
    """Return the context of jitted functions on this mesh; None: on one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(MESHES[mesh]))


# Shard shapes of the parameters of `hf_folder.tiny()`.
# fmt: off
PARTS = {
    #                           embed [64, 32]  attention.q [32, 32]  experts.gate [8, 16, 32]  router [8, 32]
    "fsdp=8":                   ((64, 4),       (32, 4),              (8, 16, 4),               (8, 4)),
    "expert=8":                 ((64, 32),      (32, 32),             (1, 16, 32),              (8, 32)),
    "expert=4,fsdp=2":          ((64, 16),      (32, 16),             (2, 16, 16),              (8, 16)),
    "expert=2,tensor=2,fsdp=2": ((32, 16),      (16, 16),             (4, 8, 16),               (8, 16)),
    "data=2,expert=4":          ((64, 32),      (32, 32),             (2, 16, 32),              (8, 32)),
}
# fmt: on
PARTS_OF = ("embed", "layers.0.attention.q.weight", "layers.1.moe.experts.gate", "layers.1.moe.router.weight")


def check_placement(model: DeepSeekMoE, mesh: str) -> None:
    """Check that every array has its sharding by `shardings`, and every device only its shard."""
    params = split(model)[1]
    for name, place in shardings(model.config, MESHES[mesh]).items():
        array = params[name]
        assert array.sharding == place, name
        assert len(array.addressable_shards) == 8, name
        assert {shard.data.shape for shard in array.addressable_shards} == {place.shard_shape(array.shape)}, name


def check_parts(model: DeepSeekMoE, mesh: str) -> None:
    """Also check the shard shapes for `hf_folder.tiny()`."""
    check_placement(model, mesh)
    params = split(model)[1]
    for name, part in zip(PARTS_OF, PARTS[mesh], strict=True):
        assert params[name].addressable_shards[0].data.shape == part, name
