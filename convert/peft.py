"""Read, write, attach and merge LoRA adapters in PEFT's format. Start at `read_adapter`.

Adapters are written with the fields of PEFT 0.13, which rejects later ones. Unlike in PEFT, unexpected tensors are
errors. peft_matching.py matches a config with a model.
"""

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsmoe_jax.checkpoint.manifest import RECORD, read_evaluation_record
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.lora import LORA_A, LORA_B, LoraConfig, Plan, attach, merge, place, specs
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from dsmoe_jax.storage.atomic_dir import atomic_dir, write_json
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.generation_config import GENERATION_CONFIG

from .param_mapping import hf_names, is_stacked
from .peft_matching import RELEASES, MatchingRules, base_config, make_plan, modules
from .reader import CheckpointReader, path_inside, read_safetensors
from .tensor_info import quote
from .torch_pickle import read_torch_file

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_LAYOUTS: Final = ((WEIGHTS, False, read_safetensors), ("adapter_model.bin", False, read_torch_file))
_PREFIX: Final = "base_model.model."
_EMBEDDINGS: Final = ("embed_tokens", "lm_head")  # saved by `save_embedding_layers` even if not in modules_to_save

# Supported values. Fields in none of these tables must be null, false or empty.
_FIXED: Final = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM", None), "bias": ("none", None)}
_LORA_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(LoraConfig))
_IGNORED_FIELDS: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_config", "megatron_core"}
    | {"peft_version", "qalora_group_size", "revision", "runtime_config"}
)
_DEFAULTS: Final = {"lora_alpha": 8}  # PEFT's defaults that differ from those of `LoraConfig`
_REQUIRED: Final = ("r", "lora_alpha", "target_modules")  # must not be null
_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights
_WRITTEN_SINCE: Final = {"exclude_modules": (0, 14), "corda_config": (0, 15)}  # `peft_version` itself since 0.18


class Adapter(NamedTuple):
    """A PEFT adapter."""

    config: LoraConfig
    plan: Plan
    params: dict[str, np.ndarray]  # fp32, by their names in `dsmoe_jax.lora`
    base: str | None  # base_model_name_or_path


def read_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """Read an adapter from a folder.

    Args:
        path: Folder with adapter_config.json and the weights.
        model: Config of the base. Its parameters need `untie_for_adapter` if the adapter replaces a tied embedding.

    Returns:
        The adapter.

    Raises:
        DSMoEError: The config is not supported, a tensor is missing, unexpected or of another shape, or a file does
            not match the folder's `evaluation.json`.
    """
    path = user_path(path, "adapter")
    if not os.path.lexists(path / CONFIG):
        raise DSMoEError(f"{path}: not an adapter, {CONFIG} is missing")
    if (path / RECORD).is_file():
        read_evaluation_record(path)
    fields = read_json(path_inside(path, CONFIG))
    try:
        config, rules = _lora_config(fields), _rules(fields)
    except DSMoEError as error:
        raise DSMoEError(f"{path / CONFIG}: {error}") from None
    with CheckpointReader(path, _LAYOUTS) as reader:
        unlisted = [end for end in _EMBEDDINGS if any(name.endswith(f".{end}.weight") for name in reader.tensors)]
        saved = tuple(dict.fromkeys((*config.modules_to_save, *unlisted)))
        config = dataclasses.replace(config, modules_to_save=saved)
        try:
            plan = make_plan(config, model, rules=rules, strict=False)
        except DSMoEError as error:
            raise DSMoEError(f"{path / CONFIG}: {error}") from None
        slots = _slots(plan, model)
        _check_tensors(path, {name: info.shape for name, info in reader.tensors.items()}, slots)
        shapes = {name: spec.shape for name, spec in specs(plan, base_config(plan, model)).items()}
        params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, slot in slots.items():
            params[slot.name][slot.index] = reader.read(name)
    return Adapter(config, plan, params, fields.get("base_model_name_or_path"))


