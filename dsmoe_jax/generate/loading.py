"""Loading for generation: memory check, weights, tokenizer and stop conditions. Start at `load`."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.checkpoint.native import DTYPES, as_dtype
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.memory_plan import MemoryPlan, available_bytes, cache_bytes, weight_dtypes
from dsmoe_jax.generate.programs import bucket
from dsmoe_jax.kernels.operand import Quantized
from dsmoe_jax.loading import load as load_model
from dsmoe_jax.model import DeepSeekMoE
from dsmoe_jax.progress import byte_size
from dsmoe_jax.sharding import as_mesh
from dsmoe_jax.text import generation_config as stops
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

MIN_CONTEXT_LENGTH: Final = 4096
_MIN_LOGGED_BYTES: Final = 1e9
_HALF: Final = (jnp.bfloat16, jnp.float16)
_log = logging.getLogger("dsmoe_jax")


def load(
    path: Path,
    *,
    split_special_tokens: bool | None,
    engine_options: Mapping[str, Any],
    force: bool,
    **options: Any,
) -> tuple[DeepSeekMoE, Tokenizer | None, dict[str, Any]]:
    """Load model, tokenizer and generation config for `Generator`; `options` are for `dsmoe_jax.load`."""
    check_memory(path, options["dtype"], options["quantize"], options["mesh"], engine_options, force=force)
    model, adapter = load_model(path, **options), options["adapter"]
    tokenizer = None
    if tokenizer_files(path):
        # Loading the model has verified the files.
        tokenizer = Tokenizer.from_pretrained(path, split_special_tokens=split_special_tokens, verify=False)
    fields = stops.with_default_eos(stops.read_generation_config(path), model.config)
    if adapter is not None:
        fields = stops.merge_stop_conditions(fields, stops.read_generation_config(adapter))
    return model, tokenizer, fields


def valid_eos_token_ids(fields: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Return the EOS ids of generation config and tokenizer; warn of those outside the vocabulary."""
    extra = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    ids = list(dict.fromkeys((*stops.eos_token_ids(fields), *extra)))
    valid = [token for token in ids if 0 <= token < vocab_size]
    for token in ids:
        if token not in valid:
            used = f"using {' and '.join(map(str, valid))}" if valid else "no EOS token is left"
            _log.warning("eos_token_id %d is outside the vocabulary of %d: %s", token, vocab_size, used)
    return valid


def upcast_for_cpu(params: dict[str, Any]) -> dict[str, Any]:
    """Upcast bf16 and fp16 weights except for routed experts to fp32 on CPU, where XLA converts them every token."""
    if jax.default_backend() != "cpu":
        return params
    # The experts, most of the weights, are read as stored by their kernel.
    head = _half_head(params)
    others = {name: value for name, value in params.items() if ".experts." not in name and name not in head}
    half = [leaf for leaf in jax.tree.leaves(others) if leaf.dtype in _HALF]
    if half:
        size, dtype = sum(leaf.nbytes for leaf in half) / 1e6, half[0].dtype
        text = "Upcasting %d weights outside the routed experts (%.1f MB) from %s to float32 for speed on CPU"
        _log.info(text, len(half), size, dtype)
    upcast = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype in _HALF else leaf  # noqa: E731
    return params | jax.tree.map(upcast, others) | head


def _half_head(params: dict[str, Any]) -> dict[str, Any]:
    """Return the head of a quantized model in fp16: in fp32 it has a quarter of the bytes of an int8 decode step.

    fp16 rounds weights by 0.02 %, int8 by 0.8 %.
    """
    quantized = any(isinstance(value, Quantized) for value in params.values())
    if not quantized or "head.weight" not in params:
        return {}
    head = params["head.weight"].astype(jnp.float16)
    return {"head.weight": head} if jnp.isfinite(head).all() else {}


def default_prefill_chunk(platform: str | None = None) -> int:
    """Return the default number of tokens per prefill call, by default of the devices here."""
    return 512 if (platform or jax.default_backend()) == "cpu" else 2048


def default_prefix_cache_bytes(free: int | None, config: ModelConfig, length: int, dtype: Any, mesh: Any) -> int:
    """Return the default bound on retained prefixes: a part of the free memory, at least one sequence of `length`."""
    return max(10**9 if free is None else free // 20, cache_bytes(config, 1, length, dtype=dtype, mesh=mesh))


def at_least(minimum: int, name: str, value: int | None, default: Any) -> Any:
    """Return `value`, an int of at least `minimum`, or the default for None."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise DSMoEError(f"{name} must be an int of at least {minimum}, got {value!r}")
    return value


def as_cache_dtype(value: Any) -> np.dtype:
    """Return the dtype of a name or type."""
    allowed = {name: np.dtype(dtype) for name, dtype in (*DTYPES.items(), ("int8", jnp.int8))}
    for name, dtype in allowed.items():
        if value == name or (not isinstance(value, str) and value in (dtype, dtype.type)):
            return dtype
    raise DSMoEError(f"cache_dtype must be one of {', '.join(allowed)}, got {value!r}")


def check_memory(
    path: Path, dtype: Any, quantize: str | None, mesh: Any, options: Mapping[str, Any], *, force: bool
) -> None:
    """Log the memory of one output from 1 GB; refuse what leaves no memory for the shortest one, unless `force`.

    Args:
        path: Checkpoint.
        dtype: Of the weights; None: as stored.
        quantize: Quantization of the weights.
        mesh: The devices, as for `dsmoe_jax.load`.
        options: Those of an engine.
        force: Warn instead of refusing.

    Raises:
        DSMoEError: The memory of a device is known and too small.
    """
    config, mesh = ModelConfig.from_file(path), as_mesh(mesh)
    weight_dtype, cache_dtype = as_dtype(dtype), options.get("cache_dtype")
    plan = functools.partial(
        MemoryPlan.of,
        config,
        batch_size=1,
        dtype=weight_dtypes(path, config) if weight_dtype is None else weight_dtype,
        cache_dtype=None if cache_dtype is None else as_cache_dtype(cache_dtype),
        quantize=quantize,
        prefill_chunk=options.get("prefill_chunk") or default_prefill_chunk(),
        mesh=mesh,
        upcast=jax.default_backend() == "cpu",
    )
    length = options.get("context_length") or MIN_CONTEXT_LENGTH
    available = available_bytes(mesh)
    if (longest := plan(max_length=length)).total >= _MIN_LOGGED_BYTES:
        bound = f" of {byte_size(available)}" if available else ""
        _log.info("Memory plan: %s%s per device, for one output of %s tokens", longest, bound, f"{length:,}")
    least = plan(max_length=bucket(1))
    if available and least.total > available:
        text = f"{path} needs at least {least} per device, {byte_size(available)} are available"
        if not force:
            raise DSMoEError(f"{text}: quantize it, shard it over a mesh, or load it regardless with force (--force)")
        _log.warning("Loading although %s", text)
