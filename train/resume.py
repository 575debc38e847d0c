"""Resuming: settings of the run in a folder (`settings_of_run`), and which must not change (`check_resumable`)."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.storage.strict_json import read_json

from .config import RunConfig
from .inputs import differences, short
from .old_names import with_new_names

Config = TypeVar("Config")
CONFIG: Final = "run.json"
CHECKPOINTS: Final = "checkpoints"  # in the output directory
# Model fields that do not change the computation; token ids are those of the run's tokenizer.
_NEUTRAL: Final = frozenset(
    {"architectures", "bos_token_id", "eos_token_id", "extra", "pad_token_id", "pretraining_tp", "torch_dtype"}
    | {"transformers_version", "use_cache"}
)
# Settings that may change between starts, which is logged: speed, duration and schedule, not the objective.
_FREE: Final[Mapping[str, frozenset[str]]] = {
    "optimizer": frozenset({"learning_rate", "schedule", "warmup_steps", "min_lr_ratio"}),
    "step": frozenset({"gradient_accumulation_steps", "compute_dtype", "remat", "scan_layers"}),
}
# Settings of a start, not of the run.
_OF_START: Final = frozenset({"output_dir", "resume", "distributed", "recipe"})
# Entries of run.json whose changes are not logged.
_NOT_COMPARED: Final = _OF_START | {"model_config", "result", "total_steps"}
_log = logging.getLogger(__name__)


def identity(config: RunConfig, model: ModelConfig, **others: Any) -> dict[str, Any]:
    """Return, as JSON, every setting except the data that affects what is learned; `others` are of fine-tuning."""
    fields = {name: value for name, value in vars(model).items() if name not in _NEUTRAL}
    fields |= {
        "num_key_value_heads": model.num_kv_heads,
        "n_shared_experts": model.n_shared_experts or 0,
        "rope_scaling": model.rope_scaling and model.rope_scaling._asdict(),
        "hidden_act": "silu" if model.hidden_act == "swish" else model.hidden_act,
    }
    parts = {
        part: {name: value for name, value in vars(getattr(config, part)).items() if name not in free}
        for part, free in _FREE.items()
    }
    return _as_json({**fields, **parts, **others})


def check_settings(folder: Path, step: int, known: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise `DSMoEError` naming all settings but the data that differ from those of a checkpoint (`known`)."""
    changes = differences(known.get("config", config), config)
    _refuse(folder, step, [_mismatch(*change) for change in changes])


def check_resumable(folder: Path, step: int, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `DSMoEError` naming all settings and inputs that differ between a checkpoint (`known`) and this run."""
    if "config" not in known:
        _log.warning("%s: step %d is of an earlier version: only its data is compared", folder, step)
    old, new = known.get("stream", {}), now["stream"]
    changes = list(differences(known.get("config", now["config"]), now["config"]))
    for change in differences({**old, "datasets": None}, {**new, "datasets": None}):
        changes.append(change._replace(name=change.name if change.name == "seed" else f"data.{change.name}"))
    problems = [_mismatch(*change) for change in changes]
    if not problems:
        inputs = known.get("inputs", {})
        if old.get("datasets") != new["datasets"]:
            problems = list(_data_changes(inputs, now["inputs"])) or ["the training data has changed"]
        elif inputs.get("validation", now["inputs"]["validation"]) != now["inputs"]["validation"]:
            problems = ["the validation data has changed"]
    _refuse(folder, step, problems)


def _refuse(folder: Path, step: int, problems: Sequence[str]) -> None:
    if problems:
        why = "; ".join(problems)
        way_out = "choose those of the checkpoint, or another --output-dir"
        raise DSMoEError(f"{folder}: cannot resume from step {step}: {why}; {way_out}")


def read_run(output_dir: Path) -> dict[str, Any]:
    """Read the `run.json` of the last start; empty if it is missing or malformed."""
    with contextlib.suppress(ValueError):
        return with_new_names(read_json(output_dir / CONFIG), CONFIG)
    return {}


def settings_of_run(output_dir: str | Path) -> dict[str, Any]:
    """Return the settings of the last start in `output_dir`; empty if there is no checkpoint to resume from."""
    folder = Path(output_dir)
    return read_run(folder) if any((folder / CHECKPOINTS).glob("step-*")) else {}


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Replace the fields of a config with settings of a `run.json`; other entries are ignored."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name not in settings or field.name in _OF_START:
            continue
        value, default = settings[field.name], getattr(config, field.name)
        if isinstance(value, Mapping) and field.name == "lora":
            default = default or LoraConfig()
        if isinstance(value, Mapping) and dataclasses.is_dataclass(default):
            value = with_settings(default, value)
        fields[field.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def log_changes(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """Log each setting that differs from the `run.json` of the last start."""
    names = before.keys() - _NOT_COMPARED  # earlier versions had fewer settings
    old, new = ({k: v for k, v in _as_json(one).items() if k in names} for one in (before, now))
    for change in differences(old, new):
        _log.info("Changed: %s %s → %s (from step %d)", change.name, short(change.old), short(change.new), step)


def _mismatch(name: str, then: Any, now: Any) -> str:
    if name == "lora":  # one of the two is None
        trained = ["LoRA adapters" if lora else "all parameters" for lora in (then, now)]
        return f"the run of the checkpoint trains {trained[0]}, this run {trained[1]}"
    return f"{name} is {short(then)} in the checkpoint, {short(now)} in this run"


def _data_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe the files, compared by content, and the options that differ."""
    old, new = then.get("files", {}), now["files"]
    for name in new:
        if new[name] not in old.values():
            yield f"{name} has changed" if name in old else f"{name} is new"
    for name in old.keys() - new.keys():
        if old[name] not in new.values():
            yield f"{name} is missing"
    if list(old.values()) != list(new.values()) and sorted(old.values()) == sorted(new.values()):
        yield f"the order of {', '.join(new)} has changed"
    for change in differences(then.get("options", {}), now["options"]):
        yield _mismatch(*change)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
