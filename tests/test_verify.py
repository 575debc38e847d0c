"""`verify`: whatever bit is turned, wherever it lies, the report names its file, and its tensor if it lies in one.

Start at `test_a_flipped_bit_in_any_file_is_reported_with_the_file_and_the_tensor`.
"""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dsmoe_jax
from dsmoe_jax.checkpoint.manifest import MODEL_MANIFEST, manifest_damage, read_manifest
from dsmoe_jax.cli import main
from dsmoe_jax.convert import VerificationReport, export_hf, import_hf, verify
from dsmoe_jax.info import describe
from dsmoe_jax.quantize import load_quantized
from dsmoe_jax.storage.locks import lock_name
from tests.helpers.hf_folder import (
    VARIANTS,
    edit,
    flip_bit,
    hf_tensors,
    random_params,
    snapshot,
    stored,
    tiny,
    write_hf,
    write_tensors,
)

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
STATE = "parameters/state"
ORBAX = [f"{STATE}/_METADATA", "parameters/_CHECKPOINT_METADATA"]
BESIDE = {"generation_config.json": b'{"eos_token_id": 1}', "tokenizer.json": b"{}", "tokenizer_config.json": b"{ }"}


def make(work: Path, **changes: Any) -> Path:
    """A native checkpoint `native` with all there may be beside the parameters; its source is `hf` beside it."""
    source = write_hf(work / "hf", tiny(**changes), random_params(tiny(**changes)), shards=2)
    for name, data in BESIDE.items():
        (source / name).write_bytes(data)
    return import_hf(source, work / "native").path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its source to look at, not to change."""
    return make(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def native(tmp_path: Path, made: Path) -> Path:
    """The same to spoil."""
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "native"


def found(report: VerificationReport) -> list[tuple[str, str | None]]:
    return [(one["file"], one["tensor"]) for one in report.mismatches]


# Nothing wrong


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_an_untouched_checkpoint_has_no_mismatch_alone_or_against_its_source(tmp_path: Path, changes: dict):
    native = make(tmp_path, **changes)
    before = snapshot(tmp_path)

    alone, against = verify(native), verify(native, tmp_path / "hf")

    assert (alone.mismatches, against.mismatches) == ([], [])
    assert "all bits as they were written" in str(alone)
    assert f"bit for bit those of {tmp_path / 'hf'}" in str(against)
    assert snapshot(tmp_path) == before


def test_the_report_alone_has_our_tensors_and_all_files(made: Path):
    report = verify(made).to_dict()

    manifest = read_manifest(made)
    assert json.loads(json.dumps(report)) == report
    assert report["native"] == str(made)
    assert report["hf"] is None
    assert report["hashes"] == {name: tensor["sha256"] for name, tensor in manifest.tensors.items()}
    assert report["tensors"] == len(manifest.tensors)
    on_disk = [path for path in made.rglob("*") if path.is_file() and path.name != MODEL_MANIFEST]
    assert report["bytes"] == sum(path.stat().st_size for path in on_disk)
    assert report["seconds"] > 0


def test_the_report_against_a_folder_has_its_tensors_with_the_sha256_of_their_bytes(made: Path):
    report = verify(made, made.parent / "hf").to_dict()

    tensors = stored(made.parent / "hf")
    assert report["hf"] == str(made.parent / "hf")
    assert report["hashes"] == {name: hashlib.sha256(one.data).hexdigest() for name, one in tensors.items()}
    assert report["tensors"] == len(tensors) == 46
    assert report["bytes"] == sum(len(tensor.data) for tensor in tensors.values())


def test_the_manifest_has_the_sha256_of_every_file_and_of_every_tensor(made: Path):
    manifest = read_manifest(made)

    files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
    assert manifest.files.keys() | {MODEL_MANIFEST} == files.keys()
    for name, sums in manifest.files.items():
        data = files[name].read_bytes()
        assert sums == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    params = random_params(tiny())
    sums = {name: tensor["sha256"] for name, tensor in manifest.tensors.items()}
    assert sums == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in params.items()}


# The native checkpoint damaged


def tensor_in(name: str) -> str | None:
    """The tensor that a file of the checkpoint holds or describes."""
    parts = name.split("/")
    return parts[2] if name.startswith(f"{STATE}/") and len(parts) > 3 else None


@pytest.mark.parametrize("at", ["start", "middle", "end"])
def test_a_flipped_bit_in_any_file_is_reported_with_the_file_and_the_tensor(native: Path, at: str):
    files = [
        path for path in native.rglob("*") if path.is_file() and path.name != MODEL_MANIFEST and path.stat().st_size
    ]
    assert {*ORBAX, "config.json", *BESIDE} <= {path.relative_to(native).as_posix() for path in files}
    chance = random.Random(at)
    missed = []

    for path in files:
        whole, name = path.read_bytes(), path.relative_to(native).as_posix()
        flip_bit(path, {"start": 0, "middle": len(whole) // 2, "end": -1}[at], chance.randrange(8))
        if found(verify(native)) != [(name, tensor_in(name))]:
            missed.append(name)
        path.write_bytes(whole)

    assert missed == []
    assert verify(native).mismatches == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_reported_or_refused(native: Path):
    whole = (native / MODEL_MANIFEST).read_bytes()
    chance = random.Random(0)
    seen = {"reported": 0, "refused": 0}

    for _ in range(400):
        at, bit = chance.randrange(len(whole)), chance.randrange(8)
        flip_bit(native / MODEL_MANIFEST, at, bit)
        refused = refusal(native)
        if refused is None:
            assert [one.file for one in manifest_damage(native)] == [MODEL_MANIFEST], (at, bit)
        else:
            assert "\n" not in refused
            assert str(native) in refused
        seen["reported" if refused is None else "refused"] += 1
        (native / MODEL_MANIFEST).write_bytes(whole)

    assert min(seen.values()) > 50


@pytest.mark.parametrize("file", ["config.json", *BESIDE, MODEL_MANIFEST])
def test_whoever_opens_a_damaged_checkpoint_is_refused(native: Path, tmp_path: Path, file: str):
    flip_bit(native / file, (native / file).read_bytes().index(b"}") - 1)  # mostly still JSON

    for open_it in (
        dsmoe_jax.load,
        dsmoe_jax.Generator.from_pretrained,
        lambda folder: load_quantized(folder, "int8"),
        lambda folder: export_hf(folder, tmp_path / "out"),
        lambda folder: import_hf(folder, tmp_path / "out"),
        read_manifest,
    ):
        with pytest.raises(
            ValueError, match=r"damaged checkpoint|is not JSON|is a native checkpoint already"
        ) as refused:
            open_it(native)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "open_it"),
    [("tokenizer.json", dsmoe_jax.Tokenizer.from_pretrained), ("config.json", lambda folder: describe(str(folder)))],
    ids=["tokenizer", "info"],
)
def test_those_who_open_one_file_alone_check_it(native: Path, file: str, open_it: Callable[[Path], Any]):
    (native / file).write_bytes((native / file).read_bytes() + b" ")

    with pytest.raises(ValueError, match=rf"native: damaged checkpoint: '{file}' has \d+ bytes, not \d+"):
        open_it(native)


def test_a_file_added_later_is_named_in_the_log(native: Path, caplog: pytest.LogCaptureFixture):
    (native / "README.md").write_text("mine")
    (native / "chat_template.jinja").write_text("{{ messages }}")

    read_manifest(native)

    assert [record.message for record in caplog.records] == [
        f"{native}: chat_template.jinja is not in the manifest: it was added later, and is used unchecked"
    ]


def test_the_same_weights_have_the_same_manifest(tmp_path: Path, made: Path):
    shutil.copytree(made.parent / "hf", tmp_path / "elsewhere")

    again = import_hf(tmp_path / "elsewhere", tmp_path / "again").path

    assert snapshot(again) == snapshot(made)


def test_the_identity_is_that_of_the_model_alone(tmp_path: Path, made: Path):
    hf = Path(shutil.copytree(made.parent / "hf", tmp_path / "hf"))
    (hf / "tokenizer_config.json").write_text("{   }")
    other = import_hf(hf, tmp_path / "tokenizer").path
    edit("config.json", lambda fields: fields.update(rope_theta=20000.0))(hf)
    changed = import_hf(hf, tmp_path / "rope").path

    assert read_manifest(other).sha256 != read_manifest(made).sha256
    assert read_manifest(other).identity == read_manifest(made).identity
    assert read_manifest(changed).identity != read_manifest(made).identity


def refusal(native: Path) -> str | None:
    """Why a manifest cannot be read."""
    try:
        read_manifest(native, verify=False)
    except ValueError as error:
        return str(error)
    return None


def foreign(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("foreign")

    return spoil


DATA = f"{STATE}/embed/c/0/0"
# what is done to the checkpoint | the mismatches: file, tensor | what is said of the first
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str | None]], str]] = {
    "a tensor's file gone": (lambda native: (native / DATA).unlink(), [(DATA, "embed")], "is missing"),
    "a tensor's folder gone": (
        lambda native: shutil.rmtree(native / STATE / "embed"),
        [(DATA, "embed"), (f"{STATE}/embed/zarr.json", "embed")],
        "is missing",
    ),
    "a tensor's file cut short": (
        lambda native: os.truncate(native / DATA, 100), [(DATA, "embed")], "has 100 bytes, not 8208"
    ),
    "a tensor's file longer": (
        lambda native: os.truncate(native / DATA, 8209), [(DATA, "embed")], "has 8209 bytes, not 8208"
    ),
    "the index behind a tensor": (lambda native: flip_bit(native / DATA, -16), [(DATA, "embed")], "other bytes"),
    "a folder in a file's place": (
        lambda native: ((native / DATA).unlink(), (native / DATA).mkdir()), [(DATA, "embed")], "is missing"
    ),
    "Orbax's metadata gone": (lambda native: (native / ORBAX[0]).unlink(), [(ORBAX[0], None)], "is missing"),
    "the config gone": (lambda native: (native / "config.json").unlink(), [("config.json", None)], "is missing"),
    "the tokenizer empty": (
        lambda native: os.truncate(native / "tokenizer.json", 0), [("tokenizer.json", None)], "has 0 bytes, not 2"
    ),
    "a file more below a tensor": (
        foreign(f"{STATE}/embed/c/0/1"), [(f"{STATE}/embed/c/0/1", "embed")], "is not in the manifest"
    ),
    "a tensor more": (
        foreign(f"{STATE}/more/zarr.json"), [(f"{STATE}/more/zarr.json", None)], "is not in the manifest"
    ),
    "a hidden file more": (foreign("parameters/.x"), [("parameters/.x", None)], "is not in the manifest"),
    "the manifest edited": (
        edit(MODEL_MANIFEST, lambda fields: fields.update(source={"repository": "a/b"})),
        [(MODEL_MANIFEST, None)],
        "has been changed",
    ),
    "a manifest without its own sum": (
        edit(MODEL_MANIFEST, lambda fields: fields.pop("sha256")), [(MODEL_MANIFEST, None)], "has been changed"
    ),
    "bytes and their file's sum changed together": (
        lambda native: (
            flip_bit(native / DATA, 0),
            edit(MODEL_MANIFEST, lambda fields: fields["files"][DATA].update(
                sha256=hashlib.sha256((native / DATA).read_bytes()).hexdigest()
            ))(native),
        ),
        [(MODEL_MANIFEST, None), (DATA, "embed")],
        "has been changed",
    ),
    "two files": (
        lambda native: (flip_bit(native / "config.json", 0), flip_bit(native / DATA, 0)),
        [("config.json", None), (DATA, "embed")],
        "other bytes than were written",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "wrong", "said"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("against", [False, True], ids=["alone", "against its source"])
def test_damage_is_reported_and_nothing_is_changed(
    native: Path, spoil: Callable[[Path], Any], wrong: list, said: str, against: bool
):
    spoil(native)
    before = snapshot(native.parent)

    report = verify(native, native.parent / "hf" if against else None)

    assert sorted(found(report), key=str) == sorted(wrong, key=str)
    assert said in report.mismatches[0]["what"]
    assert f"{len(wrong)} mismatches" in str(report)
    assert snapshot(native.parent) == before


def test_space_and_order_in_the_manifest_are_no_damage(native: Path):
    edit(MODEL_MANIFEST, lambda fields: fields.update(dict(reversed(fields.items()))))(native)

    report = verify(native)

    assert report.mismatches == []


# Against another folder


def rewritten(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """The folder with its tensors changed, in one file."""

    def spoil(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        tensors = hf_tensors(tiny(), {name: array.copy() for name, array in random_params(tiny()).items()})
        change(tensors)
        write_tensors(folder, tensors)

    return spoil


def test_one_flipped_bit_in_a_shard_is_found_with_its_tensor_and_counted(native: Path):
    hf = native.parent / "hf"
    shard = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"][EXPERT]
    content = (hf / shard).read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + length])[EXPERT]["data_offsets"][0]
    flip_bit(hf / shard, 8 + length + begin + 4 * 77, 5)

    report = verify(native, hf)

    assert report.mismatches == [{"file": shard, "tensor": EXPERT, "what": "differs in 1 of 512 values"}]
    assert report.hashes[EXPERT] == hashlib.sha256(stored(hf)[EXPERT].data).hexdigest()
    assert (
        report.hashes[EXPERT]
        != hashlib.sha256(stored(export_hf(native, hf.parent / "x").path)[EXPERT].data).hexdigest()
    )
    assert verify(native).mismatches == []


def set_values(tensors: dict[str, np.ndarray], value: float) -> None:
    tensors[EXPERT][2:4, 5:8] = value


ONE_FILE = "model.safetensors"
# what is done to the Hugging Face folder | file, tensor and the end of what is said, of each mismatch
OTHERWISE: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str | None, str]]]] = {
    "some values": (
        rewritten(lambda tensors: set_values(tensors, 1.0)), [(ONE_FILE, EXPERT, "differs in 6 of 512 values")]
    ),
    "two tensors": (
        rewritten(lambda t: (set_values(t, np.nan), t["model.norm.weight"].__setitem__(0, 9))),
        [
            (ONE_FILE, EXPERT, "differs in 6 of 512 values"),
            (ONE_FILE, "model.norm.weight", "differs in 1 of 32 values"),
        ],
    ),
    "a dtype": (
        rewritten(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(ml_dtypes.bfloat16)})),
        [(ONE_FILE, "model.norm.weight", "is bfloat16, float32 in {native}")],
    ),
    "the same otherwise stored": (rewritten(lambda tensors: None), []),
    "rope_theta": (
        edit("config.json", lambda fields: fields.update(rope_theta=500.0)),
        [("config.json", None, "has rope_theta 10000.0, {hf} 500.0")],
    ),
    "a field of its own": (
        edit("config.json", lambda fields: fields.pop("rms_norm_eps") and fields.update(rms_norm_eps=1e-5)),
        [("config.json", None, "has rms_norm_eps 1e-06, {hf} 1e-05")],
    ),
    "what says nothing of the model": (
        edit("config.json", lambda c: c.update(torch_dtype="float16", transformers_version="4", use_cache=False)),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "wrong"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_difference_from_a_folder_is_reported(native: Path, spoil: Callable[[Path], Any], wrong: list):
    hf = native.parent / "hf"
    spoil(hf)

    report = verify(native, hf)

    assert [tuple(one.values()) for one in report.mismatches] == [
        (file, tensor, what.format(native=native, hf=hf)) for file, tensor, what in wrong
    ]


def test_an_export_with_other_special_ids_is_the_same_model(tmp_path: Path):
    model = tiny(pad_token_id=tiny().vocab_size, extra={"note": math.nan})
    import_hf(write_hf(tmp_path / "hf", model, random_params(model)), tmp_path / "native")
    export_hf(tmp_path / "native", tmp_path / "back")

    assert json.loads((tmp_path / "back/config.json").read_text())["pad_token_id"] is None
    assert verify(tmp_path / "native", tmp_path / "back").mismatches == []


def test_minus_zero_is_not_zero_and_a_nan_is_itself_in_its_own_bits_alone(tmp_path: Path):
    config = tiny()
    tensors = hf_tensors(config, random_params(config))
    odd = np.array([0.0, -0.0, np.nan, np.nan, np.nan, np.inf], np.float32)
    tensors["model.norm.weight"][:6] = odd
    source = write_hf(tmp_path / "hf", config, random_params(config))
    write_tensors(source, tensors)
    native = import_hf(source, tmp_path / "native").path
    same = verify(native, source)
    tensors["model.norm.weight"][:6] = (odd.view(np.uint32) ^ np.array([1 << 31, 0, 0, 0, 1, 0], np.uint32)).view(
        np.float32
    )
    write_tensors(source, tensors)

    report = verify(native, source)

    assert same.mismatches == []
    assert found(report) == [(ONE_FILE, "model.norm.weight")]
    assert report.mismatches[0]["what"] == "differs in 2 of 32 values"


# what is done to the Hugging Face folder | what the one line must say
NOTHING_TO_COMPARE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor missing": (rewritten(lambda tensors: tensors.pop(EXPERT)), rf"tensor {EXPERT} is missing"),
    "a tensor more": (rewritten(lambda t: t.update(more=t["model.norm.weight"].copy())), "more belongs to nothing"),
    "another shape": (
        rewritten(lambda t: t.update({EXPERT: t[EXPERT].T.copy()})), rf"{EXPERT} has shape \[32, 16\]"
    ),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"config\.json: does not exist"),
    "no folder": (lambda hf: shutil.rmtree(hf), "hf"),
    "a shard cut short": (lambda hf: os.truncate(hf / "model-00001-of-00002.safetensors", 5_000), "model-00001-of"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "named"), NOTHING_TO_COMPARE.values(), ids=NOTHING_TO_COMPARE)
def test_a_folder_of_other_tensors_is_refused_in_one_line(native: Path, spoil: Callable[[Path], Any], named: str):
    spoil(native.parent / "hf")

    with pytest.raises(ValueError, match=named) as refused:
        verify(native, native.parent / "hf")

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ belongs to nothing that the config asks for \(and 33 more\)"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+ is missing"),
        ({"vocab_size": 32}, r"has shape \[32, 32\], the config asks for \[64, 32\]"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight is missing"),
    ],
    ids=str,
)
def test_a_folder_of_another_model_is_refused_in_one_line(tmp_path: Path, made: Path, changes: dict, named: str):
    write_hf(tmp_path / "hf", tiny(**changes), random_params(tiny(**changes)))

    with pytest.raises(ValueError, match=named) as refused:
        verify(made, tmp_path / "hf")

    assert "\n" not in str(refused.value)


def test_what_is_no_native_checkpoint_is_refused(made: Path):
    with pytest.raises(ValueError, match="hf: not a native checkpoint"):
        verify(made.parent / "hf")


# Typed


@pytest.mark.parametrize("against", [False, True], ids=["alone", "against its source"])
@pytest.mark.parametrize("named", [False, True], ids=["default file", "file named"])
def test_typed_on_a_good_checkpoint_it_writes_its_report_and_ends_with_0(
    native: Path, capsys: pytest.CaptureFixture, against: bool, named: bool
):
    hf, file = native.parent / "hf", native.parent / ("r.json" if named else "native.verify.json")

    code = main(["verify", str(native), *[str(hf)] * against, *["--report", str(file)] * named])

    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert str(file) in out
    assert report.keys() == {"native", "hf", "tensors", "bytes", "mismatches", "hashes", "seconds"}
    assert report["mismatches"] == []
    assert report["hashes"] == verify(native, hf if against else None).hashes
    assert verify(native).mismatches == []


OTHER_BYTES = "has other bytes than were written: another SHA-256"
SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda native: flip_bit(native / DATA, 9), f"'{DATA}' {OTHER_BYTES} (tensor embed)"),
        (lambda native: flip_bit(native / "config.json", 9), f"'config.json' {OTHER_BYTES}"),
        (
            lambda native: flip_bit(native.parent / "hf" / SHARD, -1),
            f"'{SHARD}' differs in 1 of 512 values (tensor model.layers.1.self_attn.v_proj.weight)",
        ),
    ],
    ids=["a tensor", "the config", "the source"],
)
def test_typed_on_a_damaged_checkpoint_it_writes_its_report_and_ends_with_2_and_one_line(
    native: Path, capsys: pytest.CaptureFixture, spoil: Callable[[Path], Any], line: str
):
    spoil(native)

    code = main(["verify", str(native), str(native.parent / "hf"), "--report", str(native.parent / "report.json")])

    assert code == 2
    assert capsys.readouterr().err == f"dsmoe verify: {line}\n"
    assert len(json.loads((native.parent / "report.json").read_text())["mismatches"]) == 1


def test_typed_on_much_damage_it_lists_the_rest_on_stdout(native: Path, capsys: pytest.CaptureFixture):
    for file in sorted((native / STATE).rglob("zarr.json"))[:3]:
        flip_bit(file, 0)

    code = main(["verify", str(native)])

    out, err = capsys.readouterr()
    assert code == 2
    assert err.count("\n") == 1
    assert out.count(OTHER_BYTES) == 2


def test_typed_with_nothing_to_compare_it_ends_with_2_and_one_line(native: Path, capsys: pytest.CaptureFixture):
    code = main(["verify", str(native.parent / "hf")])

    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert "not a native checkpoint" in err


def test_typed_twice_into_one_report_the_second_is_refused(native: Path, capsys: pytest.CaptureFixture):
    file = native.parent / "report.json"

    with lock_name(file):
        code = main(["verify", str(native), "--report", str(file)])

    assert code == 2
    assert f"dsmoe verify: {file} is in use by another process (pid {os.getpid()}); " in capsys.readouterr().err
    assert not file.exists()


def test_typed_on_a_full_disk_no_half_report_is_left(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system can be mounted here by nobody, or by root alone")
    try:
        code = main(["verify", str(native), "--report", str(disk / "report.json")])
        left = list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)

    err = capsys.readouterr().err
    assert code == 2
    assert err == f"dsmoe verify: [Errno 28] No space left on device: '{disk / 'report.json'}'\n"
    assert left == []
