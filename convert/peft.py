"""LoRA adapters as the peft library stores them, in and out, and what their configs match. Start at `read_adapter`.

Names, scales and matching are those of peft 0.13.2, whose files newer releases read; where newer ones match otherwise,
the file's own fields say which release wrote it. Unlike peft, nothing is passed over: every tensor of the file has its
place and every place its tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.json_file import read_json
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.lora import LORA_A, LORA_B, PROJECTIONS, LoraConfig, Plan, Target, attach, merge, place, specs
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from dsmoe_jax.new_folder import new_folder, write_json

from .names import hf_names, is_stacked
from .reader import CheckpointReader, read_safetensors
from .torch_pickle import read_torch_file

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_LAYOUTS: Final = ((WEIGHTS, False, read_safetensors), ("adapter_model.bin", False, read_torch_file))
_PREFIX: Final = "base_model.model."
_FACTORS: Final = {".lora_A.weight": LORA_A, ".lora_B.weight": LORA_B}
_WHOLE: Final = ("embed_tokens", "lm_head")  # saved under their own names by `save_embedding_layers`, listed or not
_EVERYTHING: Final = "all-linear"

# The fields that change what an adapter computes: the only values that are understood here. What is in no row must be
# null, false or empty; a config that says anything else is refused rather than read in part.
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
}
_OURS: Final = frozenset(field.name for field in dataclasses.fields(LoraConfig))
_WITHOUT_EFFECT: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_config", "megatron_core", "peft_version"}
    | {"qalora_group_size", "revision", "runtime_config"}
)
_INITS: Final = (True, False, "gaussian", "eva")  # the others change the base's weights
# Written since rank_pattern and alpha_pattern are looked up each by itself.
_SINCE_SEPARATE: Final = frozenset({"corda_config", "trainable_token_indices", "peft_version"})


class Adapter(NamedTuple):
    """An adapter with all that is known of it."""

    config: LoraConfig
    plan: Plan
    params: dict[str, np.ndarray]  # fp32, by the names of `dsmoe_jax.lora`
    base: str | None  # what its config says of the model it was made for


def read_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """The adapter in the folder `path`, for a base of this config.

    Raises `ValueError` in one line for a config that means more than this project computes, and for tensors that are
    missing, surplus or of another shape than config and base ask for. If it replaces the embedding or the head of a
    model that ties them, the base must be `untied` first.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path}: no adapter (no {CONFIG})")
    fields = read_json(path / CONFIG)
    try:
        config = _lora_config(fields)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    with CheckpointReader(path, _LAYOUTS) as reader:
        held = {name.removeprefix(_PREFIX).removesuffix(".weight") for name in reader.tensors}
        extra = tuple(end for end in _WHOLE if any(name.split(".")[-1] == end for name in held))
        config = dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *extra))
        try:
            plan = make_plan(config, model, separate=bool(fields.keys() & _SINCE_SEPARATE), strict=False)
        except ValueError as error:
            raise ValueError(f"{path / CONFIG}: {error}") from None
        wanted = peft_shapes(plan, model)
        for name, info in reader.tensors.items():
            if name not in wanted:
                raise ValueError(f"{path}: tensor {name} belongs to no part of this adapter of this base")
            if info.shape != wanted[name]:
                raise ValueError(
                    f"{path}: tensor {name} has shape {list(info.shape)}, rank and base ask for {list(wanted[name])}"
                )
        if missing := sorted(wanted.keys() - reader.tensors.keys()):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"{path}: tensor {missing[0]} is missing{more}")
        params = _stacked(plan, model, lambda name: reader.read(name).astype(np.float32))
    return Adapter(config, plan, params, fields.get("base_model_name_or_path"))


def write_adapter(
    path: str | Path, config: LoraConfig, model: ModelConfig, params: Mapping[str, Any], *, base: str | None = None
) -> None:
    """Write the adapter to the new folder `path`, with the fields and names that peft 0.13.2 reads; fp32.

    `base` is noted as the model it was made for. Raises `ValueError` if `path` exists or the disk is too full.
    """
    from safetensors.numpy import save_file

    plan = make_plan(config, model)
    tensors = to_peft(plan, model, params)
    with new_folder(Path(path), needs=sum(tensor.nbytes for tensor in tensors.values())) as draft:
        save_file(tensors, draft.folder / WEIGHTS, metadata={"format": "pt"})
        write_json(draft.folder / CONFIG, _peft_fields(config, base))


def make_plan(config: LoraConfig, model: ModelConfig, *, separate: bool | None = None, strict: bool = True) -> Plan:
    """Which parameters of a model the config adapts, and which it replaces.

    `separate`: whether rank_pattern and alpha_pattern are looked up each by itself, as newer releases of peft do, or
    the first key of both decides for both, as up to 0.13; by default both must agree. `strict`: every name must match
    a module. Raises `ValueError` for one that does not, and for what cannot be adapted.
    """
    matched: set[str] = set()
    saved = tuple(name for name, paths in modules(model).items() if _is_saved(name, paths, config, matched))
    targets = {}
    for name, paths in modules(model).items():
        ranks, scales = [], []
        for path in paths:
            hit = _is_target(path, config, matched)
            if hit and not _is_linear(path):
                raise ValueError(f"target_modules: {path} cannot be adapted, only {', '.join(PROJECTIONS)}")
            rank, alpha = _rank_and_alpha(path, config, separate) if hit else (0, 0.0)
            ranks.append(rank)
            scales.append(alpha / (math.sqrt(rank) if config.use_rslora else rank) if rank else 0.0)
        if any(ranks):
            if name in saved:
                raise ValueError(f"{paths[0]} is both in target_modules and in modules_to_save")
            targets[name] = Target(tuple(ranks), tuple(scales))
    wanted = config.target_modules if not isinstance(config.target_modules, str) else ()
    if strict and (idle := [entry for entry in (*wanted, *config.modules_to_save) if entry not in matched]):
        raise ValueError(f"{idle[0]!r} matches no module of this model")
    if not targets:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of this model")
    return Plan(targets, saved, config.lora_dropout)


def is_untied(plan: Plan, model: ModelConfig) -> bool:
    """Whether the adapter takes apart what the model ties: it replaces the embedding or the head alone."""
    return model.tie_word_embeddings and bool({"embed", "head.weight"} & set(plan.saved))


def untied(model: ModelConfig) -> ModelConfig:
    """The config with a head of its own."""
    return dataclasses.replace(model, tie_word_embeddings=False)


def with_adapter(model: DeepSeekMoE, path: str | Path) -> DeepSeekMoE:
    """The model with the adapter in the folder `path` on it, nothing multiplied out; raises as `read_adapter` does."""
    config, params = model.config, split(model)[1]
    adapter = read_adapter(path, config)
    config, params = prepare_base(adapter.plan, config, params)
    return assemble(config, attach(adapter.plan, params, place(adapter.plan, config, adapter.params, params)))


def merge_adapter(model: DeepSeekMoE, path: str | Path) -> DeepSeekMoE:
    """The model with the adapter in the folder `path` multiplied into its weights, each in the dtype it had."""
    config, params = model.config, split(model)[1]
    adapter = read_adapter(path, config)
    config, params = prepare_base(adapter.plan, config, params)
    placed = place(adapter.plan, config, adapter.params, params)
    return assemble(config, jax.jit(partial(merge, adapter.plan))(params, placed))


def prepare_base(plan: Plan, model: ModelConfig, params: dict[str, Operand]) -> tuple[ModelConfig, dict[str, Operand]]:
    """Config and parameters that the adapter goes onto: with a head of their own if it takes apart what is tied."""
    if not is_untied(plan, model):
        return model, params
    return untied(model), params | {"head.weight": params["embed"]}


# --- names ---


