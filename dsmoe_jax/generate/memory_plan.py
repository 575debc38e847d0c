"""How much memory generation takes on each device, from the config alone: `MemoryPlan.of`."""

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
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import abstract, shardings
from dsmoe_jax.quantize import SCHEMES, kind_of, quantized_spec
from dsmoe_jax.sharding import MeshConfig, as_mesh


class MemoryPlan(NamedTuple):
    """Bytes on each device."""

    weights: int
    cache: int  # of all rows
    piece: int  # of a prompt that is being read, until it has a row
    work: int  # intermediate values while a prompt is read, more than a decode step has

    @property
    def total(self) -> int:
        """All of it at once."""
        return sum(self)

    def __str__(self) -> str:
        """One line for a person, in GB."""
        parts = zip(self._fields, self, strict=True)
        return f"{self.total / 1e9:.3g} GB: " + ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        rows: int,
        slots: int,
        dtype: Any | Mapping[str, Any] = jnp.bfloat16,
        cache_dtype: Any = None,
        quantize: str | None = None,
        prefill_chunk: int = 512,
        mesh: Mesh | MeshConfig | None = None,
        widened: bool = False,
    ) -> "MemoryPlan":
        """What a `Generator` takes for `rows` answers of up to `slots` tokens, prompt included.

        `dtype` is that of the weights, one for all or each by its name (`convert.stored_dtypes`), and of the cache
        unless `cache_dtype` says otherwise; `quantize` is a key of `SCHEMES`; `widened` says that weights outside the
        routed experts are kept in fp32, as on CPUs. `work` is a formula found from compiled programs: six states a
        layer and token of a piece, and twice its scores, in fp32. Raises `ValueError` for another scheme.
        """
        if quantize is not None and quantize not in SCHEMES:
            raise DSMoEError(f"scheme {quantize!r} is not one of {', '.join(SCHEMES)}")
        mesh = as_mesh(mesh)
        dtype_of = dtype if isinstance(dtype, Mapping) else dict.fromkeys(abstract(config)[1], dtype)
        widen = lambda own: jnp.float32 if widened and jnp.dtype(own).itemsize < 4 else own  # noqa: E731
        places, weights = shardings(config, mesh), 0
        for name, spec in abstract(config)[1].items():
            own = dtype_of[name] if ".experts." in name else widen(dtype_of[name])
            embedding = name == "embed" and not config.tie_word_embeddings
            if quantize is not None and (embedding or kind_of(name)):
                scheme = "int8" if embedding else quantize
                weights += _quantized_bytes(places[name].shard_shape(spec.shape), scheme)
            else:
                weights += math.prod(places[name].shard_shape(spec.shape)) * jnp.dtype(own).itemsize
        cached = widen(dtype_of["norm.weight"]) if cache_dtype is None else cache_dtype
        of_rows = functools.partial(cache_bytes, config, dtype=cached, mesh=mesh)
        piece = min(prefill_chunk, slots)
        states, scores = 6 * config.num_hidden_layers * config.hidden_size, 2 * config.num_attention_heads * slots
        return cls(weights, of_rows(rows, slots), of_rows(1, slots), 4 * piece * (states + scores))


@functools.lru_cache(maxsize=1024)
def cache_bytes(config: ModelConfig, rows: int, slots: int, *, dtype: Any, mesh: Mesh | None = None) -> int:
    """The bytes of a cache on each device."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, rows, slots, dtype))
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    ways = 1 if mesh is None else mesh.size
    return whole if (rows * config.num_kv_heads) % ways else whole // ways


def device_bytes() -> int | None:
    """The memory that JAX may use on a device, less what it uses already; None where it does not say (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def weight_dtypes(path: Path, config: ModelConfig) -> Mapping[str, Any]:
    """The dtype of each stored parameter, from the tensors; from the config where a tensor is missing."""
    said = DTYPES.get(config.torch_dtype or "", jnp.float32)
    try:
        if is_native(path):
            found = {
                name: np.dtype(tensor["dtype"]) for name, tensor in read_manifest(path, verify=False).tensors.items()
            }
        else:
            found = stored_dtypes(path)
    except ValueError:  # loading says what is wrong
        found = {}
    return {name: found.get(name, said) for name in abstract(config)[1]}


@functools.lru_cache(maxsize=256)
def _quantized_bytes(shape: tuple[int, ...], scheme: str) -> int:
    """Of one weight."""
    leaves = jax.tree.leaves(quantized_spec(shape, scheme))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
