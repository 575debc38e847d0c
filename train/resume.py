"""What a run must have in common with the checkpoint it resumes from. Start at `check_resumable`.

Every setting is of one of three kinds: identity, compared here and refused by name; free to change, logged; and where
a run lies or how it is started, which is neither. `_FREE` and `_NOT_COMPARED` are the tables.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import read_json

from .config import RunConfig
from .inputs import differences, short

CONFIG: Final = "run.json"
# Fields of a model that do not change what it computes; token ids are those of the run's tokenizer.
_NEUTRAL: Final = frozenset(
    {"architectures", "bos_token_id", "eos_token_id", "extra", "pad_token_id", "pretraining_tp", "torch_dtype"}
    | {"transformers_version", "use_cache"}
)
# What may change from one start to the next, by part: how fast, how long, on what, not what is learned.
_FREE: Final[Mapping[str, frozenset[str]]] = {
    "optimizer": frozenset({"learning_rate", "schedule", "warmup_steps", "min_lr_ratio"}),
    "step": frozenset({"gradient_accumulation_steps", "compute_dtype", "remat"}),
}
_NOT_COMPARED: Final = frozenset({"out", "resume", "processes", "model_config", "result"})
_NAMES: Final = {"mode": "data.packing"}  # of the stream's fields as flags; the others are called as in `data`
_log = logging.getLogger(__name__)


def identity(config: RunConfig, model: ModelConfig, **others: Any) -> dict[str, Any]:
    """All that decides what a run learns, but its data, as JSON; `others` is what only some runs have."""
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


def check_resumable(folder: Path, step: int, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming every value in which a run differs from its checkpoint; both are `Job.facts`."""
    if "config" not in known:
        _log.warning("%s: step %d was written by an earlier version: only its data can be compared", folder, step)
    old, new = known.get("stream", {}), now["stream"]
    old_stream, new_stream = ({k: v for k, v in one.items() if k != "datasets"} for one in (old, new))
    changes = [
        *differences(known.get("config", now["config"]), now["config"]),
        *(change._replace(name=_flag(change.name)) for change in differences(old_stream, new_stream)),
    ]
    problems = [f"{name}: the checkpoint has {short(then)}, this run {short(this)}" for name, then, this in changes]
    if not problems:
        inputs = known.get("inputs", {})
        if old.get("datasets") != new["datasets"]:
            problems = list(_data_changes(inputs, now["inputs"])) or ["other data"]
        elif inputs.get("validation", now["inputs"]["validation"]) != now["inputs"]["validation"]:
            problems = ["other validation data"]
    if problems:
        raise DSMoEError(f"{folder}: cannot resume from step {step}: {'; '.join(problems)}; choose another --out")


def read_run(out: Path) -> dict[str, Any]:
    """What an earlier start wrote about the run in its folder; nothing where there is none that can be read."""
    with contextlib.suppress(ValueError):
        return read_json(out / CONFIG)
    return {}


def log_changes(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """Log each setting that is not as in the `run.json` of the last start."""
    then, this = ({k: v for k, v in _as_json(one).items() if k not in _NOT_COMPARED} for one in (before, now))
    for change in differences(then, this) if before else ():
        _log.info("%s (from step %d)", change, step)


def _data_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Which files are not those of before, by their content, and which options."""
    old, new = then.get("files", {}), now["files"]
    for name in new:
        if new[name] not in old.values():
            yield f"{name} has changed" if name in old else f"{name} is new"
    for name in old.keys() - new.keys():
        if old[name] not in new.values():
            yield f"{name} is missing"
    if list(old.values()) != list(new.values()) and sorted(old.values()) == sorted(new.values()):
        yield f"the order of {', '.join(new)}"
    for name, before, this in differences(then.get("options", {}), now["options"]):
        yield f"{name}: the checkpoint has {short(before)}, this run {short(this)}"


def _flag(name: str) -> str:
    return name if name == "seed" else _NAMES.get(name, f"data.{name}")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
