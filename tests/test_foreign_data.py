"""Data of other tools: Megatron's token files and datasets' `save_to_disk`. Start at `test_megatron_files_...`."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.corpus import Corpus, prepare
from dsmoe_jax.train.data import TokenShards, documents, merge, tokenize, tokenize_task
from dsmoe_jax.train.data.megatron import MegatronTokens, is_tokenized
from dsmoe_jax.train.preflight import check_inputs
from tests.helpers.corpus import TEXTS, ids_of, write_texts
from tests.helpers.hf_folder import tiny

CODES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write_megatron(
    folder: Path, documents: list[list[int]], *, code: int = 8, legacy: bool = False, sequences: int = 1, **change: Any
) -> Path:
    """Write documents of one or more sequences, as Megatron's preprocess_data.py; `change` overrides fields."""
    dtype = np.dtype(CODES.get(code, "u1"))
    parts = [part for ids in documents for part in np.array_split(np.array(ids, dtype), sequences)]
    (folder / "text.bin").write_bytes(b"".join(part.tobytes() for part in parts))
    lengths = np.array([len(part) for part in parts])
    begins = np.cumsum(lengths) - lengths
    bounds = np.arange(0, len(parts) + 1, sequences)
    fields: dict[str, Any] = {"version": 1, "code": code, "lengths": lengths, "bounds": bounds} | change
    version, lengths, bounds = fields["version"], fields["lengths"], fields["bounds"].astype("<i8").tobytes()
    if legacy:
        head = b"TNTIDX\0\0" + struct.pack("<QQQ", version, fields["code"], dtype.itemsize)
        head += struct.pack("<QQQ", len(lengths), len(lengths), len(fields["bounds"]))
        offsets = [np.arange(len(lengths) + 1), np.append(begins, lengths.sum()), lengths]
        body = b"".join(array.astype("<i8").tobytes() for array in offsets)
    else:
        head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, fields["code"], len(lengths), len(fields["bounds"]))
        body = lengths.astype("<i4").tobytes() + (begins * dtype.itemsize).astype("<i8").tobytes()
    (folder / "text.idx").write_bytes(head + body + bounds)
    return folder / "text.bin"


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize(("code", "legacy"), [*((code, False) for code in CODES), (8, True), (4, True)])
def test_megatron_files_are_read_in_place(tmp_path: Path, code: int, legacy: bool, sequences: int):
    expected = [[1, 2, 3], [4, 5], [100, 7, 8, 9]]
    path = write_megatron(tmp_path, expected, code=code, legacy=legacy, sequences=sequences)

    for source in (path, path.with_suffix(".idx"), path.with_suffix("")):
        train, validation = MegatronTokens.split(source, 0.0, 101)

        assert ids_of(train) == expected
        assert len(validation) == 0
        assert train.tokens == 9


@pytest.mark.parametrize("source", [".", "..", "/"])
def test_folders_without_a_name_are_not_megatron_files(source: str):
    assert not is_tokenized(source)


def test_documents_of_megatron_are_split_by_number(tmp_path: Path):
    expected = [[n, n] for n in range(200)]
    path = write_megatron(tmp_path, expected)

    train, validation = MegatronTokens.split(path, 0.1, 200)
    _, one = MegatronTokens.split(path, 1e-9, 200)

    assert sorted(ids_of(train) + ids_of(validation)) == expected
    assert 10 <= len(validation) <= 30
    assert len(one) == 1
    assert len({split.digest for split in (train, validation, one)}) == 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"version": 2}, "text.idx: version must be 1, got 2"),
    "floats": ({"code": 6}, "text.idx: dtype code must be one of 1, 2, 3, 4, 5, 8, got 6"),
    "too long": ({"lengths": np.array([3, 2, 9])}, "does not match its .bin file, which has 18 bytes, not 28"),
    "a gap": ({"lengths": np.array([2, 3, 4])}, "text.idx: sequences must follow each other"),
    "no end": ({"bounds": np.array([0, 2])}, "text.idx: document indices must ascend from 0 to 3"),
    "too short": ({"bounds": np.zeros(0)}, ""),  # no documents: each sequence is one
}


@pytest.mark.parametrize("legacy", [False, True], ids=["MMIDIDX", "TNTIDX"])
@pytest.mark.parametrize(("change", "problem"), BAD.values(), ids=BAD)
def test_bad_indexes_give_one_line(tmp_path: Path, change: dict[str, Any], problem: str, legacy: bool):
    path = write_megatron(tmp_path, [[1, 2, 3], [4, 5], [6, 7, 8, 9]], legacy=legacy, **change)

    if not problem:
        assert len(MegatronTokens.split(path, 0.0, 10)[0]) == 3
        return
    with pytest.raises(ValueError, match=problem) as refused:
        MegatronTokens.split(path, 0.0, 10)
    assert "\n" not in str(refused.value)


