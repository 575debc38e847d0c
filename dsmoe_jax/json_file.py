"""Small JSON files from a place that is not trusted."""

import json
from pathlib import Path
from typing import Any, Final

_MAX_BYTES: Final = 64 << 20  # the largest real one, a 145B's tensor index, has a few MB


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` where there is none, or one that names a key twice."""
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"has {size} bytes, at most {_MAX_BYTES} are read")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in some UTF-8 JSON; `ValueError` as in `read_json`, worded to follow the name of the file."""
    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("has JSON nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"holds a {type(fields).__name__} where a JSON object must be")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"has JSON key {key[:80]!r} twice")
        fields[key] = value
    return fields
