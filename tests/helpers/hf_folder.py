"""Write small checkpoints in the Hugging Face layout. Start at `write_hf`.

Also helpers of the conversion tests: an independent reader, and functions that damage files and interrupt conversions.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import export_hf, import_hf
from dsmoe_jax.convert.param_mapping import hf_names, is_stacked
from dsmoe_jax.model import abstract
from dsmoe_jax.progress import Advance, Meter
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.manifest import MODEL_MANIFEST, hash_file, hash_json
from dsmoe_jax.text.train_tokenizer import train_tokenizer

INDEX = "model.safetensors.index.json"

# Config changes to `tiny`, each with a different set of tensors.
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "everything": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "dense": {"n_routed_experts": None, "num_experts_per_tok": None, "n_shared_experts": None},
    "no shared experts": {"n_shared_experts": None},
    "every second layer": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "a key-value head per head": {"num_key_value_heads": None},
}


def tiny(**changes: Any) -> ModelConfig:
    """Return the smallest config with all parts: a dense layer and a MoE layer, shared experts, grouped queries."""
    fields: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def random_params(config: ModelConfig, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return random parameters by our names; nothing is compiled."""
    rng = np.random.default_rng(0)
    return {name: (0.1 * rng.standard_normal(spec.shape)).astype(dtype) for name, spec in abstract(config)[1].items()}


def hf_tensors(config: ModelConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors by Hugging Face's names."""
    tensors = {}
    for name, parts in hf_names(config).items():
        tensors |= dict(zip(parts, params[name] if is_stacked(name) else [params[name]], strict=True))
    return tensors


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    """Write `model.safetensors`, or shards and their index."""
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a tokenizer on the sources of the tests."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.parent.glob("test_*.py"))]
    train_tokenizer(texts, folder, vocab_size)


def write_hf(
    folder: Path, config: ModelConfig, params: dict[str, np.ndarray], dtype: str = "float32", *, shards: int = 1
) -> Path:
    """Write a checkpoint without a tokenizer; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    as_dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    tensors = {name: tensor.astype(as_dtype) for name, tensor in hf_tensors(config, params).items()}
    write_tensors(folder, tensors, shards=shards)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"auto_map": {"AutoModel": "evil.Model"}}))
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return all paths under `folder`: files with their bytes, folders and links with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


class Stored(NamedTuple):
    """A tensor as read by the safetensors library."""

    dtype: str  # F32, BF16 or F16
    shape: tuple[int, ...]
    data: bytes


def stored(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the folder's `model*.safetensors`, each in one file."""
    tensors: dict[str, Stored] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, found in safetensors.deserialize(file.read_bytes()):
            assert name not in tensors
            tensors[name] = Stored(found["dtype"], tuple(found["shape"]), bytes(found["data"]))
    return tensors


def round_trip(source: Path, work: Path, **options: Any) -> Path:
    """Return the folder after an import to `work/native` and an export."""
    import_hf(source, work / "native")
    return export_hf(work / "native", work / "back", **options).path


def same_bits(got: Any, want: np.ndarray) -> bool:
    got = np.asarray(got)
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that changes the fields of a JSON file in a folder."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        change(fields)
        (folder / file).write_text(json.dumps(fields))

    return damage


def rehashed(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a function that calls `damage` and updates the manifest, so that hashes match."""

    def damage_and_rehash(folder: Path) -> None:
        damage(folder)
        fields = json.loads((folder / MODEL_MANIFEST).read_text())
        if (folder / "config.json").is_file():
            fields["files"]["config.json"] = hash_file(folder / "config.json")
        del fields["sha256"]
        write_json(folder / MODEL_MANIFEST, fields | {"sha256": hash_json(fields)})

    return damage_and_rehash


def flip_bit(file: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of the byte `at`, which may be negative."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def stop_after(nbytes: int, error: BaseException | None = None) -> Meter:
    """A progress meter that interrupts the conversion with `error`, by default Ctrl-C, after that many bytes."""

    @contextlib.contextmanager
    def meter(what: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(step: int) -> None:
            nonlocal done
            done += step
            if done > nbytes:
                raise error or KeyboardInterrupt

        yield advance

    return meter