def test_damaged_megatron_files_give_one_line(tmp_path: Path, tokenizer_folder: Path):
    path = write_megatron(tmp_path, [[1, 2, 3]])
    index = path.with_suffix(".idx").read_bytes()
    with pytest.raises(ValueError, match=r"text.bin: token ids must be in \[0, 3\), got 1 to 3 in document 0"):
        MegatronTokens.split(path, 0.0, 3)[0].read(0)
    with pytest.raises(ValueError, match="holds tokens of Megatron, already tokenized"):
        tokenize(path, tokenizer_folder, tmp_path / "out")
    path.with_suffix(".idx").write_bytes(index[:-9])
    with pytest.raises(ValueError, match=r"text\.idx: truncated"):
        MegatronTokens.split(path, 0.0, 4)
    path.with_suffix(".idx").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"text\.idx: is not an index of Megatron"):
        MegatronTokens.split(path, 0.0, 4)


def opened(out: Path, source: Path, tokenizer: Path | None) -> Corpus:
    data: dict[str, Any] = {"val_fraction": 0.0, "sequence_length": 32, "batch_size": 4}
    data["tokenizer"] = None if tokenizer is None else str(tokenizer)
    model = out.with_name("model.json")
    model.write_text(json.dumps(tiny(vocab_size=258).to_dict()))
    config = RunConfig(output_dir=str(out), model=str(model), data=DataConfig(sources=(str(source),), **data))
    check_inputs(config)
    return prepare(config, tiny(vocab_size=258), out)


def test_all_sources_of_the_same_tokens_give_the_same_batches(tmp_path: Path, tokenizer_folder: Path):
    text = write_texts(tmp_path / "a.parquet", TEXTS * 5)
    for task in range(2):
        tokenize_task(text, tokenizer_folder, tmp_path / "merged", task=task, tasks=2, val_fraction=0.0)
    merge(tmp_path / "merged")
    ids = ids_of(TokenShards.open(tmp_path / "merged"))
    arrow = save_to_disk(tmp_path / "saved", TEXTS * 5)
    sources = {"merged": tmp_path / "merged", "megatron": write_megatron(tmp_path, ids), "arrow": arrow}

    expected = opened(tmp_path / "text", text, tokenizer_folder).stream
    for name, source in sources.items():
        stream = opened(tmp_path / name, source, tokenizer_folder).stream

        for step in range(12):  # several epochs
            for one, other in zip(stream.batch(step), expected.batch(step), strict=True):
                np.testing.assert_array_equal(one, other)


def test_texts_beside_megatron_files_need_its_tokenizer(tmp_path: Path):
    sources = (str(write_megatron(tmp_path, [[1, 2, 3]] * 3)), str(write_texts(tmp_path / "a.jsonl", TEXTS)))
    config = RunConfig(output_dir=str(tmp_path / "out"), data=DataConfig(sources=sources))

    with pytest.raises(ValueError, match=r"data.tokenizer must be set, to the tokenizer of .*text.bin"):
        check_inputs(config)


def save_to_disk(folder: Path, texts: list[str], shards: int = 2) -> Path:
    """Write what `datasets.Dataset.save_to_disk` does."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for name, part in zip(names, np.array_split(np.array(texts, object), shards), strict=True):
        table = pyarrow.table({"text": part.tolist(), "lang": ["en"] * len(part)})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0" * 16, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_saved_datasets_are_read(tmp_path: Path):
    for split, texts in {"train": TEXTS, "test": ["test"]}.items():
        save_to_disk(tmp_path / "saved" / split, texts)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    def found(path: Path, **options: Any) -> list[str]:
        return [document.text for document in documents(path, **options)]

    assert found(tmp_path / "saved") == TEXTS
    assert found(tmp_path / "saved" / "test") == ["test"]
    assert found(tmp_path) == ["test", *TEXTS]  # a folder of datasets
    assert found(tmp_path / "saved", where={"lang": ["en"]}) == TEXTS
    with pytest.raises(ValueError, match="has no column 'body', only text, lang"):
        found(tmp_path / "saved", field="body")
    (tmp_path / "saved" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"data-00001-of-00002.arrow: is missing, but listed in state.json"):
        found(tmp_path / "saved")


def test_datasets_of_the_library_are_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    some = datasets.Dataset.from_dict({"text": TEXTS}).filter(lambda row: True)
    datasets.DatasetDict({"train": some}).save_to_disk(str(tmp_path / "saved"))

    assert [document.text for document in documents(tmp_path / "saved")] == TEXTS
