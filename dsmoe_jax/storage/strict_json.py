"""Strict parsing of small, untrusted JSON files. Start at `read_json`."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError

# Enough for 65 thousand tensors (a 145B's index has 24 thousand). Parsed JSON takes ten times its size in memory, which
# must stay small relative to the checkpoint.
MAX_JSON_BYTES: Final = 8_000_000
MAX_PARSED_BYTES: Final = 64_000_000
MAX_DEPTH: Final = 64  # repr and copy of the result need more stack than parsing
_MAX_DIGITS: Final = 40  # of an integer; 64 bits have 20, the largest float32 has 39


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `DSMoEError` if it is missing, too large, malformed or has duplicate keys."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never ends
            raise DSMoEError("is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise DSMoEError(f"has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES}")
        return parse_json(data)
    except FileNotFoundError:
        raise DSMoEError(f"{path.absolute()}: does not exist") from None
    except OSError as error:
        raise DSMoEError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DSMoEError(f"{path}: {error}") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8; error messages follow the file name."""
    if len(data) > MAX_JSON_BYTES:
        raise DSMoEError(f"has {len(data)} bytes of JSON; at most {MAX_JSON_BYTES}")
    try:
        text = data.decode("utf-8")
        # An upper bound: measured, a key takes < 250 bytes and any other value < 80. One emoji makes all characters of
        # `text` and its strings 4 bytes wide, which `getsizeof` includes.
        size = 2 * sys.getsizeof(text) + 250 * text.count(":") + 80 * (text.count(",") + text.count("["))
        if size > MAX_PARSED_BYTES:
            raise DSMoEError(f"has JSON that may take {size} bytes in memory; at most {MAX_PARSED_BYTES}")
        fields = json.loads(text, object_pairs_hook=_checked_object, parse_int=_integer, parse_float=_float)
    except RecursionError:
        raise DSMoEError("has JSON nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DSMoEError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DSMoEError(f"must be a JSON object, got {type(fields).__name__}")
    check_depth(fields)
    return fields


def check_depth(value: Any) -> None:
    """Raise `DSMoEError` for a value nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise DSMoEError(f"has JSON nested too deeply; at most {MAX_DEPTH} levels")


class _TooLarge(str):
    """Replaces a number that is too large; rejected with its key in the message."""


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise DSMoEError(f"has JSON key {key[:80]!r} twice")
        if (large := _too_large(value)) is not None:
            raise DSMoEError(f"has {large} for {key[:80]!r}")
        fields[key] = value
    return fields


def _too_large(value: Any) -> _TooLarge | None:
    if isinstance(value, list):
        return next((large for item in value if (large := _too_large(item)) is not None), None)
    return value if isinstance(value, _TooLarge) else None


def _float(literal: str) -> float | str:
    value = float(literal)
    return value if math.isfinite(value) else _TooLarge(f"{literal[:40]}, too large for a float,")


def _integer(digits: str) -> int | float | str:
    if len(digits) > _MAX_DIGITS:
        return _TooLarge(f"an integer of {len(digits)} digits (at most {_MAX_DIGITS})")
    return -0.0 if digits == "-0" else int(digits)  # no integer has that sign
