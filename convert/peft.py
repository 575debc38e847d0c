"""LoRA adapters as the peft library stores them, in and out. Start at `read_adapter`.

What is written has the fields of peft 0.13, which refuses later ones. Unlike peft, nothing is passed over: every tensor
of the file has its place and every place its tensor. `peft_matching.py` says what a config means for a model.
"""

import dataclasses
import math
import os
import re
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
from .peft_matching import RELEASES, Rules, make_plan, modules, untied_config, unties_embeddings
from .reader import CheckpointReader, path_inside, read_safetensors
from .torch_pickle import read_torch_file, show

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_LAYOUTS: Final = ((WEIGHTS, False, read_safetensors), ("adapter_model.bin", False, read_torch_file))
_PREFIX: Final = "base_model.model."
_WHOLE: Final = ("embed_tokens", "lm_head")  # saved under their own names by `save_embedding_layers`, listed or not

# The fields that change what an adapter computes: the only values that are understood here. What is in no row must be
# null, false or empty; a config that says anything else is refused rather than read in part.
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
}
_OURS: Final = frozenset(field.name for field in dataclasses.fields(LoraConfig))
_WITHOUT_EFFECT: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_config", "megatron_core"}
    | {"peft_version", "qalora_group_size", "revision", "runtime_config"}
)
# What peft means by a field that is absent, where `LoraConfig` has another default.
_DEFAULTS: Final[dict[str, Any]] = {"lora_alpha": 8}
_REQUIRED: Final = ("r", "lora_alpha", "target_modules")  # null means nothing here
_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights
_WRITTEN_SINCE: Final = {"exclude_modules": (0, 14), "corda_config": (0, 15)}  # `peft_version` itself since 0.18


class Adapter(NamedTuple):
    """An adapter with all that is known of it."""

    config: LoraConfig
    plan: Plan
    params: dict[str, np.ndarray]  # fp32, by the names of `dsmoe_jax.lora`
    base: str | None  # what its config says of the model it was made for


def read_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """The adapter in the folder `path`, for a base of this config.

    Raises `ValueError` in one line for a config that means more than this project computes, for tensors that are
    missing, surplus or of another shape than config and base ask for, and for files that are not as the
    `evaluation.json` beside them says. If it replaces the embedding or the head of a
    model that ties them, the base must be `untied` first.
    """
    path = user_path(path, "adapter")
    if not os.path.lexists(path / CONFIG):
        raise DSMoEError(f"{path}: no adapter (no {CONFIG})")
    if (path / RECORD).is_file():
        read_evaluation_record(path)
    fields = read_json(path_inside(path, CONFIG))
    try:
        config, rules = _lora_config(fields), _rules(fields)
    except ValueError as error:
        raise DSMoEError(f"{path / CONFIG}: {error}") from None
    with CheckpointReader(path, _LAYOUTS) as reader:
        unlisted = [end for end in _WHOLE if any(name.endswith(f".{end}.weight") for name in reader.tensors)]
        saved = tuple(dict.fromkeys((*config.modules_to_save, *unlisted)))
        config = dataclasses.replace(config, modules_to_save=saved)
        try:
            plan = make_plan(config, model, rules=rules, strict=False)
        except ValueError as error:
            raise DSMoEError(f"{path / CONFIG}: {error}") from None
        parts = _parts(plan, model)
        _check_tensors(path, {name: info.shape for name, info in reader.tensors.items()}, parts)
        shapes = {name: spec.shape for name, spec in specs(plan, _whole_config(plan, model)).items()}
        params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, part in parts.items():
            params[part.name][part.index] = reader.read(name)
    return Adapter(config, plan, params, fields.get("base_model_name_or_path"))


def _check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], parts: Mapping[str, "_Part"]) -> None:
    for name, shape in found.items():
        if name not in parts:
            raise DSMoEError(f"{path}: tensor {name} belongs to no part of this adapter of this base")
        if shape != parts[name].shape:
            raise DSMoEError(
                f"{path}: tensor {name} has shape {list(shape)}, rank and base ask for {list(parts[name].shape)}"
            )
    if missing := sorted(parts.keys() - found.keys()):
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
    """Write the adapter to the new folder `path`, with the fields and names that peft 0.13.2 reads; fp32.

    `base` is noted as the model it was made for; `generation` are fields of a `generation_config.json`, which is
    written where there are any. Raises `ValueError` if `path` exists or the disk is too full.
    """
    from safetensors.numpy import save_file

    plan = make_plan(config, model)
    tensors = to_peft(plan, model, params)
    with atomic_dir(user_path(path, "adapter"), needs=sum(tensor.nbytes for tensor in tensors.values())) as draft:
        save_file(tensors, draft.folder / WEIGHTS, metadata={"format": "pt"})
        write_json(draft.folder / CONFIG, _peft_fields(config, base))
        if generation:
            write_json(draft.folder / GENERATION_CONFIG, dict(generation))


def attach_adapter(model: DeepSeekMoE, path: str | Path) -> DeepSeekMoE:
    """The model with the adapter in the folder `path` on it, nothing multiplied out; raises as `read_adapter` does."""
    config, params = model.config, split(model)[1]
    adapter = read_adapter(path, config)
    config, params = untie_for_adapter(adapter.plan, config, params)
    return assemble(config, attach(adapter.plan, params, place(adapter.plan, config, adapter.params, params)))