def _check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], slots: Mapping[str, "_Slot"]) -> None:
    for name, shape in found.items():
        if name not in slots:
            raise DSMoEError(f"{path}: unexpected tensor {name}: the config does not adapt this module of the base")
        if shape != slots[name].shape:
            raise DSMoEError(f"{path}: tensor {name} must have shape {list(slots[name].shape)}, got {list(shape)}")
    if missing := sorted(slots.keys() - found.keys()):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DSMoEError(f"{path}: tensor {missing[0]} is missing{more}")


def write_adapter(
    path: str | Path,
    config: LoraConfig,
    model: ModelConfig,
    params: Mapping[str, Any],
    *,
    base: str | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write an adapter in fp32, readable by PEFT 0.13.2 and later.

    Args:
        path: New folder.
        config: LoRA config.
        model: Config of the base.
        params: Arrays by their names in `dsmoe_jax.lora`.
        base: `base_model_name_or_path`.
        generation: Fields of a `generation_config.json`; without any none is written.

    Raises:
        DSMoEError: `path` exists, or the disk is too full.
    """
    from safetensors.numpy import save_file

    plan = make_plan(config, model)
    tensors = to_peft(plan, model, params)
    with atomic_dir(user_path(path, "adapter"), needs=sum(tensor.nbytes for tensor in tensors.values())) as draft:
        save_file(tensors, draft.folder / WEIGHTS, metadata={"format": "pt"})
        write_json(draft.folder / CONFIG, _peft_fields(config, base))
        shutil.copymode(draft.folder / CONFIG, draft.folder / WEIGHTS)  # safetensors ignores the umask
        if generation:
            write_json(draft.folder / GENERATION_CONFIG, dict(generation))


def attach_adapter(model: DeepSeekMoE, path: str | Path) -> DeepSeekMoE:
    """Attach an adapter to a model without merging it.

    Args:
        model: Base model; its parameters are shared.
        path: Folder with the adapter.

    Returns:
        The model with low-rank operands.

    Raises:
        DSMoEError: As `read_adapter`.
    """
    plan, config, params, adapter = _load_onto(model, path)
    return assemble(config, attach(plan, params, adapter))


def merge_adapter(model: DeepSeekMoE, path: str | Path) -> DeepSeekMoE:
    """Merge an adapter into a model's weights, which retain their dtypes.

    Args:
        model: Base model.
        path: Folder with the adapter.

    Returns:
        The merged model.

    Raises:
        DSMoEError: As `read_adapter`.
    """
    plan, config, params, adapter = _load_onto(model, path)
    return assemble(config, jax.jit(partial(merge, plan))(params, adapter))


def _load_onto(model: DeepSeekMoE, path: str | Path) -> tuple[Plan, ModelConfig, dict[str, Any], dict[str, jax.Array]]:
    """Return the plan, the base's config and parameters, and the adapter's parameters on the same devices."""
    config, params = model.config, split(model)[1]
    adapter = read_adapter(path, config)
    config, params = untie_for_adapter(adapter.plan, config, params)
    return adapter.plan, config, params, place(adapter.plan, config, adapter.params, params)


def untie_for_adapter(plan: Plan, model: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the base's config and parameters, with a separate head if the adapter unties it."""
    base = base_config(plan, model)
    is_untied = model.tie_word_embeddings and not base.tie_word_embeddings
    return base, {**params, "head.weight": params["embed"]} if is_untied else dict(params)


class _Slot(NamedTuple):
    """Location of a PEFT tensor in our parameters."""

    name: str
    index: tuple[Any, ...]
    shape: tuple[int, ...]


def _slots(plan: Plan, model: ModelConfig) -> dict[str, _Slot]:
    """Return the location of each PEFT tensor; in a stack it is one expert's, zero-padded to the largest rank."""
    base = base_config(plan, model)
    shapes = {name: spec.shape for name, spec in specs(plan, base).items()}
    paths_of, names, slots = modules(base), hf_names(base), {}

    def at(name: str, expert: int) -> tuple[int, ...]:
        return (expert,) if is_stacked(name) else ()

    for name, target in plan.targets.items():
        size_in, size_out = shapes[name + LORA_A][-1], shapes[name + LORA_B][-2]
        for e, (path, r) in enumerate(zip(paths_of[name], target.ranks, strict=True)):
            if r:
                rank, prefix = slice(r), f"{_PREFIX}{path}"
                slots[f"{prefix}.lora_A.weight"] = _Slot(name + LORA_A, (*at(name, e), rank), (r, size_in))
                slots[f"{prefix}.lora_B.weight"] = _Slot(name + LORA_B, (*at(name, e), ..., rank), (size_out, r))
    for name in plan.saved:
        shape = shapes[name][is_stacked(name) :]
        slots |= {_PREFIX + hf_name: _Slot(name, at(name, e), shape) for e, hf_name in enumerate(names[name])}
    return slots


def to_peft(plan: Plan, model: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors in PEFT's layout, fp32."""
    host = {name: np.asarray(value, np.float32) for name, value in params.items()}
    return {name: np.ascontiguousarray(host[slot.name][slot.index]) for name, slot in _slots(plan, model).items()}


def _lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    for name, allowed in _FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise DSMoEError(f"{name} {fields[name]!r:.80} is not supported, only {allowed[0]!r}")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise DSMoEError(f"init_lora_weights {init!r:.80} is not supported: it changes the base's weights")
    if not isinstance(base := fields.get("base_model_name_or_path"), str | None):
        raise DSMoEError(f"base_model_name_or_path {base!r:.80} is not supported")
    known = {*_FIXED, *_LORA_FIELDS, *_IGNORED_FIELDS, "init_lora_weights"}
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", 0) and value != [] and value != {}:
            raise DSMoEError(f"{quote(name)} {value!r:.80} is not supported")
    if "target_modules" not in fields:  # PEFT has no default for this model type
        raise DSMoEError("target_modules is missing")
    present = {name: value for name, value in fields.items() if value is not None or name in _REQUIRED}
    present = _DEFAULTS | present
    return LoraConfig(**{name: _field(name, value) for name, value in present.items() if name in _LORA_FIELDS})


def _field(name: str, value: Any) -> Any:
    """Convert a value to the type of the `LoraConfig` field."""
    match name, value:
        case ("target_modules", str()) | ("use_rslora", bool()):
            return value
        case ("target_modules" | "modules_to_save", [*entries]) if all(isinstance(entry, str) for entry in entries):
            return tuple(entries)
        case "layers_pattern", [] | "":
            return None
        case "layers_pattern", [str() as pattern] | str(pattern):
            return pattern or None
        case "layers_to_transform", int() if not isinstance(value, bool):
            return (value,)
        case "layers_to_transform", [*layers] if all(type(layer) is int for layer in layers):
            return tuple(layers) or None
        case ("rank_pattern" | "alpha_pattern", dict()) if all(_is_number(number) for number in value.values()):
            return value
        case "r", float() if value.is_integer():
            return int(value)
        case ("r" | "lora_alpha" | "lora_dropout", int() | float()) if _is_number(value):
            return value
    raise DSMoEError(f"{name} {value!r:.80} is not supported")


def _rules(fields: Mapping[str, Any]) -> MatchingRules:
    """Return the matching rules of the release that wrote the file."""
    release = max([(0, 13), *(since for name, since in _WRITTEN_SINCE.items() if name in fields)])
    if (version := fields.get("peft_version")) is not None:
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
        if numbers is None:
            raise DSMoEError(f"peft_version {version!r:.80} is not supported")
        release = int(numbers[1]), int(numbers[2])
    return RELEASES[max((since for since in RELEASES if since <= release), default=(0, 13))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _peft_fields(config: LoraConfig, base: str | None) -> dict[str, Any]:
    """Return the fields of PEFT 0.13.2, which fails on unknown ones."""
    layers, saved, target = config.layers_to_transform, config.modules_to_save, config.target_modules
    # fmt: off
    return {
        "alpha_pattern": dict(config.alpha_pattern), "auto_mapping": None, "base_model_name_or_path": base,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": config.layers_pattern,
        "layers_to_transform": list(layers) if layers else None, "loftq_config": {}, "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": list(saved) or None, "peft_type": "LORA", "r": config.r,
        "rank_pattern": dict(config.rank_pattern), "revision": None,
        "target_modules": target if isinstance(target, str) else list(target), "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": config.use_rslora,
    }
    # fmt: on
