"""Prefill and decode compiled ahead of time, for devices that are simulated or absent: `compile_generation`."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.generate.memory_plan import stored_as
from dsmoe_jax.generate.programs import Batch, extend, step
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import abstract
from dsmoe_jax.plan.compiled import Compiled, abstract_params, compile_for
from dsmoe_jax.plan.generation import GenerationPlan
from dsmoe_jax.sharding import sharding


def compile_generation(plan: GenerationPlan, card: str) -> dict[str, Compiled]:
    """Compile a prefill call, which reads a chunk of a prompt of the longest context, and a decode step of the batch.

    Args:
        plan: The plan.
        card: A key of `cards.CARDS`; `cpu`: simulated devices.

    Returns:
        The programs by name.

    Raises:
        DSMoEError: There are fewer simulated devices, or jax cannot compile for the card.
    """
    programs = {"prefill": _lower_prefill, "decode": _lower_decode}
    return {name: compile_for(card, plan.mesh, functools.partial(lower, plan)) for name, lower in programs.items()}


def _lower_prefill(plan: GenerationPlan, mesh: Mesh | None) -> Any:
    ids, counts = (_replicated(shape, jnp.int32, mesh) for shape in ((1, plan.prefill_chunk), (1,)))
    with _within(mesh):
        return extend.lower(abstract(plan.model)[0], _params(plan, mesh), _cache(plan, 1, mesh), ids, counts)


def _lower_decode(plan: GenerationPlan, mesh: Mesh | None) -> Any:
    rows = (plan.batch_size,)
    token, active, sampled = (_replicated(rows, dtype, mesh) for dtype in (jnp.int32, jnp.bool_, jnp.int32))
    batch = Batch(_cache(plan, plan.batch_size, mesh), None)
    with _within(mesh):
        return step.lower(abstract(plan.model)[0], None, _params(plan, mesh), batch, token, active, None, sampled)


def _within(mesh: Mesh | None) -> Any:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _params(plan: GenerationPlan, mesh: Mesh | None) -> dict[str, Any]:
    dtype, upcast = DTYPES[plan.dtype], plan.card.platform == "cpu"
    stored = lambda name: stored_as(plan.model, name, dtype, plan.quantize, upcast=upcast)  # noqa: E731
    return abstract_params(plan.model, mesh, stored)


def _cache(plan: GenerationPlan, rows: int, mesh: Mesh | None) -> KVCache:
    """Return a cache as `KVCache.placed` shards it."""
    cache = jax.eval_shape(lambda: KVCache.empty(plan.model, rows, plan.max_length, plan.cache_dtype))
    even = mesh is None or not (rows * plan.model.num_kv_heads) % mesh.size

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = sharding("cache", leaf.shape, ("cache" if even else None, None, None), mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    lengths: Any = _replicated((rows,), jnp.int32, mesh)
    return KVCache(jax.tree.map(place, cache.layers), lengths)


def _replicated(shape: tuple[int, ...], dtype: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
