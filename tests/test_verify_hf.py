"""`verify` against a Hugging Face folder, and the `dsmoe verify` command."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.convert import export_hf, import_hf, verify
from dsmoe_jax.storage.locks import lock_name
from tests.helpers import native_checkpoint
from tests.helpers.hf_folder import edit, flip_bit, hf_tensors, random_params, stored, tiny, write_hf, write_tensors
from tests.helpers.native_checkpoint import DATA, EXPERT, STATE, found

made, native = native_checkpoint.made, native_checkpoint.native


def rewrite(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Rewrite the folder with changed tensors in one file."""

    def damage(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        tensors = hf_tensors(tiny(), {name: array.copy() for name, array in random_params(tiny()).items()})
        change(tensors)
        write_tensors(folder, tensors)

    return damage


def test_flipped_bit_in_a_shard_is_reported_and_counted(native: Path):
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


# change of the Hugging Face folder | mismatches: file, tensor, text
DIFFERENCES: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str | None, str]]]] = {
    "some values": (
        rewrite(lambda tensors: set_values(tensors, 1.0)), [(ONE_FILE, EXPERT, "differs in 6 of 512 values")]
    ),
    "two tensors": (
        rewrite(lambda t: (set_values(t, np.nan), t["model.norm.weight"].__setitem__(0, 9))),
        [
            (ONE_FILE, EXPERT, "differs in 6 of 512 values"),
            (ONE_FILE, "model.norm.weight", "differs in 1 of 32 values"),
        ],
    ),
    "a dtype": (
        rewrite(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(ml_dtypes.bfloat16)})),
        [],
    ),
    "values of another dtype": (
        rewrite(lambda t: t.update({"model.norm.weight": (t["model.norm.weight"] * 2).astype(ml_dtypes.bfloat16)})),
        [
            (
                ONE_FILE,
                "model.norm.weight",
                "differs in 32 of 32 values in bfloat16 (stored in float32 and bfloat16)",
            )
        ],
    ),
    "the same otherwise stored": (rewrite(lambda tensors: None), []),
    "rope_theta": (
        edit("config.json", lambda fields: fields.update(rope_theta=500.0)),
        [("config.json", None, "has rope_theta 10000.0, {hf} 500.0")],
    ),
    "an unknown field": (
        edit("config.json", lambda fields: fields.pop("rms_norm_eps") and fields.update(rms_norm_eps=1e-5)),
        [("config.json", None, "has rms_norm_eps 1e-06, {hf} 1e-05")],
    ),
    "what says nothing of the model": (
        edit("config.json", lambda c: c.update(torch_dtype="float16", transformers_version="4", use_cache=False)),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "mismatches"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_difference_from_the_hf_folder_is_reported(native: Path, damage: Callable[[Path], Any], mismatches: list):
    hf = native.parent / "hf"
    damage(hf)

    report = verify(native, hf)

    assert [tuple(one.values()) for one in report.mismatches] == [
        (file, tensor, what.format(native=native, hf=hf)) for file, tensor, what in mismatches
    ]


def test_export_with_other_special_ids_is_equal(tmp_path: Path):
    model = tiny(pad_token_id=tiny().vocab_size, extra={"note": math.nan})
    import_hf(write_hf(tmp_path / "hf", model, random_params(model)), tmp_path / "native")
    export_hf(tmp_path / "native", tmp_path / "back")

    assert json.loads((tmp_path / "back/config.json").read_text())["pad_token_id"] is None
    assert verify(tmp_path / "native", tmp_path / "back").mismatches == []


def test_values_are_compared_by_their_bits(tmp_path: Path):
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


# change of the Hugging Face folder | text of the error
INCOMPARABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor missing": (rewrite(lambda tensors: tensors.pop(EXPERT)), rf"tensor {EXPERT} is missing"),
    "a tensor more": (rewrite(lambda t: t.update(more=t["model.norm.weight"].copy())), "more is unexpected"),
    "another shape": (
        rewrite(lambda t: t.update({EXPERT: t[EXPERT].T.copy()})), rf"{EXPERT} has shape \[32, 16\]"
    ),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"config\.json: does not exist"),
    "no folder": (lambda hf: shutil.rmtree(hf), "hf: no such file or folder"),
    "a shard cut short": (lambda hf: os.truncate(hf / "model-00001-of-00002.safetensors", 5_000), "model-00001-of"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), INCOMPARABLE.values(), ids=INCOMPARABLE)
