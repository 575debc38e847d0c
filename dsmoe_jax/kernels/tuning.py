"""Tuned backends of `expert_ffn` and tiles of the Pallas kernels per GPU. Start at `legs`.

`tuned.json` in this package, and the file in the environment variable DSMOE_TUNING, which takes precedence, contain

    {"legs": {KIND: {dtype: {"few" or "many": {leg: backend}}}}, "tiles": {KIND: {matmul: [five numbers of a `Tile`]}}}

where KIND is jax's `device_kind`, as in "NVIDIA H200", and "few" means at most one row per expert. Missing entries
default to the tables in the code. To tune a card: `python -m tests.benchmarks.gpu.tuning --into FILE`.
"""

import functools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.storage.strict_json import parse_json, read_json


class Legs(NamedTuple):
    """The backend of each leg of an operation: forward, gradient of the rows, gradient of the weights."""

    fwd: str
    dgrad: str
    wgrad: str


VARIABLE: Final = "DSMOE_TUNING"
_FILE: Final = "tuned.json"
# The schema of each part of a file: per level, what its keys (at the last level, its values) are and the allowed ones.
_PARTS: Final[dict[str, tuple[tuple[str, Sequence[str] | None], ...]]] = {
    "note": (("text", None),),
    "legs": (
        ("card", None),
        ("dtype", ("bfloat16", "float32")),
        ("rows", ("few", "many")),
        ("leg", Legs._fields),
        ("backend", ("block_loop", "batched", "grouped", "ragged", "dense")),
    ),
    "tiles": (("card", None), ("matmul", ("gmm", "gmm_transposed", "tgmm")), ("tile", None)),
}


def kind() -> str | None:
    """Return the device kind of the GPU; None without one."""
    return jax.local_devices()[0].device_kind if jax.default_backend() == "gpu" else None


def legs(card: str, dtype: str, rows: str) -> dict[str, str]:
    """Return the tuned backends by leg."""
    found: dict[str, str] = {}
    for table in _tables(os.environ.get(VARIABLE)):
        found |= table.get("legs", {}).get(card, {}).get(dtype, {}).get(rows, {})
    return found


def tile(matmul: str) -> list[int] | None:
    """Return the tuned `pallas_matmul.Tile` of this card for many rows, if any."""
    found = None
    for table in _tables(os.environ.get(VARIABLE)) if (card := kind()) else ():
        found = table.get("tiles", {}).get(card, {}).get(matmul, found)
    return found


def check_file() -> None:
    """Raise `DSMoEError` for an invalid file in the environment variable."""
    _tables(os.environ.get(VARIABLE))


@functools.cache
def _tables(user_file: str | None) -> list[dict[str, Any]]:
    """Read and validate the tables of the package and the user, in this order."""
    named = {_FILE: parse_json(resources.files("dsmoe_jax.kernels").joinpath(_FILE).read_bytes())}
    if user_file:
        try:
            named[f"{VARIABLE}: {user_file}"] = read_json(Path(user_file))
        except DSMoEError as error:
            raise DSMoEError(f"{VARIABLE}: {error}") from None
    for name, table in named.items():
        _check(name, table, (("key", tuple(_PARTS)), ("", None)))
        for part, value in table.items():
            _check(f"{name}: {part}", value, _PARTS[part])
        for card, tiles in table.get("tiles", {}).items():
            for matmul, numbers in tiles.items():
                valid = isinstance(numbers, list) and all(type(number) is int and number > 0 for number in numbers)
                if not valid or len(numbers) != 5:
                    raise DSMoEError(f"{name}: tiles, {card}, {matmul} must be five positive integers, got {numbers!r}")
    return list(named.values())


def _check(where: str, value: Any, levels: Sequence[tuple[str, Sequence[str] | None]]) -> None:
    """Raise for an unknown name."""
    (what, known), *deeper = levels
    if deeper and not isinstance(value, dict):
        raise DSMoEError(f"{where} must be an object, got {value!r}")
    for name in value if deeper else (value,):
        if known is not None:
            check_choice(f"{where}: {what}", name, known)
        if deeper:
            _check(f"{where}, {name}", value[name], deeper)
