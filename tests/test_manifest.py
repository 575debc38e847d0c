"""Manifests of files: reading, verification, hash cache and older formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.manifest import (
    HashCache,
    check_files,
    check_listed_files,
    find_damage,
    hash_file,
    hash_tree,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "deep" / "b").write_bytes(b"second")
    write_manifest(tmp_path / "manifest.json", {"format": 1, "files": hash_tree(tmp_path), "step": 3})
    return tmp_path


def files(folder: Path) -> dict[str, Any]:
    return read_manifest(folder / "manifest.json", 1)["files"]


def test_an_intact_folder_passes(folder: Path):
    fields = read_manifest(folder / "manifest.json", 1)

    check_files(folder, fields["files"])

    assert fields["step"] == 3
    assert list(fields["files"]) == ["a", "deep/b"]
    assert fields["files"]["a"] == hash_file(folder / "a")


DAMAGE = {
    "missing": (lambda folder: (folder / "deep" / "b").unlink(), "'deep/b' is missing"),
    "truncated": (lambda folder: (folder / "deep" / "b").write_bytes(b"sec"), "'deep/b' has 3 bytes, expected 6"),
    "flipped": (lambda folder: (folder / "deep" / "b").write_bytes(b"secone"), "'deep/b' does not match its SHA-256"),
}


@pytest.mark.parametrize("cached", [False, True], ids=["read", "cached"])
@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(folder: Path, spoil: Callable[[Path], Any], message: str, cached: bool):
    listed = files(folder)
    cache = HashCache(folder / "cache.json") if cached else None
    if cache is not None:
        check_files(folder, listed, cache=cache)
    spoil(folder)

    with pytest.raises(DSMoEError) as caught:
        check_files(folder, listed, cache=cache)

    assert str(caught.value) == f"{folder}: damaged: {message}"


def test_without_verify_only_sizes_are_compared(folder: Path):
    listed = files(folder)
    (folder / "a").write_bytes(b"other")
    check_files(folder, listed, verify=False)
    (folder / "a").write_bytes(b"longer than it was")

    with pytest.raises(DSMoEError, match="'a' has 18 bytes, expected 5"):
        check_files(folder, listed, verify=False)


def test_processes_share_the_files(folder: Path):
    listed = files(folder)
    for name in listed:
        (folder / name).unlink()

    found = [[damage.file for damage in find_damage(folder, listed, share=(i, 2))] for i in range(2)]

    assert found == [["a"], ["deep/b"]]


@pytest.mark.parametrize("name", ["../a", "/etc/hostname", "deep"])
def test_paths_outside_the_folder_are_missing(folder: Path, name: str):
    (folder / "inner").mkdir()

    assert [damage.what for damage in find_damage(folder / "inner", {name: files(folder)["a"]})] == ["is missing"]


def test_a_prefix_has_a_hash_of_its_own(folder: Path):
    (folder / "a").write_bytes(b"fir")
    prefix = hash_file(folder / "a")
    (folder / "a").write_bytes(b"first")

    intact = {**hash_file(folder / "a"), "prefix": prefix}
    other = {**intact, "prefix": {**prefix, "sha256": "0" * 64}}

    assert not list(find_damage(folder, {"a": intact}))
    assert [str(damage) for damage in find_damage(folder, {"a": other})] == ["'a' does not match its SHA-256"]


def edited(**changes: Any) -> Callable[[dict], dict]:
    return lambda fields: {**fields, **changes}


BAD = {
    "another format": (edited(format=2), "manifest.json: format must be 1, got 2"),
    "an edited field": (edited(step=4), "damaged: 'manifest.json' does not match its SHA-256"),
    "no hash": (lambda fields: {k: v for k, v in fields.items() if k != "sha256"}, "'manifest.json' does not match"),
    "a list": (edited(files=[]), "'manifest.json' does not match"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_manifest_is_rejected(folder: Path, change: Callable[[dict], dict], message: str):
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))

    with pytest.raises(DSMoEError, match=message):
        read_manifest(path, 1)


@pytest.mark.parametrize("listed", [[], {"a": 3}, {"a": {"bytes": "5", "sha256": ""}}, {"a": {"bytes": 5}}])
def test_malformed_files_are_rejected(folder: Path, listed: Any):
    write_manifest(folder / "manifest.json", {"format": 1, "files": listed})

    with pytest.raises(DSMoEError, match=r"`files` must be an object|must have bytes and sha256"):
        read_manifest(folder / "manifest.json", 1)


def test_older_manifests_are_read(folder: Path):
    (folder / "manifest.json").write_text('{"format": 1, "facts": 7}')

    fields = read_manifest(folder / "manifest.json", 1, require_hash=False)

    assert fields["facts"] == 7


def test_listed_files_are_checked_where_there_is_a_manifest(folder: Path):
    (folder / "unlisted").write_bytes(b"x")
    (folder / "a").write_bytes(b"other")

    check_listed_files(folder, ["a"])
    check_listed_files(folder, ["deep/b", "unlisted"], "manifest.json")
    with pytest.raises(DSMoEError, match="'a' does not match"):
        check_listed_files(folder, ["a"], "manifest.json")
