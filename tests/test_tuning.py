"""Tuned choices as data: whose file goes first, and what a file may not say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.kernels import grouped_matmul, pallas_matmul, tuning
from dsmoe_jax.kernels.expert_ffn import BACKENDS, LEGS, Legs

CARD = "a card"


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the environment name a file that holds this."""

    def write(**table: Any) -> Path:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(table))
        monkeypatch.setenv(tuning.VARIABLE, str(file))
        return file

    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    return write


def test_the_names_of_a_file_are_those_of_the_tables():
    *_, dtypes, rows, legs, backends = (known for _, known in tuning._PARTS["legs"])

    assert {(dtype, width) for _, dtype, width in LEGS} == {(a, b) for a in dtypes or () for b in rows or ()}
    assert legs == Legs._fields
    assert set(backends or ()) == set(BACKENDS)
    assert all(hasattr(grouped_matmul, name) for name in dict(tuning._PARTS["tiles"])["matmul"] or ())


@pytest.mark.usefixtures("tuned")
def test_the_packages_own_file_is_sound_and_a_card_not_in_it_is_left_to_the_tables():
    assert tuning.legs(CARD, "bfloat16", "many") == {}


def test_nothing_is_tuned_where_there_is_no_gpu():
    assert tuning.kind() is None
    assert tuning.tile("gmm") is None


def test_the_users_file_goes_before_the_packages_leg_by_leg(tuned: Any, monkeypatch: pytest.MonkeyPatch):
    def table(**legs: str) -> dict[str, Any]:
        return {"legs": {CARD: {"bfloat16": {"many": legs}}}}

    tuned(**table(forward="grouped"))
    monkeypatch.setattr(tuning, "parse_json", lambda data: table(forward="batched", weights="ragged"))
    tuning._tables.cache_clear()

    assert tuning.legs(CARD, "bfloat16", "many") == {"forward": "grouped", "weights": "ragged"}
    assert tuning.legs(CARD, "bfloat16", "few") == tuning.legs("another", "bfloat16", "many") == {}
    tuning._tables.cache_clear()


def test_a_tuned_tile_serves_many_rows_and_no_other_matmul(tuned: Any, monkeypatch: pytest.MonkeyPatch):
    tuned(tiles={CARD: {"gmm": [64, 64, 128, 4, 4]}})
    monkeypatch.setattr(tuning, "kind", lambda: CARD)

    assert pallas_matmul.tile_for(4096, 8) == pallas_matmul.Tile(64, 64, 128, 4, 4)
    assert pallas_matmul.tile_for(8, 8) == pallas_matmul._TILES[-1][1]
    assert pallas_matmul.tile_for(4096, 8, "gmm_transposed") == pallas_matmul._TILES[0][1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"leg": {}}, "key 'leg' does not exist, only note, legs, tiles"),
        ({"legs": []}, "legs: [] stands where an object must be"),
        ({"legs": {CARD: {"int4": {}}}}, "legs, a card: dtype 'int4' does not exist, only bfloat16, float32"),
        (
            {"legs": {CARD: {"bfloat16": {"all": {}}}}},
            "legs, a card, bfloat16: rows 'all' does not exist, only few, many",
        ),
        (
            {"legs": {CARD: {"bfloat16": {"few": {"back": "slots"}}}}},
            "legs, a card, bfloat16, few: leg 'back' does not exist, only forward, rows, weights",
        ),
        (
            {"legs": {CARD: {"bfloat16": {"few": {"rows": "cutlass"}}}}},
            "legs, a card, bfloat16, few, rows: backend 'cutlass' does not exist, only block_loop, batched",
        ),
        ({"tiles": {CARD: {"gmm": [1, 2]}}}, "tiles, a card, gmm: [1, 2] is not five positive integers"),
        ({"tiles": {CARD: {"dot": []}}}, "tiles, a card: matmul 'dot' does not exist, only gmm, gmm_transposed, tgmm"),
    ],
    ids=["key", "no object", "dtype", "rows", "leg", "backend", "tile", "matmul"],
)
def test_what_a_file_may_not_say_is_one_line_that_names_it(table: dict[str, Any], message: str, tuned: Any):
    file = tuned(**table)

    with pytest.raises(ValueError, match=re.escape(f"DSMOE_TUNING: {file}: {message}")) as raised:
        tuning.legs(CARD, "bfloat16", "few")

    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(tuning.VARIABLE, "nowhere.json")

    with pytest.raises(ValueError, match=r"nowhere\.json: does not exist"):
        tuning.legs(CARD, "bfloat16", "few")
