"""Memory of generation per device, computed from the config alone: `MemoryPlan.of`."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.manifest import is_native, read_manifest
from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import stored_dtypes
from dsmoe_jax.errors import check_choice
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.quantize import SCHEMES, kind_of, quantized_spec
from dsmoe_jax.sharding import MeshConfig, as_mesh


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
        """Return one line in GB."""
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in self._asdict().items())
        return f"{self.total / 1e9:.3g} GB: {parts}"

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
        mesh: Mesh | MeshConfig | None = None,
        upcast: bool = False,
    ) -> "MemoryPlan":
        """Compute the memory of a `Generator` with these options; `upcast`: as `upcast_for_cpu`."""
        if quantize is not None:
            check_choice("quantize", quantize, SCHEMES)
        mesh = as_mesh(mesh)
        dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(abstract(config)[1], dtype)
        widen = lambda stored: jnp.float32 if upcast and jnp.dtype(stored).itemsize < 4 else stored  # noqa: E731
        sharding, weights = shardings(config, mesh), 0
        for name, spec in abstract(config)[1].items():
            stored = dtypes[name] if ".experts." in name else widen(dtypes[name])
            embedding = name == "embed" and not config.tie_word_embeddings
            shape = sharding[name].shard_shape(spec.shape)
            if quantize is not None and (embedding or kind_of(name)):
                weights += _quantized_bytes(shape, "int8" if embedding else quantize)
            else:
                weights += math.prod(shape) * jnp.dtype(stored).itemsize
        cache_dtype = widen(dtypes["norm.weight"]) if cache_dtype is None else cache_dtype
        size = functools.partial(cache_bytes, config, max_length=max_length, dtype=cache_dtype, mesh=mesh)
        chunk = min(prefill_chunk, max_length)
        # Fitted to compiled programs: six hidden states per layer and token, twice the attention scores, all fp32.
        states, scores = 6 * config.num_hidden_layers * config.hidden_size, 2 * config.num_attention_heads * max_length
        return cls(weights, size(batch_size), size(1), 4 * chunk * (states + scores))


@functools.lru_cache(maxsize=1024)
def cache_bytes(config: ModelConfig, batch_size: int, max_length: int, *, dtype: Any, mesh: Mesh | None = None) -> int:
    """Return the bytes of a KV cache per device."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch_size, max_length, dtype))
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    devices = 1 if mesh is None else mesh.size
    return total if (batch_size * config.num_kv_heads) % devices else total // devices


def device_bytes() -> int | None:
    """Return the free memory of a device in bytes; None if the backend does not report it (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


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
