"""Memory of generation per device, computed from the config alone: `MemoryPlan.of`."""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dsmoe_jax.checkpoint.manifest import is_native, read_manifest
from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import stored_dtypes
from dsmoe_jax.errors import check_choice
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import ParamSpec, abstract, layers_of, short
from dsmoe_jax.progress import byte_size
from dsmoe_jax.quantize import SCHEMES, kind_of, quantized_spec
from dsmoe_jax.sharding import MeshConfig, abstract_mesh, as_mesh, shard_shape


class MemoryPlan(NamedTuple):
    """Bytes per device."""

    weights: int
    cache: int  # KV cache of the batch
    prompt_cache: int  # KV cache of a prompt during prefill
    activations: int  # of one prefill call, which needs more than a decode step

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)

    def __str__(self) -> str:
        """Return one line."""
        parts = ", ".join(
            f"{name.replace('_', ' ')} {byte_size(size)}" for name, size in self._asdict().items() if size
        )
        return f"{byte_size(self.total)} ({parts})"

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int,
        dtype: Any | Mapping[str, Any] = jnp.bfloat16,
        cache_dtype: Any = None,
        quantize: str | None = None,
        prefill_chunk: int = 512,
        mesh: Mesh | AbstractMesh | MeshConfig | None = None,
        upcast: bool = False,
    ) -> "MemoryPlan":
        """Compute the memory of a `Generator` with these options; `upcast`: as `upcast_for_cpu`."""
        if quantize is not None:
            check_choice("quantize", quantize, SCHEMES)
        mesh = mesh if isinstance(mesh, AbstractMesh) else as_mesh(mesh)
        weights = sum(weight_bytes(config, mesh, dtype, quantize, upcast=upcast).values())
        norm = dtype["norm.weight"] if isinstance(dtype, Mapping) else dtype
        cache_dtype = _widen(norm, upcast) if cache_dtype is None else cache_dtype
        size = functools.partial(cache_bytes, config, max_length=max_length, dtype=cache_dtype, mesh=mesh)
        chunk = min(prefill_chunk, max_length)
        # Fitted to compiled programs: six hidden states per layer and token, twice the attention scores, all fp32.
        states, scores = 6 * config.num_hidden_layers * config.hidden_size, 2 * config.num_attention_heads * max_length
        return cls(weights, size(batch_size), size(1), 4 * chunk * (states + scores))


def weight_bytes(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh | None,
    dtype: Any | Mapping[str, Any],
    quantize: str | None = None,
    *,
    upcast: bool = False,
) -> dict[str, int]:
    """Return the bytes of each parameter on a device; of equal layers together if `dtype` is one dtype."""
    named = isinstance(dtype, Mapping)
    mesh, found = mesh or abstract_mesh(MeshConfig(), 1), {}
    for name, spec in abstract(config if named else short(config))[1].items():
        layers = 1 if named else layers_of(config, name)
        stored, scheme = stored_as(config, name, dtype[name] if named else dtype, quantize, upcast=upcast)
        found[name] = layers * stored_bytes(name, spec, mesh, stored, scheme)
    return found


def stored_as(
    config: ModelConfig, name: str, dtype: Any, quantize: str | None, *, upcast: bool = False
) -> tuple[Any, str | None]:
    """Return the dtype of a parameter during generation, and its quantization."""
    embedding = name == "embed" and not config.tie_word_embeddings
    scheme = ("int8" if embedding else quantize) if quantize and (embedding or kind_of(name)) else None
    if name == "head.weight" and quantize and upcast:
        return jnp.float16, scheme
    return dtype if ".experts." in name else _widen(dtype, upcast), scheme


def stored_bytes(name: str, spec: ParamSpec, mesh: Mesh | AbstractMesh, dtype: Any, scheme: str | None) -> int:
    """Return the bytes of a parameter on a device, dense or quantized."""
    if scheme is None:
        return math.prod(shard_shape(name, spec.shape, spec.axes, mesh)) * jnp.dtype(dtype).itemsize
    # Tiles span rows: quantized weights are sharded over experts alone.
    axes = (*("experts",) * (len(spec.shape) == 3), None, None)
    return _quantized_bytes(shard_shape(name, spec.shape, axes, mesh), scheme)


def _widen(dtype: Any, upcast: bool) -> Any:
    return jnp.float32 if upcast and jnp.dtype(dtype).itemsize < 4 else dtype


@functools.lru_cache(maxsize=1024)
def cache_bytes(
    config: ModelConfig, batch_size: int, max_length: int, *, dtype: Any, mesh: Mesh | AbstractMesh | None = None
) -> int:
    """Return the bytes of a KV cache per device."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch_size, max_length, dtype))
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    devices = 1 if mesh is None else mesh.size
    return total if (batch_size * config.num_kv_heads) % devices else total // devices


def device_bytes() -> int | None:
    """Return the free memory of a device in bytes; None if the backend does not report it (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def available_bytes(mesh: Any = None) -> int | None:
    """Return the free memory of a device, on CPU its share of the machine's among the devices of a mesh."""
    if (free := device_bytes()) is not None:
        return free
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return machine // (1 if mesh is None else jax.local_device_count())


def weight_dtypes(path: Path, config: ModelConfig) -> Mapping[str, Any]:
    """Return the stored dtype of each parameter; for a missing tensor, that of the config."""
    default = DTYPES.get(config.torch_dtype or "", jnp.float32)
    try:
        if is_native(path):
            tensors = read_manifest(path, verify=False).tensors
            stored = {name: np.dtype(tensor["dtype"]) for name, tensor in tensors.items()}
        else:
            stored = stored_dtypes(path)
    except ValueError:  # `load` reports it
        stored = {}
    return {name: stored.get(name, default) for name in abstract(config)[1]}


@functools.lru_cache(maxsize=256)
def _quantized_bytes(shape: tuple[int, ...], scheme: str) -> int:
    leaves = jax.tree.leaves(quantized_spec(shape, scheme))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