def test_folder_with_other_tensors_is_a_one_line_error(native: Path, damage: Callable[[Path], Any], named: str):
    damage(native.parent / "hf")

    with pytest.raises(ValueError, match=named) as caught:
        verify(native, native.parent / "hf")

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ is unexpected under this config \(and 33 more\)"),
        ({"num_hidden_layers": 1}, r"layers\.1\.\S+ is missing"),
        ({"vocab_size": 32}, r"has shape \[32, 32\], the config asks for \[64, 32\]"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight is missing"),
    ],
    ids=str,
)
def test_folder_of_another_model_is_a_one_line_error(tmp_path: Path, made: Path, changes: dict, named: str):
    write_hf(tmp_path / "hf", tiny(**changes), random_params(tiny(**changes)))

    with pytest.raises(ValueError, match=named) as caught:
        verify(made, tmp_path / "hf")

    assert "\n" not in str(caught.value)


def test_an_hf_folder_alone_is_read_completely(made: Path, native: Path):
    hf = native.parent / "hf"

    report = verify(hf)

    assert (report.mismatches, report.layout) == ([], "hf")
    assert report.hashes == verify(made, hf).hashes
    assert str(report).endswith(": all tensors are complete; it has no checksums")
    os.truncate(hf / "model-00001-of-00002.safetensors", 5_000)
    with pytest.raises(ValueError, match="model-00001-of"):
        verify(hf)


def test_any_two_checkpoints_are_compared(native: Path, tmp_path: Path):
    hf = native.parent / "hf"
    again = import_hf(hf, tmp_path / "again").path

    reports = [verify(*pair) for pair in ((hf, native), (native, again), (hf, hf))]

    assert [report.mismatches for report in reports] == [[], [], []]
    assert all("bitwise equal to" in str(report) for report in reports)
    flip_bit(again / DATA, 9)
    assert found(verify(native, again)) == [(DATA, "embed")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_checkpoint_is_compared_in_its_dtype(native: Path, tmp_path: Path, dtype: str):
    hf = native.parent / "hf"
    cast = import_hf(hf, tmp_path / "cast", dtype=dtype).path

    report = verify(cast, hf)

    assert (report.mismatches, report.cast) == ([], [dtype])
    text = f"equal to {hf} (compared in {dtype}: a cast cannot match bit by bit)"
    assert str(report).endswith(text)


def test_a_revision_needs_a_hub_id(native: Path):
    with pytest.raises(ValueError, match="revision 'v1' needs a hub id, got the local path"):
        verify(native, native.parent / "hf", revision="v1")
    with pytest.raises(ValueError, match="revision 'v1' needs one hub id, got two: a/b and c/d"):
        verify("a/b", "c/d", revision="v1")


@pytest.mark.parametrize("against", [False, True], ids=["alone", "against its source"])
@pytest.mark.parametrize("named", [False, True], ids=["default file", "file named"])
def test_command_on_an_intact_checkpoint_exits_with_0(
    native: Path, capsys: pytest.CaptureFixture, against: bool, named: bool
):
    hf, file = native.parent / "hf", native.parent / ("r.json" if named else "native.verify.json")

    code = main(["verify", str(native), *[str(hf)] * against, *["--report", str(file)] * named])

    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert str(file) in out
    assert report.keys() == {
        *("source", "other", "layout", "cast", "tensors", "bytes", "mismatches", "hashes", "seconds")
    }
    assert report["mismatches"] == []
    assert report["hashes"] == verify(native, hf if against else None).hashes
    assert verify(native).mismatches == []


OTHER_BYTES = "does not match its SHA-256"


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "line"),
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
def test_command_on_a_damaged_checkpoint_exits_with_2(
    native: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], Any], line: str
):
    damage(native)

    code = main(["verify", str(native), str(native.parent / "hf"), "--report", str(native.parent / "report.json")])

    assert code == 2
    assert capsys.readouterr().err == f"dsmoe verify: {line}\n"
    assert len(json.loads((native.parent / "report.json").read_text())["mismatches"]) == 1


def test_command_lists_further_damage_on_stdout(native: Path, capsys: pytest.CaptureFixture):
    for file in sorted((native / STATE).rglob("zarr.json"))[:3]:
        flip_bit(file, 0)

    code = main(["verify", str(native)])

    out, err = capsys.readouterr()
    assert code == 2
    assert err.count("\n") == 1
    assert out.count(OTHER_BYTES) == 2


def test_command_without_a_checkpoint_exits_with_2(native: Path, capsys: pytest.CaptureFixture):
    code = main(["verify", str(native.parent)])

    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert "config.json: does not exist" in err


def test_command_rejects_a_report_in_use(native: Path, capsys: pytest.CaptureFixture):
    file = native.parent / "report.json"

    with lock_name(file):
        code = main(["verify", str(native), "--report", str(file)])

    assert code == 2
    assert f"dsmoe verify: {file} is in use by another process (pid {os.getpid()}); " in capsys.readouterr().err
    assert not file.exists()


def test_command_leaves_no_partial_report_on_a_full_disk(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    try:
        code = main(["verify", str(native), "--report", str(disk / "report.json")])
        left = list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)

    err = capsys.readouterr().err
    assert code == 2
    assert err == f"dsmoe verify: {disk / 'report.json'}: No space left on device\n"
    assert left == []
