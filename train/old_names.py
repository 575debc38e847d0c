"""Names in the files of earlier versions: `OLD_NAMES` and its readers."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

_log = logging.getLogger(__name__)

# fmt: off
# By file: the dotted path in the old file, the last part of the new one. Paths use old names throughout.
OLD_NAMES: Final[dict[str, dict[str, str]]] = {
    "run.json": {
        "out": "output_dir",
        "log_every": "log_interval",
        "evaluate_every": "eval_interval",
        "evaluate_batches": "eval_batches",
        "sinks": "trackers",
        "most_skipped": "max_consecutive_skips",
        "data.holdout": "val_fraction",
        "data.targets": "train_on",
        "data.too_long": "excess_length_strategy",
        "checkpoints": "checkpoint",
        "checkpoints.every": "interval",
        "checkpoints.keep_last": "max_to_keep",
        "checkpoints.keep_every": "keep_period",
        "processes": "distributed",
        "processes.distributed": "initialize",
        "processes.coordinator": "coordinator_address",
        "processes.processes": "num_processes",
        "processes.index": "process_id",
        "optimizer.clip_norm": "max_grad_norm",
        "optimizer.decay": "weight_decay_mask",
        "optimizer.final_ratio": "min_lr_ratio",
        "step.accumulation": "gradient_accumulation_steps",
        "step.device_alpha": "device_balance_alpha",
        "step.device_groups": "device_balance_groups",
        "result.evaluation": "eval_loss",
        "result.skipped": "total_skips",
    },
    "manifest.json": {
        "facts": "resume_metadata",
        "facts.config.optimizer.clip_norm": "max_grad_norm",
        "facts.config.optimizer.decay": "weight_decay_mask",
        "facts.config.step.device_alpha": "device_balance_alpha",
        "facts.config.step.device_groups": "device_balance_groups",
        "facts.inputs.heldout": "validation",
        "facts.inputs.options.data.holdout": "data.val_fraction",
        "facts.inputs.options.data.targets": "data.train_on",
        "facts.inputs.options.data.too_long": "data.excess_length_strategy",
        "facts.stream.mode": "packing",
    },
    "state": {
        "optimizer": "opt_state",
        "guard.norms": "grad_norms",
        "guard.seen": "finite_steps",
        "guard.skipped": "total_skips",
        "guard.in_a_row": "consecutive_skips",
    },
    "metrics.jsonl": {
        "evaluation/loss": "eval/loss",
        "evaluation/tokens": "eval/tokens",
        "gradient_norm": "grad_norm",
        "skipped_in_all": "total_skips",
        "skipped_in_a_row": "consecutive_skips",
        "seconds": "step_time_seconds",
        "data_wait_seconds": "data_loading_seconds",
        "data_wait_share": "data_loading_share",
        "max_over_mean_load": "load_imbalance",
        "extra_passes": "overflow_passes",
        "load": "expert_load",  # moe/LAYER/load
    },
}
# fmt: on
_PACKING: Final = {"documents": "block_causal", "contiguous": "causal", "packed": "best_fit", "alone": "none"}
# Old values, by the old path.
OLD_VALUES: Final[dict[str, dict[str, str]]] = {
    "data.packing": _PACKING,
    "data.too_long": {"refuse": "raise"},
    "facts.inputs.options.data.too_long": {"refuse": "raise"},
    "facts.stream.mode": _PACKING,
}


def with_new_names(content: Any, file: str, path: str = "") -> Any:
    """Translate the JSON of an earlier version's `file`, a key of `OLD_NAMES`; new names remain unchanged."""
    if not isinstance(content, Mapping):
        return OLD_VALUES.get(path, {}).get(content, content) if isinstance(content, str) else content
    names = OLD_NAMES[file]
    inner = {key: f"{path}.{key}" if path else key for key in content}
    return {names.get(inner[key], key): with_new_names(value, file, inner[key]) for key, value in content.items()}


def new_flags(flags: Sequence[str]) -> list[str]:
    """Return the command line with today's flags and values; each old one is logged."""
    new, path = [], ""
    for flag in flags:
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            path = name.replace("-", "_")
            if (today := _new_path(path)) != path:
                name = today.replace("_", "-")
                _log.warning("Flag --%s is deprecated, use --%s", path.replace("_", "-"), name)
            new.append(f"--{name}{equals}{_new_value(path, value)}")
        else:
            new.append(_new_value(path, flag))
    return new


def _new_value(path: str, value: str) -> str:
    today = OLD_VALUES.get(path, {}).get(value, value)
    if today != value:
        _log.warning("Value %s of --%s is deprecated, use %s", value, path.replace("_", "-"), today)
    return today


def _new_path(path: str) -> str:
    names, parts = OLD_NAMES["run.json"], path.split(".")
    return ".".join(names.get(".".join(parts[: i + 1]), part) for i, part in enumerate(parts))


def new_metric(name: str) -> str:
    """Return today's name of a metric, which is `moe/LAYER/NAME` if per layer."""
    names = OLD_NAMES["metrics.jsonl"]
    prefix, _, last = name.rpartition("/")
    return f"{prefix}/{names.get(last, last)}" if prefix.startswith("moe/") else names.get(name, name)


def stored_leaves(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the name in a checkpoint of each state leaf, by today's name."""
    today, names = {}, OLD_NAMES["state"]
    for name in stored:
        group, _, rest = name.partition("/")
        today["/".join(filter(None, (names.get(group, group), names.get(f"{group}.{rest}", rest))))] = name
    return {name: today.get(name, name) for name in wanted}
