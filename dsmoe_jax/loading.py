"""The one loader: `load` takes a native checkpoint, a Hugging Face folder or a hub id."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dsmoe_jax.checkpoint.manifest import is_native, read_manifest
from dsmoe_jax.convert import attach_adapter
from dsmoe_jax.convert.hub import resolve
from dsmoe_jax.convert.sources import load_params
from dsmoe_jax.convert.tensor_source import HFSource
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import DeepSeekMoE, assemble
from dsmoe_jax.quantize import quantize_embedding
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.manifest import HashCache, hash_json

__all__ = ["identity", "load", "load_params", "resolve"]


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    verify: bool = True,
) -> DeepSeekMoE:
    """Load a model.

    Args:
        path_or_hub_id: Native checkpoint, Hugging Face folder (safetensors or `pytorch_model*.bin`), or the id of a
            repository on the Hugging Face Hub (`owner/name`; needs the extra `hub`). An existing path takes precedence.
        dtype: "float32", "bfloat16" or "float16" to cast to while reading; default: as stored.
        mesh: Mesh to shard the model over; default: the default device.
        quantize: Quantize weights while reading: "int8", "int4" or "nf4". The embedding is quantized to int8; norms,
            routers and the head are not.
        adapter: Folder of a LoRA adapter in PEFT's format to attach, not merged.
        revision: Branch, tag or commit of a hub id; default: `main`.
        verify: Compare every file of a native checkpoint with its SHA-256 first (0.5 s per GB and core, divided among
            processes). Hugging Face folders have no hashes.

    Returns:
        The model.

    Raises:
        DSMoEError: The path or hub id does not exist, an argument is invalid, or the checkpoint is damaged.
    """
    if not isinstance(verify, bool):
        raise DSMoEError(f"verify must be True or False, got {verify!r:.80}")
    folder = resolve(path_or_hub_id, revision)
    config, params = load_params(folder, dtype=dtype, mesh=mesh, quantize=quantize, verify=verify)
    model = assemble(config, params if quantize is None else quantize_embedding(params))
    return model if adapter is None else attach_adapter(model, adapter)


def identity(folder: Path, cache: HashCache) -> str:
    """Return a SHA-256 of config and weights: from a native checkpoint's manifest, else from the files."""
    if is_native(folder):
        return read_manifest(folder).identity
    source = HFSource(folder)
    with source:
        hashes = cache.hashes([folder / "config.json", *source.weight_files])
    return hash_json({file.name: sha256 for file, sha256 in hashes.items()})
