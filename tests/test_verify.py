"""`verify` on a native checkpoint: every flipped bit is reported with its file and tensor."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsmoe_jax
from dsmoe_jax.checkpoint.manifest import read_manifest
from dsmoe_jax.convert import export_hf, import_hf, verify
from dsmoe_jax.info import describe
from dsmoe_jax.storage.manifest import MODEL_MANIFEST
from tests.helpers import native_checkpoint
from tests.helpers.hf_folder import VARIANTS, edit, flip_bit, random_params, snapshot, stored, tiny
from tests.helpers.native_checkpoint import DATA, EXTRA_FILES, ORBAX, STATE, found, make

pytestmark = pytest.mark.heavy

made, native = native_checkpoint.made, native_checkpoint.native


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_intact_checkpoint_has_no_mismatch(tmp_path: Path, changes: dict):
    native = make(tmp_path, **changes)
    before = snapshot(tmp_path)

    alone, against = verify(native), verify(native, tmp_path / "hf")

    assert (alone.mismatches, against.mismatches) == ([], [])
    assert "all checksums match" in str(alone)
    assert f"bitwise equal to {tmp_path / 'hf'}" in str(against)
    assert snapshot(tmp_path) == before


def test_report_has_all_tensors_and_files(made: Path):
    report = verify(made).to_dict()

    manifest = read_manifest(made)
    assert json.loads(json.dumps(report)) == report
    assert report["source"] == str(made)
    assert report["other"] is None
    assert report["hashes"] == {name: tensor["sha256"] for name, tensor in manifest.tensors.items()}
    assert report["tensors"] == len(manifest.tensors)
    on_disk = [path for path in made.rglob("*") if path.is_file() and path.name != MODEL_MANIFEST]
    assert report["bytes"] == sum(path.stat().st_size for path in on_disk)
    assert report["seconds"] > 0


def test_comparison_report_has_the_sha256_of_hf_tensors(made: Path):
    report = verify(made, made.parent / "hf").to_dict()

    tensors = stored(made.parent / "hf")
    assert report["other"] == str(made.parent / "hf")
    assert report["hashes"] == {name: hashlib.sha256(one.data).hexdigest() for name, one in tensors.items()}
    assert report["tensors"] == len(tensors) == 46
    assert report["bytes"] == sum(len(tensor.data) for tensor in tensors.values())


def test_manifest_has_the_sha256_of_files_and_tensors(made: Path):
    manifest = read_manifest(made)

    files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
    assert manifest.files.keys() | {MODEL_MANIFEST} == files.keys()
    for name, sums in manifest.files.items():
        data = files[name].read_bytes()
        assert sums == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    params = random_params(tiny())
    sums = {name: tensor["sha256"] for name, tensor in manifest.tensors.items()}
    assert sums == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in params.items()}


def tensor_in(name: str) -> str | None:
    """Return the tensor of a file in the checkpoint."""
    parts = name.split("/")
    return parts[2] if name.startswith(f"{STATE}/") and len(parts) > 3 else None


@pytest.mark.parametrize("at", ["start", pytest.param("middle", marks=pytest.mark.slow), "end"])
def test_flipped_bit_is_reported_with_file_and_tensor(native: Path, at: str):
    files = [
        path for path in native.rglob("*") if path.is_file() and path.name != MODEL_MANIFEST and path.stat().st_size
    ]
    assert {*ORBAX, "config.json", *EXTRA_FILES} <= {path.relative_to(native).as_posix() for path in files}
    rng = random.Random(at)
    missed = []

    for path in files:
        original, name = path.read_bytes(), path.relative_to(native).as_posix()
        flip_bit(path, {"start": 0, "middle": len(original) // 2, "end": -1}[at], rng.randrange(8))
        if found(verify(native)) != [(name, tensor_in(name))]:
            missed.append(name)
        path.write_bytes(original)

    assert missed == []
    assert verify(native).mismatches == []


def test_flipped_bit_in_the_manifest_is_detected(native: Path):
    original = (native / MODEL_MANIFEST).read_bytes()
    rng = random.Random(0)
    counts = {"reported": 0, "rejected": 0}

    for _ in range(400):
        at, bit = rng.randrange(len(original)), rng.randrange(8)
        flip_bit(native / MODEL_MANIFEST, at, bit)
        error = read_error(native)
        if error is None:
            assert not read_manifest(native, verify=False).intact, (at, bit)
        else:
            assert "\n" not in error
            assert str(native) in error
        counts["reported" if error is None else "rejected"] += 1
        (native / MODEL_MANIFEST).write_bytes(original)

    assert min(counts.values()) > 50


@pytest.mark.parametrize("file", ["config.json", *EXTRA_FILES, MODEL_MANIFEST])
def test_damaged_checkpoint_cannot_be_opened(native: Path, tmp_path: Path, file: str):
    flip_bit(native / file, (native / file).read_bytes().index(b"}") - 1)  # usually still JSON

    for open_checkpoint in (
        dsmoe_jax.load,
        dsmoe_jax.Generator.from_pretrained,
        lambda folder: dsmoe_jax.load(folder, quantize="int8"),
        lambda folder: export_hf(folder, tmp_path / "out"),
        lambda folder: import_hf(folder, tmp_path / "out"),
        read_manifest,
    ):
        with pytest.raises(ValueError, match=r": damaged: |is not JSON|is already a native checkpoint") as caught:
            open_checkpoint(native)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "open_checkpoint"),
    [("tokenizer.json", dsmoe_jax.Tokenizer.from_pretrained), ("config.json", lambda folder: describe(str(folder)))],
    ids=["tokenizer", "info"],
)
def test_opening_a_single_file_checks_it(native: Path, file: str, open_checkpoint: Callable[[Path], Any]):
    (native / file).write_bytes((native / file).read_bytes() + b" ")

    with pytest.raises(ValueError, match=rf"native: damaged: '{file}' has \d+ bytes, expected \d+"):
        open_checkpoint(native)


def test_unexpected_file_is_logged(native: Path, caplog: pytest.LogCaptureFixture):
    (native / "README.md").write_text("mine")
    (native / "chat_template.jinja").write_text("{{ messages }}")

    read_manifest(native)

    assert [record.message for record in caplog.records] == [
        f"{native}: chat_template.jinja is not in the manifest; using it unchecked"
    ]


def test_same_weights_have_the_same_manifest(tmp_path: Path, made: Path):
    shutil.copytree(made.parent / "hf", tmp_path / "elsewhere")

    again = import_hf(tmp_path / "elsewhere", tmp_path / "again").path

    assert snapshot(again) == snapshot(made)


def test_identity_depends_on_the_model_only(tmp_path: Path, made: Path):
    hf = Path(shutil.copytree(made.parent / "hf", tmp_path / "hf"))
    (hf / "tokenizer_config.json").write_text("{   }")
    other = import_hf(hf, tmp_path / "tokenizer").path
    edit("config.json", lambda fields: fields.update(rope_theta=20000.0))(hf)
    changed = import_hf(hf, tmp_path / "rope").path

    assert read_manifest(other).sha256 != read_manifest(made).sha256
    assert read_manifest(other).identity == read_manifest(made).identity
    assert read_manifest(changed).identity != read_manifest(made).identity


def read_error(native: Path) -> str | None:
    """Return why a manifest cannot be read."""
    try:
        read_manifest(native, verify=False)
    except ValueError as error:
        return str(error)
    return None


def add_file(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("add_file")

    return damage


# damage | mismatches: file, tensor | text of the first
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str | None]], str]] = {
    "a tensor's file gone": (lambda native: (native / DATA).unlink(), [(DATA, "embed")], "is missing"),
    "a tensor's folder gone": (
        lambda native: shutil.rmtree(native / STATE / "embed"),
        [(DATA, "embed"), (f"{STATE}/embed/zarr.json", "embed")],
        "is missing",
    ),
    "a tensor's file cut short": (
        lambda native: os.truncate(native / DATA, 100), [(DATA, "embed")], "has 100 bytes, expected 8208"
    ),
    "a tensor's file longer": (
        lambda native: os.truncate(native / DATA, 8209), [(DATA, "embed")], "has 8209 bytes, expected 8208"
    ),
    "the index behind a tensor": (lambda native: flip_bit(native / DATA, -16), [(DATA, "embed")], "does not match"),
    "a folder in a file's place": (
        lambda native: ((native / DATA).unlink(), (native / DATA).mkdir()), [(DATA, "embed")], "is missing"
    ),
    "Orbax's metadata gone": (lambda native: (native / ORBAX[0]).unlink(), [(ORBAX[0], None)], "is missing"),
    "the config gone": (lambda native: (native / "config.json").unlink(), [("config.json", None)], "is missing"),
    "the tokenizer empty": (
        lambda native: os.truncate(native / "tokenizer.json", 0), [("tokenizer.json", None)], "has 0 bytes, expected 2"
    ),
    "a file more below a tensor": (
        add_file(f"{STATE}/embed/c/0/1"), [(f"{STATE}/embed/c/0/1", "embed")], "is not in the manifest"
    ),
    "a tensor more": (
        add_file(f"{STATE}/more/zarr.json"), [(f"{STATE}/more/zarr.json", None)], "is not in the manifest"
    ),
    "a hidden file more": (add_file("parameters/.x"), [("parameters/.x", None)], "is not in the manifest"),
    "the manifest edited": (
        edit(MODEL_MANIFEST, lambda fields: fields.update(source={"repository": "a/b"})),
        [(MODEL_MANIFEST, None)],
        "does not match",
    ),
    "a manifest without its SHA-256": (
        edit(MODEL_MANIFEST, lambda fields: fields.pop("sha256")), [(MODEL_MANIFEST, None)], "does not match"
    ),
    "bytes and their file's sum changed together": (
        lambda native: (
            flip_bit(native / DATA, 0),
            edit(MODEL_MANIFEST, lambda fields: fields["files"][DATA].update(
                sha256=hashlib.sha256((native / DATA).read_bytes()).hexdigest()
            ))(native),
        ),
        [(MODEL_MANIFEST, None), (DATA, "embed")],
        "does not match",
    ),
    "two files": (
        lambda native: (flip_bit(native / "config.json", 0), flip_bit(native / DATA, 0)),
        [("config.json", None), (DATA, "embed")],
        "does not match",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "mismatches", "text"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("against", [False, True], ids=["alone", "against its source"])
def test_damage_is_reported_and_nothing_is_changed(
    native: Path, damage: Callable[[Path], Any], mismatches: list, text: str, against: bool
):
    damage(native)
    before = snapshot(native.parent)

    report = verify(native, native.parent / "hf" if against else None)

    assert sorted(found(report), key=str) == sorted(mismatches, key=str)
    assert text in report.mismatches[0]["what"]
    assert f"{len(mismatches)} mismatch" in str(report)
    assert snapshot(native.parent) == before


def test_manifest_formatting_is_no_damage(native: Path):
    edit(MODEL_MANIFEST, lambda fields: fields.update(dict(reversed(fields.items()))))(native)

    report = verify(native)

    assert report.mismatches == []