def merge_adapter(model: DeepSeekMoE, path: str | Path) -> DeepSeekMoE:
    """The model with the adapter in the folder `path` multiplied into its weights, each in the dtype it had."""
    config, params = model.config, split(model)[1]
    adapter = read_adapter(path, config)
    config, params = untie_for_adapter(adapter.plan, config, params)
    placed = place(adapter.plan, config, adapter.params, params)
    return assemble(config, jax.jit(partial(merge, adapter.plan))(params, placed))


def untie_for_adapter(plan: Plan, model: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and parameters that the adapter goes onto: with a head of their own if it takes apart what is tied."""
    if not unties_embeddings(plan, model):
        return model, dict(params)
    return untied_config(model), {**params, "head.weight": params["embed"]}


# --- names ---


class _Part(NamedTuple):
    """Where a tensor of the file lies in our parameters."""

    name: str
    index: tuple[Any, ...]
    shape: tuple[int, ...]


def _parts(plan: Plan, model: ModelConfig) -> dict[str, _Part]:
    """By the names of the file. Of a stack over experts a tensor is one expert's; ranks are filled up with zeros."""
    whole = _whole_config(plan, model)
    shapes = {name: spec.shape for name, spec in specs(plan, whole).items()}
    paths_of, names, parts = modules(whole), hf_names(whole), {}

    def at(name: str, n: int) -> tuple[int, ...]:
        return (n,) if is_stacked(name) else ()

    for name, target in plan.targets.items():
        into, out = shapes[name + LORA_A][-1], shapes[name + LORA_B][-2]
        for n, (path, r) in enumerate(zip(paths_of[name], target.ranks, strict=True)):
            if r:
                rank = slice(r)
                parts[f"{_PREFIX}{path}.lora_A.weight"] = _Part(name + LORA_A, (*at(name, n), rank), (r, into))
                parts[f"{_PREFIX}{path}.lora_B.weight"] = _Part(name + LORA_B, (*at(name, n), ..., rank), (out, r))
    for name in plan.saved:
        for n, hf_name in enumerate(names[name]):
            parts[f"{_PREFIX}{hf_name}"] = _Part(
                name, at(name, n), shapes[name][1:] if is_stacked(name) else shapes[name]
            )
    return parts


def to_peft(plan: Plan, model: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of the file, fp32."""
    host = {name: np.asarray(value, np.float32) for name, value in params.items()}
    return {name: np.ascontiguousarray(host[part.name][part.index]) for name, part in _parts(plan, model).items()}


def _whole_config(plan: Plan, model: ModelConfig) -> ModelConfig:
    return untied_config(model) if unties_embeddings(plan, model) else model


# --- the config file ---


def _lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    for name, allowed in _FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise DSMoEError(f"{name} {fields[name]!r:.80} is not supported, only {allowed[0]!r}")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or init not in _INITS:
        raise DSMoEError(f"init_lora_weights {init!r:.80} changes the base's weights, which are not here")
    if not isinstance(base := fields.get("base_model_name_or_path"), str | None):
        raise DSMoEError(f"base_model_name_or_path {base!r:.80} is not understood")
    known = {*_FIXED, *_OURS, *_WITHOUT_EFFECT, "init_lora_weights"}
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", 0) and value != [] and value != {}:
            raise DSMoEError(f"{show(name)} {value!r:.80} is not supported")
    if "target_modules" not in fields:  # peft's default goes by the model type, and it has none for this one
        raise DSMoEError("target_modules is missing")
    said = {name: value for name, value in fields.items() if value is not None or name in _REQUIRED}
    return LoraConfig(**{name: _field(name, value) for name, value in (_DEFAULTS | said).items() if name in _OURS})


def _field(name: str, value: Any) -> Any:
    """The value in the type that `LoraConfig` has; `ValueError` for another one."""
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
    raise DSMoEError(f"{name} {value!r:.80} is not understood")


def _rules(fields: Mapping[str, Any]) -> Rules:
    """Those of the release that wrote the file."""
    release = max([(0, 13), *(since for name, since in _WRITTEN_SINCE.items() if name in fields)])
    if (version := fields.get("peft_version")) is not None:
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
        if numbers is None:
            raise DSMoEError(f"peft_version {version!r:.80} is not understood")
        release = int(numbers[1]), int(numbers[2])
    return RELEASES[max((since for since in RELEASES if since <= release), default=(0, 13))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _peft_fields(config: LoraConfig, base: str | None) -> dict[str, Any]:
    """What peft 0.13.2 writes; it stumbles over any field that it does not know."""
    own = dataclasses.asdict(config)
    lists = {name: list(own[name]) for name in ("layers_to_transform", "modules_to_save") if own[name]}
    target = own["target_modules"]
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": config.layers_pattern,
        "layers_to_transform": lists.get("layers_to_transform"),
        "loftq_config": {},
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": lists.get("modules_to_save"),
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": None,
        "target_modules": target if isinstance(target, str) else list(target),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }
