"""Export a checkpoint to a GGUF file, for llama.cpp. Start at `export_gguf`."""

import contextlib
import hashlib
import importlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.checkpoint.zarr_io import raw_bytes, row_chunks
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.progress import Advance, Meter, silent
from dsmoe_jax.storage.atomic_dir import check_new_path, check_outside
from dsmoe_jax.storage.atomic_file import atomic_file
from dsmoe_jax.text.tokenizer import tokenizer_files

from .cast import Cast, CastStats, ConversionReport
from .gguf_tokenizer import add_tokenizer
from .hub import resolve
from .param_mapping import hf_names, is_stacked, name_in
from .tensor_source import TensorSource, open_source

# fmt: off
_GGUF_NAME: Final = {
    # ours                                llama.cpp's
    "embed":                              "token_embd.weight",
    "layers.{i}.attention_norm.weight":   "blk.{i}.attn_norm.weight",
    "layers.{i}.attention.q.weight":      "blk.{i}.attn_q.weight",
    "layers.{i}.attention.k.weight":      "blk.{i}.attn_k.weight",
    "layers.{i}.attention.v.weight":      "blk.{i}.attn_v.weight",
    "layers.{i}.attention.o.weight":      "blk.{i}.attn_output.weight",
    "layers.{i}.ffn_norm.weight":         "blk.{i}.ffn_norm.weight",
    "layers.{i}.mlp.gate.weight":         "blk.{i}.ffn_gate.weight",
    "layers.{i}.mlp.up.weight":           "blk.{i}.ffn_up.weight",
    "layers.{i}.mlp.down.weight":         "blk.{i}.ffn_down.weight",
    "layers.{i}.moe.router.weight":       "blk.{i}.ffn_gate_inp.weight",
    "layers.{i}.moe.experts.gate":        "blk.{i}.ffn_gate_exps.weight",
    "layers.{i}.moe.experts.up":          "blk.{i}.ffn_up_exps.weight",
    "layers.{i}.moe.experts.down":        "blk.{i}.ffn_down_exps.weight",
    "layers.{i}.moe.shared.gate.weight":  "blk.{i}.ffn_gate_shexp.weight",
    "layers.{i}.moe.shared.up.weight":    "blk.{i}.ffn_up_shexp.weight",
    "layers.{i}.moe.shared.down.weight":  "blk.{i}.ffn_down_shexp.weight",
    "norm.weight":                        "output_norm.weight",
    "head.weight":                        "output.weight",
}
_TYPE: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_DTYPE: Final = {kind: dtype for dtype, kind in _TYPE.items()}
# What llama.cpp's architecture "deepseek" does not compute, or computes otherwise without an error.
_UNSUPPORTED: Final[dict[str, Callable[[ModelConfig], bool]]] = {
    "norm_topk_prob":    lambda config: config.norm_topk_prob and (config.num_experts_per_tok or 0) > 1,
    "rope_scaling":      lambda config: config.rope_scaling is not None,
    "attention_bias":    lambda config: config.attention_bias,
    "hidden_act":        lambda config: config.hidden_act not in ("silu", "swish"),
    "moe_layer_freq":    lambda config: config.moe_layer_freq != 1,
    "n_routed_experts":  lambda config: not config.n_routed_experts,
    "n_shared_experts":  lambda config: not config.n_shared_experts,
}
# fmt: on
_log = logging.getLogger(__name__)
_CHUNK_BYTES: Final = 1 << 22
_BLOCK: Final = 32  # values of a row that share a scale in q8_0


class _Tensor(NamedTuple):
    """A tensor of the file."""

    name: str
    ours: str
    parts: tuple[str, ...]  # Hugging Face's tensors, one per expert in a stack
    shape: tuple[int, ...]
    type: str  # of `gguf.GGMLQuantizationType`
    heads: int  # of a query or key projection, else 0

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        size = math.prod(self.shape)
        return size // _BLOCK * (_BLOCK + 2) if self.type == "Q8_0" else size * (4 if self.type == "F32" else 2)


def export_gguf(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    progress: Meter = silent,
) -> ConversionReport:
    """Export a checkpoint as one GGUF file with its tokenizer, for llama.cpp.

    Norms and routers are stored in float32. Tensors of a native checkpoint are checked against their SHA-256.

    Args:
        source: Native checkpoint, Hugging Face folder or hub id.
        output: New file.
        dtype: "float32", "bfloat16", "float16" or "q8_0"; default: the stored dtypes.
        revision: Branch, tag or commit of a hub id; default: `main`.
        progress: Progress meter.

    Returns:
        What was written.

    Raises:
        DSMoEError: `output` exists, the checkpoint is damaged, or llama.cpp does not support its config or tokenizer.
    """
    started = time.perf_counter()
    if dtype is not None:
        check_choice("dtype", dtype, _TYPE)
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise DSMoEError("GGUF needs the package gguf: pip install 'dsmoe_jax[gguf]'") from None
    output = check_new_path(output)
    with open_source(resolve(source, revision, name="source")) as reader:
        check_outside(output, reader.folder)
        _check_supported(reader.folder, reader.config)
        name = Path(source).resolve().name  # of a folder or a hub id, whose folder is named by its commit
        stats, tensors, total = _export(gguf, reader, output, name, dtype, progress)
    checksum = "verified every tensor against the manifest's SHA-256" if reader.sha256 else "no SHA-256 to verify"
    return ConversionReport(output, tensors, total, 0, time.perf_counter() - started, stats, checksum)


