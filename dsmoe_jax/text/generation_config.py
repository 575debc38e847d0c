"""Read and merge the EOS ids and stop strings of `generation_config.json`; other fields are copied unchanged."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.special_ids import as_tuple, token_ids

GENERATION_CONFIG: Final = "generation_config.json"


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Return the validated fields of the folder's `generation_config.json`, or {} without one."""
    path = Path(folder) / GENERATION_CONFIG
    if not path.is_file():
        return {}
    fields = read_json(path)
    try:
        eos_token_ids(fields)
        stop_strings(fields)
    except DSMoEError as error:
        raise DSMoEError(f"{path}: {error}") from None
    return fields


def eos_token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids in `eos_token_id`: none, one or several."""
    return token_ids("eos_token_id", fields.get("eos_token_id"))


def stop_strings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the strings in `stop_strings`: none, one or several."""
    strings = as_tuple(value := fields.get("stop_strings"))
    if not all(isinstance(string, str) and string for string in strings):
        raise DSMoEError(f"stop_strings must be a non-empty string or a list of them, got {value!r:.80}")
    return strings


def with_default_eos(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return `fields`, with the model config's `eos_token_id` if they have none."""
    return dict(fields) if eos_token_ids(fields) else {**fields, "eos_token_id": config.eos_token_id}


def merge_stop_conditions(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with the EOS ids and stop strings of `others` added."""
    merged = dict(fields)
    for name, read in (("eos_token_id", eos_token_ids), ("stop_strings", stop_strings)):
        values = list(dict.fromkeys((*read(fields), *read(others))))
        if len(values) > len(read(fields)):
            merged.pop("_from_model_config", None)  # with it transformers rebuilds the file from config.json
            merged[name] = values if len(values) > 1 or name == "stop_strings" else values[0]
    return merged


@contextlib.contextmanager
def temporary_generation_config(fields: Mapping[str, Any]) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary `generation_config.json` with these fields, or () if there are none."""
    if not fields:
        yield ()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / GENERATION_CONFIG
        write_json(path, dict(fields))
        yield (path,)
