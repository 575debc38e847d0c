"""Tuned backends and tiles: precedence of files, and invalid contents."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.kernels import grouped_matmul, pallas_matmul, tuning
from dsmoe_jax.kernels.expert_ffn import BACKENDS, LEGS

CARD = "a card"


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Point the environment variable to a file with this table."""

    def write(**table: Any) -> Path:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(table))
        monkeypatch.setenv(tuning.VARIABLE, str(file))
        return file

    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    return write


def test_a_file_uses_the_names_of_the_tables():
    *_, dtypes, rows, legs, backends = (known for _, known in tuning._PARTS["legs"])

    assert {dtype for _, dtype in LEGS} == set(dtypes or ())
    assert rows == ("few", "many")
    assert legs == tuning.Legs._fields
    assert set(backends or ()) == set(BACKENDS)
    assert all(hasattr(grouped_matmul, name) for name in dict(tuning._PARTS["tiles"])["matmul"] or ())


@pytest.mark.usefixtures("tuned")
def test_an_unknown_card_has_no_entry_in_the_packaged_file():
    assert tuning.legs(CARD, "bfloat16", "many") == {}


def test_without_a_gpu_nothing_is_tuned():
    assert tuning.kind() is None
    assert tuning.tile("gmm") is None


def test_the_users_file_overrides_the_packaged_one_by_leg(tuned: Any, monkeypatch: pytest.MonkeyPatch):
    def table(**legs: str) -> dict[str, Any]:
        return {"legs": {CARD: {"bfloat16": {"many": legs}}}}

    tuned(**table(fwd="grouped"))
    monkeypatch.setattr(tuning, "parse_json", lambda data: table(fwd="batched", wgrad="ragged"))
    tuning._tables.cache_clear()

    assert tuning.legs(CARD, "bfloat16", "many") == {"fwd": "grouped", "wgrad": "ragged"}
    assert tuning.legs(CARD, "bfloat16", "few") == tuning.legs("another", "bfloat16", "many") == {}
    tuning._tables.cache_clear()


def test_a_tuned_tile_applies_to_its_matmul_on_many_rows(tuned: Any, monkeypatch: pytest.MonkeyPatch):
    tuned(tiles={CARD: {"gmm": [64, 64, 128, 4, 4]}})
    monkeypatch.setattr(tuning, "kind", lambda: CARD)

    assert pallas_matmul.tile_for(4096, 8) == pallas_matmul.Tile(64, 64, 128, 4, 4)
    assert pallas_matmul.tile_for(8, 8) == pallas_matmul._TILES[-1][1]
    assert pallas_matmul.tile_for(4096, 8, "gmm_transposed") == pallas_matmul._TILES[0][1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"leg": {}}, "key must be one of note, legs, tiles, got 'leg'"),
        ({"legs": []}, "legs must be an object, got []"),
        ({"legs": {CARD: {"int4": {}}}}, "legs, a card: dtype must be one of bfloat16, float32, got 'int4'"),
        (
            {"legs": {CARD: {"bfloat16": {"all": {}}}}},
            "legs, a card, bfloat16: rows must be one of few, many, got 'all'",
        ),
        (
            {"legs": {CARD: {"bfloat16": {"few": {"forward": "batched"}}}}},
            "legs, a card, bfloat16, few: leg must be one of fwd, dgrad, wgrad, got 'forward'",
        ),
        (
            {"legs": {CARD: {"bfloat16": {"few": {"dgrad": "slots"}}}}},
            "legs, a card, bfloat16, few, dgrad: backend must be one of block_loop, batched, grouped, ragged, dense",
        ),
        ({"tiles": {CARD: {"gmm": [1, 2]}}}, "tiles, a card, gmm must be five positive integers, got [1, 2]"),
        ({"tiles": {CARD: {"dot": []}}}, "tiles, a card: matmul must be one of gmm, gmm_transposed, tgmm, got 'dot'"),
    ],
    ids=["key", "no object", "dtype", "rows", "old leg", "old backend", "tile", "matmul"],
)
def test_an_invalid_file_is_rejected_in_one_line(table: dict[str, Any], message: str, tuned: Any):
    file = tuned(**table)

    with pytest.raises(ValueError, match=re.escape(f"DSMOE_TUNING: {file}: {message}")) as raised:
        tuning.legs(CARD, "bfloat16", "few")

    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(tuning.VARIABLE, "nowhere.json")

    with pytest.raises(ValueError, match=r"nowhere\.json: does not exist"):
        tuning.legs(CARD, "bfloat16", "few")
