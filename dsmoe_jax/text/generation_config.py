"""`generation_config.json`, which says where generation ends: EOS ids and stop strings. Other fields only travel."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.strict_json import read_json

GENERATION_CONFIG: Final = "generation_config.json"


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """Return the fields of the folder's file, none where there is no file.

    Raises:
      ValueError: The file is not JSON, or its `eos_token_id` or `stop_strings` is of another kind.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.is_file():
        return {}
    fields = read_json(path)
    try:
        eos_token_ids(fields)
        stop_strings(fields)
    except ValueError as error:
        raise DSMoEError(f"{path}: {error}") from None
    return fields


def eos_token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of `eos_token_id`, which names one, several or none."""
    value = fields.get("eos_token_id")
    tokens = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(type(token) is int for token in tokens):
        raise DSMoEError(f"eos_token_id must be an int or a list of ints, not {value!r:.80}")
    return tokens


def stop_strings(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the strings of `stop_strings`, which holds one, several or none."""
    value = fields.get("stop_strings")
    strings = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(string, str) and string for string in strings):
        raise DSMoEError(f"stop_strings must be a string or a list of strings, none of them empty, not {value!r:.80}")
    return strings


def with_default_eos(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return `fields` with the model config's `eos_token_id` where they name none."""
    return dict(fields) if eos_token_ids(fields) else {**fields, "eos_token_id": config.eos_token_id}


def merge_stop_conditions(fields: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fields` with the EOS ids and the stop strings of `more` added."""
    added = dict(fields)
    for name, read in (("eos_token_id", eos_token_ids), ("stop_strings", stop_strings)):
        values = list(dict.fromkeys((*read(fields), *read(more))))
        if len(values) > len(read(fields)):
            added.pop("_from_model_config", None)  # transformers would make another from config.json
            added[name] = values if len(values) > 1 or name == "stop_strings" else values[0]
    return added


@contextlib.contextmanager
def temporary_generation_config(fields: Mapping[str, Any]) -> Iterator[tuple[Path, ...]]:
    """A `generation_config.json` with these fields, to be copied within the context; none where there are no fields."""
    if not fields:
        yield ()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / GENERATION_CONFIG
        write_json(path, dict(fields))
        yield (path,)
