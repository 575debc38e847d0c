"""What was measured on a card, as data: the backend of each leg of `expert_ffn`, the tiles of our own kernels.

Start at `legs`. The data is `tuned.json` beside this file; the file that the environment variable DSMOE_TUNING names
goes before it, leg by leg. Both hold

    {"legs": {KIND: {dtype: {"few" or "many": {leg: backend}}}}, "tiles": {KIND: {matmul: [five numbers of a `Tile`]}}}

where KIND is what jax calls the card (`device_kind`, as in "NVIDIA H200"), and the other keys are those of
`expert_ffn.LEGS` and `grouped_matmul`. What neither holds is left to the tables in the code. To measure a card:
`python -m tests.benchmarks.gpu.tuning --into FILE`.
"""

import functools
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jax

from dsmoe_jax.storage.strict_json import parse_json, read_json

VARIABLE: Final = "DSMOE_TUNING"
_FILE: Final = "tuned.json"
# What each part of a file holds, level by level: what its keys are and which there are, at last its values; None: any.
_PARTS: Final[dict[str, tuple[tuple[str, Sequence[str] | None], ...]]] = {
    "note": (("text", None),),
    "legs": (
        ("card", None),
        ("dtype", ("bfloat16", "float32")),
        ("rows", ("few", "many")),
        ("leg", ("forward", "rows", "weights")),
        ("backend", ("block_loop", "batched", "grouped", "ragged", "slots", "dense")),
    ),
    "tiles": (("card", None), ("matmul", ("gmm", "gmm_transposed", "tgmm")), ("tile", None)),
}


def kind() -> str | None:
    """What jax calls this process's GPU; None where there is none, as nothing else is tuned."""
    return jax.local_devices()[0].device_kind if jax.default_backend() == "gpu" else None


def legs(card: str, dtype: str, rows: str) -> dict[str, str]:
    """The backend of each leg that is tuned. Raises `ValueError` for a file that names what does not exist."""
    found: dict[str, str] = {}
    for table in _tables(os.environ.get(VARIABLE)):
        found |= table.get("legs", {}).get(card, {}).get(dtype, {}).get(rows, {})
    return found


def tile(matmul: str) -> list[int] | None:
    """The five numbers of this card's `pallas_matmul.Tile` for many rows, if it is tuned. Raises as `legs` does."""
    found = None
    for table in _tables(os.environ.get(VARIABLE)) if (card := kind()) else ():
        found = table.get("tiles", {}).get(card, {}).get(matmul, found)
    return found


@functools.cache
def _tables(own: str | None) -> list[dict[str, Any]]:
    """The package's, then the user's own, both looked through."""
    named = {_FILE: parse_json(resources.files("dsmoe_jax.kernels").joinpath(_FILE).read_bytes())}
    named |= {f"{VARIABLE}: {own}": read_json(Path(own))} if own else {}
    for name, table in named.items():
        _check(name, table, (("key", tuple(_PARTS)), ("", None)))
        for part, held in table.items():
            _check(f"{name}: {part}", held, _PARTS[part])
        for card, tiles in table.get("tiles", {}).items():
            for matmul, numbers in tiles.items():
                if not _is_tile(numbers):
                    raise ValueError(f"{name}: tiles, {card}, {matmul}: {numbers!r} is not five positive integers")
    return list(named.values())


def _check(where: str, held: Any, levels: Sequence[tuple[str, Sequence[str] | None]]) -> None:
    """`ValueError` for a name that its level does not have."""
    (what, known), *deeper = levels
    if deeper and not isinstance(held, dict):
        raise ValueError(f"{where}: {held!r} stands where an object must be")
    for name in held if deeper else (held,):
        if known is not None and name not in known:
            raise ValueError(f"{where}: {what} {name!r} does not exist, only {', '.join(known)}")
        if deeper:
            _check(f"{where}, {name}", held[name], deeper)


def _is_tile(numbers: Any) -> bool:
    return isinstance(numbers, list) and len(numbers) == 5 and all(type(one) is int and one > 0 for one in numbers)
