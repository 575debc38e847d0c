"""Arrays in zarr files: Orbax and tensorstore read them, damaged files are rejected."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from dsmoe_jax.checkpoint import zarr_io
from dsmoe_jax.checkpoint.native import load, save
from dsmoe_jax.checkpoint.zarr_io import ArrayRecord, ArrayWriter, open_array, row_chunks, write_skeleton
from dsmoe_jax.model import DeepSeekMoE, split
from dsmoe_jax.storage.manifest import hash_file
from tests.helpers.hf_folder import edit, same_bits, tiny
from tests.helpers.meshes import MESHES

SMALL_PART = 256  # bytes: arrays of the tests have several inner chunks

# shape | number of inner chunks of at most SMALL_PART bytes for 4-byte (or 2-byte) numbers
SHAPES: dict[tuple[int, ...], tuple[int, int]] = {
    (16, 8, 4): (8, 4),
    (24, 6): (3, 2),
    (8, 64): (8, 4),
    (7, 5): (1, 1),
    (13, 11): (13, 13),  # prime number of rows: one inner chunk each
    (1, 300): (1, 1),  # one row, larger than an inner chunk
    (509,): (509, 509),
    (512,): (8, 4),
    (3,): (1, 1),
    (65_537, 2): (1, 1),  # prime number of rows above the maximum number of inner chunks
}
every_dtype = pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["fp32", "bf16", "fp16"]
)


def array_of(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def write(
    folder: Path, arrays: dict[str, np.ndarray], pieces: Callable[[np.ndarray], Iterable[np.ndarray]] = row_chunks
) -> dict[str, ArrayRecord]:
    """Write a checkpoint of these arrays; return their records."""
    records: dict[str, ArrayRecord] = {}
    write_skeleton(folder, {name: array.dtype for name, array in arrays.items()})
    with ArrayWriter(folder, records.__setitem__) as writer:
        for name, array in arrays.items():
            writer.write(name, array.shape, array.dtype, pieces(array))
    return records


def tensorstore_of(folder: Path, name: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "state" / name)}}
    return ts.open(spec).result()


def bytes_read() -> int:
    """Return the bytes that tensorstore has read from files in this process."""
    found: list[Any] = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return found[0]["values"][0]["value"]


@every_dtype
def test_orbax_tensorstore_and_mmap_read_the_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any):
    monkeypatch.setattr(zarr_io, "_INNER_CHUNK_BYTES", SMALL_PART)
    arrays = {"x".join(map(str, shape)): array_of(shape, dtype) for shape in SHAPES}

    write(tmp_path / "out", arrays)

    by_orbax: Any = ocp.load(str(tmp_path / "out"))
    assert by_orbax.keys() == arrays.keys()
    for (name, array), parts in zip(arrays.items(), SHAPES.values(), strict=True):
        by_tensorstore = tensorstore_of(tmp_path / "out", name)
        assert same_bits(by_orbax[name], array), name
        assert same_bits(by_tensorstore.read().result(), array), name
        assert same_bits(open_array(tmp_path / "out", name), array), name
        part = by_tensorstore.chunk_layout.read_chunk.shape
        assert part == (array.shape[0] // parts[array.itemsize == 2], *array.shape[1:])


@pytest.mark.parametrize("shape", [(12, 1024, 512), (11, 1024, 512), (1 << 22,)], ids=str)
def test_inner_chunks_of_full_size_are_read(tmp_path: Path, shape: tuple[int, ...]):
    array = array_of(shape, np.float32)

    write(tmp_path / "out", {"a": array})

    assert same_bits(tensorstore_of(tmp_path / "out", "a").read().result(), array)
    assert same_bits(ocp.load(str(tmp_path / "out"))["a"], array)
    assert tensorstore_of(tmp_path / "out", "a").chunk_layout.read_chunk.shape[0] < shape[0]


def test_reading_one_expert_reads_only_its_inner_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zarr_io, "_INNER_CHUNK_BYTES", 4_096)
    experts = array_of((16, 32, 32), np.float32)
    write(tmp_path / "out", {"experts": experts})
    opened = tensorstore_of(tmp_path / "out", "experts")
    before = bytes_read()

    expert = opened[11].read().result()

    assert same_bits(expert, experts[11])
    assert bytes_read() - before == experts[11].nbytes + 16 * 16


def test_many_inner_chunks_load_onto_a_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zarr_io, "_INNER_CHUNK_BYTES", SMALL_PART)
    model = DeepSeekMoE.init(tiny())
    save(model, tmp_path / "out")

    got = load(tmp_path / "out", mesh=MESHES["expert=4,fsdp=2"])

    want = split(model)[1]
    assert [name for name, array in split(got)[1].items() if not same_bits(array, np.asarray(want[name]))] == []


def test_the_record_has_hashes_of_tensor_and_files(tmp_path: Path):
    array = array_of((6, 5), ml_dtypes.bfloat16)

    record = write(tmp_path / "out", {"a": array})["a"]

    assert record.tensor == {
        "dtype": "bfloat16",
        "shape": [6, 5],
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
    assert record.files == {name: hash_file(tmp_path / "out" / name) for name in ("state/a/c/0/0", "state/a/zarr.json")}
    content = (tmp_path / "out" / "state/a/c/0/0").read_bytes()
    assert content[:60] == array.tobytes()
    assert hash_file(tmp_path / "out" / "state/a/c/0/0")["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "pieces",
    [
        lambda array: [array],
        lambda array: list(array),
        lambda array: np.split(array, [1, 1, 4]),  # one is empty
        lambda array: row_chunks(array, 1),
        lambda array: row_chunks(np.asfortranarray(array)),
        lambda array: row_chunks(np.repeat(array, 2, axis=-1)[..., ::2]),
    ],
    ids=["whole", "rows", "uneven", "pieces of a row", "columns first", "strided"],
)
def test_files_do_not_depend_on_chunks_or_memory_layout(tmp_path: Path, pieces: Callable):
    array = array_of((8, 3, 5), np.float16)

    record = write(tmp_path / "out", {"a": array}, pieces)["a"]

    assert same_bits(open_array(tmp_path / "out", "a"), array)
    assert record.tensor["sha256"] == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("rows", [3, 5], ids=["too few", "too many"])
def test_a_wrong_number_of_rows_is_an_assertion_error(tmp_path: Path, rows: int):
    with pytest.raises(AssertionError, match="a got"):
        write(tmp_path / "out", {"a": array_of((4, 2), np.float32)}, lambda array: [array_of((rows, 2), np.float32)])


def test_an_array_is_done_once_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events, fsync = [], os.fsync

    def note(file: int) -> None:
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{file}")).parts[-4]))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    arrays = {name: array_of((4, 2), np.float32) for name in "ab"}
    write_skeleton(tmp_path / "out", {name: array.dtype for name, array in arrays.items()})

    with ArrayWriter(tmp_path / "out", lambda name, _: events.append(("done", name))) as writer:
        for name, array in arrays.items():
            writer.write(name, array.shape, array.dtype, [array])

    assert sorted(events) == [("done", "a"), ("done", "b"), ("synced", "a"), ("synced", "b")]
    assert all(events.index(("synced", name)) < events.index(("done", name)) for name in "ab")


def test_an_fsync_error_fails_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out", {"a": array_of((4, 2), np.float32)})


SPEC, DATA = "state/a/zarr.json", "state/a/c/0/0"


def resize(by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / DATA, (folder / DATA).stat().st_size + by)


def shift_index(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[-16] ^= 4
    (folder / DATA).write_bytes(content)


# damage | file named in the error
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another shape": (edit(SPEC, lambda spec: spec.update(shape=[5, 16])), SPEC),
    "another shape, all of it": (
        edit(SPEC, lambda s: (s.update(shape=[5, 16]), s["chunk_grid"]["configuration"].update(chunk_shape=[5, 16]))),
        SPEC,
    ),
    "no shape": (edit(SPEC, lambda spec: spec.pop("shape")), SPEC),
    "a scalar": (edit(SPEC, lambda spec: spec.update(shape=[])), SPEC),
    "a shape that is none": (edit(SPEC, lambda spec: spec.update(shape="16,5")), SPEC),
    "a shape of halves": (edit(SPEC, lambda spec: spec.update(shape=[16.5, 5])), SPEC),
    "a negative shape": (edit(SPEC, lambda spec: spec.update(shape=[-16, -5])), SPEC),
    "an endless shape": (edit(SPEC, lambda spec: spec.update(shape=[10**30, 5])), SPEC),
    "an infinite shape": (edit(SPEC, lambda spec: spec.update(shape=[float("inf"), 5])), SPEC),
    "another dtype": (edit(SPEC, lambda spec: spec.update(data_type="int32")), SPEC),
    "a dtype that is none": (edit(SPEC, lambda spec: spec.update(data_type=["float32"])), SPEC),
    "another part": (edit(SPEC, lambda s: s["codecs"][0]["configuration"].update(chunk_shape=[4, 5])), SPEC),
    "another codec": (
        edit(SPEC, lambda s: s["codecs"][0]["configuration"]["codecs"].append({"name": "gzip"})),
        SPEC,
    ),
    "big endian": (edit(SPEC, lambda s: s["codecs"][0]["configuration"].update(codecs=[])), SPEC),
    "another fill value": (edit(SPEC, lambda spec: spec.update(fill_value=1.0)), SPEC),
    "a field more": (edit(SPEC, lambda spec: spec.update(attributes={})), SPEC),
    "no JSON": (lambda folder: (folder / SPEC).write_text("{"), SPEC),
    "no description": (lambda folder: (folder / SPEC).unlink(), SPEC),
    "no data": (lambda folder: (folder / DATA).unlink(), DATA),
    "empty data": (lambda folder: os.truncate(folder / DATA, 0), DATA),
    "one byte less": (resize(-1), DATA),
    "one byte more": (resize(1), DATA),
    "the index cut off": (resize(-32), DATA),
    "an index that points elsewhere": (shift_index, DATA),
}


@pytest.mark.parametrize(("spoil", "named"), BAD.values(), ids=BAD)
def test_damaged_array_files_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any], named: str
):
    monkeypatch.setattr(zarr_io, "_INNER_CHUNK_BYTES", SMALL_PART)
    write(tmp_path / "out", {"a": array_of((16, 5), np.float32)})
    spoil(tmp_path / "out")

    with pytest.raises(ValueError, match=named) as refused:
        open_array(tmp_path / "out", "a")

    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_mapped_array_is_read_only_and_outlives_its_file(tmp_path: Path):
    array = array_of((16, 5), np.float32)
    write(tmp_path / "out", {"a": array})

    mapped = open_array(tmp_path / "out", "a")
    (tmp_path / "out" / DATA).unlink()

    assert not mapped.flags.writeable
    assert same_bits(mapped, array)