def peft_shapes(plan: Plan, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the file."""
    shapes = {name: np.zeros(spec.shape, np.bool_) for name, spec in specs(plan, _whole_config(plan, model)).items()}
    return {name: tensor.shape for name, tensor in to_peft(plan, model, shapes).items()}


def to_peft(plan: Plan, model: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of the file, from stacks over experts with ranks filled up."""
    tensors, paths_of = {}, modules(_whole_config(plan, model))
    for name, target in plan.targets.items():
        stacks = {end: _per_module(name, params[name + ours]) for end, ours in _FACTORS.items()}
        for n, (path, rank) in enumerate(zip(paths_of[name], target.ranks, strict=True)):
            if rank:
                a, b = (stack[n] for stack in stacks.values())
                for end, factor in zip(_FACTORS, (a[:rank], b[:, :rank]), strict=True):
                    tensors[f"{_PREFIX}{path}{end}"] = np.ascontiguousarray(factor)
    names = hf_names(_whole_config(plan, model))
    for name in plan.saved:
        for n, hf_name in enumerate(names[name]):
            tensors[f"{_PREFIX}{hf_name}"] = np.ascontiguousarray(_per_module(name, params[name])[n])
    return tensors


def _stacked(plan: Plan, model: ModelConfig, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """The other way round."""
    whole = _whole_config(plan, model)
    params = {name: np.zeros(spec.shape, np.float32) for name, spec in specs(plan, whole).items()}
    paths_of, names = modules(whole), hf_names(whole)
    for name, target in plan.targets.items():
        for n, (path, rank) in enumerate(zip(paths_of[name], target.ranks, strict=True)):
            if rank:
                for end, ours in _FACTORS.items():
                    own = _per_module(name, params[name + ours])[n]
                    (own[:rank] if ours == LORA_A else own[:, :rank])[...] = read(f"{_PREFIX}{path}{end}")
    for name in plan.saved:
        for n, hf_name in enumerate(names[name]):
            _per_module(name, params[name])[n][...] = read(f"{_PREFIX}{hf_name}")
    return params


def _per_module(name: str, value: Any) -> np.ndarray:
    """A view of a parameter with an axis of modules: experts, or one."""
    value = np.asarray(value)
    return value if is_stacked(name.removesuffix(LORA_A).removesuffix(LORA_B)) else value[None]


def _whole_config(plan: Plan, model: ModelConfig) -> ModelConfig:
    return untied(model) if is_untied(plan, model) else model


def modules(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """By our parameter, the paths of the modules it is the weight of; a tied head is one, too."""
    names = hf_names(untied(model) if model.tie_word_embeddings else model)
    return {
        name: tuple(part.removesuffix(".weight") for part in parts)
        for name, parts in names.items()
        if parts[0].endswith(".weight")
    }


# --- matching ---


def _is_linear(path: str) -> bool:
    return path.rpartition(".")[2] in PROJECTIONS


def _is_target(path: str, config: LoraConfig, matched: set[str]) -> bool:
    """peft's `check_target_module_exists`: layers are chosen among what the end of a path matches, and only there."""
    if config.target_modules == _EVERYTHING:
        return _is_linear(path)
    if isinstance(config.target_modules, str):
        return _full_match(config.target_modules, path, "target_modules")
    hits = [entry for entry in config.target_modules if path == entry or path.endswith(f".{entry}")]
    matched.update(hits)
    if path in hits or not hits or not config.layers_to_transform:
        return bool(hits)
    # Without a pattern it is the last number in the path: on routed experts that of the expert, as in peft.
    number = re.match(rf".*\.{config.layers_pattern or '[^.]*'}\.(\d+)\.", path)
    return number is not None and int(number[1]) in config.layers_to_transform


def _is_saved(name: str, paths: Sequence[str], config: LoraConfig, matched: set[str]) -> bool:
    """Whether a module, or one around it, ends in an entry of modules_to_save; without a dot before it, as in peft."""
    hits = [_saving(path, config.modules_to_save) for path in paths]
    matched.update(*hits)
    if any(hits) and not all(hits):
        raise ValueError(f"modules_to_save: some experts of {name} alone cannot be saved whole")
    return all(hits)


def _saving(path: str, entries: Iterable[str]) -> set[str]:
    parts = path.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return {entry for entry in entries if any(module.endswith(entry) for module in around)}


def _rank_and_alpha(path: str, config: LoraConfig, separate: bool | None) -> tuple[int, float]:
    patterns = (config.rank_pattern, config.alpha_pattern)
    # Up to 0.13, the first key of either decides for both.
    old = next((key for pattern in patterns for key in pattern if _match(rf".*\.{key}$", path, key)), None)
    as_old = config.rank_pattern.get(old, config.r), config.alpha_pattern.get(old, config.lora_alpha)
    new = [next((key for key in pattern if _match_newer(key, path)), None) for pattern in patterns]
    as_new = config.rank_pattern.get(new[0], config.r), config.alpha_pattern.get(new[1], config.lora_alpha)
    if separate is None and as_old != as_new:
        raise ValueError(
            f"rank_pattern and alpha_pattern: releases of peft disagree on {path}, r and alpha {as_old} or {as_new}; "
            "give both the same keys, each in parentheses"
        )
    return as_new if separate else as_old


def _match_newer(key: str, path: str) -> bool:
    return _match(rf"{key}$" if key.startswith("^") else rf"(.*\.)?({key})$", path, key)


def _match(pattern: str, path: str, key: str) -> bool:
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"{key!r} is not a regular expression: {error}") from None


def _full_match(pattern: str, path: str, field: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"{field} {pattern!r} is not a regular expression: {error}") from None


# --- the config file ---


def _lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    for name, allowed in _FIXED.items():
        if fields.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} {fields[name]!r:.80} is not supported, only {allowed[0]!r}")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise ValueError(f"init_lora_weights {init!r:.80} changes the base's weights, which are not here")
    known = {*_FIXED, *_OURS, *_WITHOUT_EFFECT, "init_lora_weights"}
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", 0) and value != [] and value != {}:
            raise ValueError(f"{name} {value!r:.80} is not supported")
    return LoraConfig(**{name: _field(name, fields[name]) for name in _OURS if fields.get(name) is not None})


def _field(name: str, value: Any) -> Any:
    """The value in the type that `LoraConfig` has; `ValueError` for another one."""
    match name, value:
        case ("target_modules", str()) | ("layers_pattern", str()) | ("use_rslora", bool()):
            return value
        case ("target_modules" | "modules_to_save", [*entries]) if all(isinstance(entry, str) for entry in entries):
            return tuple(entries)
        case "layers_pattern", [str() as pattern]:
            return pattern
        case "layers_to_transform", int() if not isinstance(value, bool):
            return (value,)
        case "layers_to_transform", [*layers] if all(type(layer) is int for layer in layers):
            return tuple(layers)
        case ("rank_pattern" | "alpha_pattern", dict()) if all(_is_number(number) for number in value.values()):
            return value
        case ("r" | "lora_alpha" | "lora_dropout", int() | float()) if _is_number(value):
            return value
    raise ValueError(f"{name} {value!r:.80} is not understood")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