def _export(
    gguf: Any, reader: TensorSource, output: Path, name: str, dtype: str | None, progress: Meter
) -> tuple[CastStats, int, int]:
    """Write the file; return the statistics of the cast, and the number of tensors and their bytes."""
    tensors = list(_tensors(reader, dtype))
    total, stats = sum(tensor.nbytes for tensor in tensors), CastStats()
    small = sum(path.stat().st_size for path in tokenizer_files(reader.folder))
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(atomic_file(output, needs=total + small))
        advance = stack.enter_context(progress("exporting", total))
        with contextlib.closing(gguf.GGUFWriter(staging, "deepseek")) as writer:
            writer.add_name(name)
            _add_config(writer, reader.config)
            if warning := add_tokenizer(writer, reader.folder, reader.config):
                _log.warning("%s", warning)
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType[tensor.type]
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            for tensor in tensors:
                writer.write_padding(file, file.tell())
                stats += _write(gguf, file, tensor, reader, advance)
                writer.write_padding(file, tensor.nbytes)
    return stats, len(tensors), total


def opens_in_llama_cpp(folder: Path, config: ModelConfig) -> bool:
    """Return whether llama.cpp supports config and tokenizer of a checkpoint."""
    with contextlib.suppress(DSMoEError):
        _check_supported(folder, config)
        add_tokenizer(_NullWriter(), folder, config)
        return True
    return False


class _NullWriter:
    """A `gguf.GGUFWriter` that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def _check_supported(folder: Path, config: ModelConfig) -> None:
    """Refuse a config that llama.cpp does not compute, or computes otherwise without an error."""
    for name, is_unsupported in _UNSUPPORTED.items():
        if is_unsupported(config):
            value = getattr(config, name)
            raise DSMoEError(f"{folder}: llama.cpp's architecture 'deepseek' does not support {name} {value!r}")


def _tensors(reader: TensorSource, dtype: str | None) -> Iterator[_Tensor]:
    """Yield the tensors in the order of the file."""
    config, parts = reader.config, hf_names(reader.config)
    heads = {"q": config.num_attention_heads, "k": config.num_kv_heads}
    for ours, names in parts.items():
        array = reader.read(names[0])
        kind = _TYPE[dtype or array.dtype.name]
        if array.ndim == 1 or ours.endswith("router.weight"):
            kind = "F32"
        elif kind == "Q8_0" and array.shape[-1] % _BLOCK:
            kind = "F16"  # as llama.cpp does
        shape = (len(names), *array.shape) if is_stacked(ours) else array.shape
        projection = re.search(r"attention\.([qk])\.weight", ours)
        yield _Tensor(name_in(_GGUF_NAME, ours), ours, names, shape, kind, heads[projection[1]] if projection else 0)
        if ours == "embed" and config.tie_word_embeddings:  # llama.cpp requires a head
            yield _Tensor("output.weight", ours, names, shape, kind, 0)


def _write(gguf: Any, file: BinaryIO, tensor: _Tensor, reader: TensorSource, advance: Advance) -> CastStats:
    """Write the data of a tensor in chunks."""
    digest, cast = hashlib.sha256(), Cast(None if tensor.type == "Q8_0" else as_dtype(_DTYPE[tensor.type]))
    for part in tensor.parts:
        array = reader.read(part)
        for chunk in [array] if tensor.heads else row_chunks(array, _CHUNK_BYTES):
            digest.update(raw_bytes(chunk))
            rows = _interleave(chunk, tensor.heads) if tensor.heads else chunk
            if tensor.type == "Q8_0":
                encoded = gguf.quantize(rows.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            else:
                encoded = cast(rows)
            file.write(raw_bytes(encoded))
            advance(encoded.nbytes)
    if reader.sha256 and digest.hexdigest() != reader.sha256[tensor.ours]:
        raise DSMoEError(f"{reader.folder}: damaged checkpoint: SHA-256 mismatch of tensor {tensor.ours}")
    return cast.stats


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection: llama.cpp rotates neighbors, the model the halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _add_config(writer: Any, config: ModelConfig) -> None:
    """Add the metadata of the model."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(1.0)
