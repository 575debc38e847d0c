"""CheckpointReader: folders, indexes, links and safetensors files; helpers/hostile.py writes the malformed ones."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from dsmoe_jax.convert.reader import CheckpointReader
from tests.helpers.hf_folder import same_bits
from tests.helpers.hostile import assert_rejected, built, entry

GOLDEN = Path(__file__).parent / "golden"


FLOATS = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize("case", ["a_baseline", "b_norm_topk", "d_rope_linear"])
def test_equals_the_safetensors_library(case: str):
    with CheckpointReader(GOLDEN / case) as reader:
        for name, info in reader.tensors.items():
            with safetensors.safe_open(GOLDEN / case / info.file, framework="numpy") as theirs:
                assert same_bits(reader.read(name), theirs.get_tensor(name))

    assert len(reader.tensors) == 80


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reads_safetensors_without_copying(tmp_path: Path, dtype: np.dtype):
    tensors = {"w": np.arange(12).reshape(3, 4).astype(dtype), "s": np.array(3, dtype), "e": np.zeros((2, 0), dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    reader = CheckpointReader(str(tmp_path))
    info = reader.tensors["w"]
    got = reader.read("w")

    assert (info.dtype, info.shape, info.file) == (dtype, (3, 4), "model.safetensors")
    assert all(same_bits(reader.read(name), want) for name, want in tensors.items())
    assert np.shares_memory(got, reader.read("w"))
    assert not any(reader.read(name).flags.writeable for name in tensors)


def test_arrays_outlive_the_closed_reader(tmp_path: Path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        array = reader.read("w")

    assert array.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="closed, cannot read tensor 'w'"):
        reader.read("w")
    with pytest.raises(ValueError, match="no tensor 'v'"):
        reader.read("v")


def test_prefers_safetensors_to_bin(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    save_file({"single": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    assert list(CheckpointReader(tmp_path).tensors) == ["single"]

    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, {"a": SHARD_1, "b": SHARD_2})

    assert list(CheckpointReader(tmp_path).tensors) == ["a", "b"]


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder: Path, weight_map: dict, **shards: list[str]) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for shard, names in {SHARD_1: ["a"], SHARD_2: ["b"], **shards}.items():
        save_file({name: np.ones(2, np.float32) for name in names}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_folder_or_weights_are_an_error(tmp_path: Path):
    assert_rejected(tmp_path / "absent", "absent: no such folder")
    assert_rejected(tmp_path, r"no weights; looked for model\.safetensors\.index\.json, .*pytorch_model\.bin$")


def test_missing_or_empty_shard_is_an_error(tmp_path: Path):
    write_shards(tmp_path, {"a": SHARD_1, "b": SHARD_2})
    (tmp_path / SHARD_2).unlink()
    assert_rejected(tmp_path, f"{SHARD_2}: cannot be opened: No such file")
    (tmp_path / SHARD_2).touch()
    assert_rejected(tmp_path, f"{SHARD_2}: is empty")
    (tmp_path / SHARD_2).unlink()
    (tmp_path / SHARD_2).mkdir()
    assert_rejected(tmp_path, f"{SHARD_2}: is not a regular file")


def test_stale_index_with_a_single_file_is_ignored(tmp_path: Path):
    write_shards(tmp_path, {"a": SHARD_1, "b": SHARD_2})
    save_file({"c": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / SHARD_1).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "optimizer.pt").write_bytes(b"")

    reader = CheckpointReader(tmp_path)

    assert list(reader.tensors) == ["c"]
    assert reader.ignored == [SHARD_2, "model.safetensors.index.json", "pytorch_model.bin"]


def test_malformed_index_with_a_single_file_is_ignored(tmp_path: Path):
    save_file({"c": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{")

    assert list(CheckpointReader(tmp_path).tensors) == ["c"]


def test_single_file_with_complete_shards_is_an_error(tmp_path: Path):
    write_shards(tmp_path, {"a": SHARD_1, "b": SHARD_2})
    save_file({"c": np.ones(3, np.float32)}, tmp_path / "model.safetensors")

    assert_rejected(
        tmp_path, r"holds two checkpoints, model\.safetensors and the shards of model\.safetensors\.index\.json"
    )


def test_index_of_a_single_file_is_read(tmp_path: Path):
    save_file({"c": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"c": "./model.safetensors"}}')

    assert list(CheckpointReader(tmp_path).tensors) == ["c"]


def test_shards_not_in_the_index_are_ignored(tmp_path: Path):
    write_shards(tmp_path, {"a": SHARD_1, "b": SHARD_2}, **{"model-00003-of-00003.safetensors": ["z"]})

    reader = CheckpointReader(tmp_path)

    assert sorted(reader.tensors) == ["a", "b"]
    assert reader.ignored == ["model-00003-of-00003.safetensors"]


@pytest.mark.parametrize("indexed", [True, False])
def test_rope_buffers_are_ignored(tmp_path: Path, indexed: bool):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    listed = {buffer: SHARD_2} if indexed else {}
    write_shards(tmp_path, {"a": SHARD_1, "b": SHARD_2} | listed, **{SHARD_2: ["b", buffer]})

    reader = CheckpointReader(tmp_path)

    assert (sorted(reader.tensors), reader.ignored) == (["a", "b"], [buffer])


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.bool_], ids=lambda dtype: dtype.__name__)
def test_buffers_of_any_dtype_are_ignored(tmp_path: Path, dtype: type):
    buffers = {"model.rotary_emb.inv_freq": np.ones(4, dtype), "model.causal_mask": np.ones((2, 2), dtype)}
    save_file({"a": np.ones(3, np.float32)} | buffers, tmp_path / "model.safetensors")

    reader = CheckpointReader(tmp_path)

    assert (list(reader.tensors), sorted(reader.ignored)) == (["a"], sorted(buffers))


# fmt: off
INDEX_DISAGREEMENTS = {
    "absent": ({"a": SHARD_1, "b": SHARD_2, "c": SHARD_2}, {}, f"{SHARD_2}: tensor 'c' of model.* is missing"),
    "elsewhere": ({"a": SHARD_2, "b": SHARD_1}, {}, f"{SHARD_2}: tensor 'a' of model.* is missing"),
    "surplus": ({"a": SHARD_1, "b": SHARD_2}, {SHARD_2: ["b", "c"]}, "tensor 'c' is not in model"),
    "twice": (
        {"a": SHARD_1, "b": SHARD_2},
        {SHARD_2: ["a", "b"]},
        f"'a' is in both '{SHARD_1}' and '{SHARD_2}'",
    ),
}
# fmt: on


@pytest.mark.parametrize("case", INDEX_DISAGREEMENTS)
def test_index_must_match_its_shards(tmp_path: Path, case: str):
    weight_map, shards, match = INDEX_DISAGREEMENTS[case]
    write_shards(tmp_path, weight_map, **shards)

    assert_rejected(tmp_path, match)


# fmt: off
BAD_INDEXES = {
    "not JSON": (b"{", "index.json: is not JSON: Expecting"),
    "not UTF-8": (b'{"\xff": 1}', "index.json: is not JSON: 'utf-8' codec"),
    "not an object": (b"[]", "must be a JSON object, got list"),
    "no weight_map": (b"{}", "weight_map must be"),
    "weight_map is a list": (b'{"weight_map": ["a"]}', "weight_map must be a non-empty object"),
    "weight_map is empty": (b'{"weight_map": {}}', "weight_map must be"),
    "shard is a number": (b'{"weight_map": {"a": 1}}', "tensor 'a' is in 1"),
    "twice": (b'{"weight_map": {"a": "x", "a": "y"}}', "JSON key 'a' twice"),
    "nested": (b"[" * 200_000, "nested too deeply"),
    "absolute": (b'{"weight_map": {"a": "/etc/hostname"}}', "'/etc/hostname'; a shard must be a .safetensors file"),
    "upwards": (b'{"weight_map": {"a": "../model.safetensors"}}', "a shard must be a .safetensors file"),
    "parent": (b'{"weight_map": {"a": ".."}}', "tensor 'a' is in '..'; a shard must be a .safetensors file"),
    "nothing": (b'{"weight_map": {"a": ""}}', "a shard must be a .safetensors file"),
    "of another kind": (b'{"weight_map": {"a": "x.py"}}', "'x.py'; a shard must be a .safetensors file"),
    "NUL": (b'{"weight_map": {"a": "x\\u0000"}}', "a shard must be a .safetensors file"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_malformed_index_is_an_error(tmp_path: Path, case: str):
    content, match = BAD_INDEXES[case]
    (tmp_path / "model.safetensors.index.json").write_bytes(content)

    assert_rejected(tmp_path, match)


def test_index_size_is_limited(tmp_path: Path):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(8_000_001)

    assert_rejected(tmp_path, "8000001 bytes; at most 8000000")


def test_links_must_stay_inside_the_folder(tmp_path: Path):
    outside, inside = tmp_path / "outside.safetensors", tmp_path / "folder" / "real"
    inside.parent.mkdir()
    for path in (outside, inside):
        save_file({"w": np.ones(2, np.float32)}, path)
    link = tmp_path / "folder" / "model.safetensors"
    link.symlink_to(outside)
    assert_rejected(link.parent, r"model\.safetensors: links to .*outside\.safetensors, outside the checkpoint")
    link.unlink()
    link.symlink_to("absent")
    assert_rejected(link.parent, "cannot be opened: No such file")
    link.unlink()
    link.symlink_to(link.name)
    assert_rejected(link.parent, "cannot be opened: Too many levels of symbolic links")
    link.unlink()

    link.symlink_to("real")

    assert list(CheckpointReader(link.parent).tensors) == ["w"]


def test_hub_cache_links_must_lead_to_its_blobs(tmp_path: Path):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    write_shards(snapshot, {"a": SHARD_1, "b": SHARD_2})
    for repository in (tmp_path / "models--x--y", tmp_path / "models--x--z"):
        (repository / "blobs").mkdir(parents=True)
    (snapshot / SHARD_1).rename(snapshot / "../../blobs/0123")
    (snapshot / SHARD_1).symlink_to("../../blobs/0123")
    assert CheckpointReader(snapshot).read("a").tolist() == [1, 1]

    (snapshot / SHARD_2).rename(tmp_path / "models--x--z" / "blobs" / "4567")
    (snapshot / SHARD_2).symlink_to("../../../models--x--z/blobs/4567")

    assert_rejected(snapshot, "outside the checkpoint")


def test_pipe_is_rejected_without_blocking(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")

    assert_rejected(tmp_path, "is not a regular file")


TWO = {"a": entry(0, 8, [2]), "b": entry(8, 16, [2])}


# fmt: off
BAD_SAFETENSORS = {
    "short": (b"abc", "is damaged or not a safetensors file: has a header up to byte"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not weights"),
    "header past its bound": (struct.pack("<Q", 8_000_001) + b"{}", "8000001 bytes; at most 8000000"),
    "header past the file": (struct.pack("<Q", 999) + b"{}", "header up to byte 1007 of a file of 10"),
    "truncated": (built(TWO)[:-1], "tensors up to byte 16 of its data; it has 15 bytes"),
    "bytes left": (built(TWO, bytes(17)), "up to byte 16 of its data; it has 17 bytes"),
    "not UTF-8": (built(b'{"\xff": 1}'), "codec can't decode"),
    "not JSON": (built(b"{nonsense}"), "Expecting property name"),
    "not an object": (built([TWO]), "must be a JSON object, got list"),
    "nested": (built(b"[" * 200_000), "nested too deeply"),
    "no tensor": (built({}, b""), "has no tensors"),
    "metadata": (built({"__metadata__": 1, **TWO}), "a __metadata__ that is not an object"),
    "duplicate": (built(b'{"a": {}, "a": {}}'), "JSON key 'a' twice"),
    "duplicate inside": (built(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "JSON key 'dtype' twice"),
    "entry is a list": (built({"a": [1]}), "must describe tensor 'a'"),
    "entry lacks": (built({"a": {"dtype": "F32", "shape": [4]}}), "must describe tensor 'a'"),
    "entry has more": (built({"a": entry(0, 16, [4], more=1)}), "must describe tensor 'a'"),
    "dtype no string": (built({"a": entry(0, 16, [4], 32)}), "must describe tensor 'a'"),
    "dtype integer": (built({"a": entry(0, 16, [2], "I64")}), "'a' has dtype 'I64'; weights"),
    "dtype double": (built({"a": entry(0, 16, [2], "F64")}), "'a' has dtype 'F64'; weights"),
    "wrong size": (built({"a": entry(0, 16, [3])}), "'a' spans 0 to 16; .* need 12 bytes"),
    "overlap": (built({**TWO, "b": entry(4, 16, [3])}), "'b' starts at 4; .* ends at 8"),
    "hole": (built({**TWO, "b": entry(12, 16, [1])}), "'b' starts at 12; .* ends at 8"),
    "late start": (built({"b": entry(8, 16, [2])}), "'b' starts at 8; .* ends at 0"),
    "past the end": (built({**TWO, "b": entry(8, 24, [4])}), "up to byte 24 of its data"),
    "backwards": (built({"a": entry(16, 0, [4])}), "'a' spans 16 to 0"),
    "negative offset": (built({"a": entry(-16, 0, [4])}), "'a' starts at -16"),
    "negative size": (built({"a": entry(0, 16, [-2, -2])}), "'a' has a dimension of -2"),
    "fraction": (built({"a": entry(0, 16, [4.0])}), "'a' has 4.0 for a dimension or an offset"),
    "boolean": (built({"a": entry(0, 4, [True])}, bytes(4)), "'a' has True for a dimension"),
    "absurd size": (
        built({"a": entry(0, 0, [0, 2**64])}, b""),
        "'a' has a dimension of 18446744073709551616",
    ),
    "overflow": (built({"a": entry(0, 0, [2**40, 2**24])}, b""), r"'a' has shape .*: 2\*\*63 bytes"),
    "empty overflow": (built({"a": entry(0, 0, [0, 2**62])}, b""), r"2\*\*63 bytes or more"),
    "rank": (built({"a": entry(0, 4, [1] * 65)}, bytes(4)), "'a' has 65 dimensions; at most 64"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_malformed_safetensors_file_is_an_error(tmp_path: Path, case: str):
    content, match = BAD_SAFETENSORS[case]
    (tmp_path / "model.safetensors").write_bytes(content)

    assert_rejected(tmp_path, f"model\\.safetensors: .*{match}")
