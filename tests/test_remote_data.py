"""Sources and outputs in an object store, fsspec's in memory. Start at `test_a_store_equals_the_disk`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.data import documents, files, merge, pieces, tokenize, tokenize_task
from tests.helpers.corpus import TEXTS, write_texts
from tests.helpers.hf_folder import snapshot

OPTIONS: dict[str, Any] = {"val_fraction": 0.1, "shard_tokens": 3_000}
FORMATS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(pieces, "SMALLEST", 3_000)
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


@pytest.fixture
def corpus(tmp_path: Path, store: Any) -> Path:
    """A folder, which is also at memory://bucket/corpus."""
    pytest.importorskip("pyarrow")
    for end in FORMATS:
        write_texts(tmp_path / "corpus" / f"a{end}", [f"{n} {end} {TEXTS[n % 5]}" for n in range(60)])
    (tmp_path / "corpus" / "b.txt").write_text("a text")
    for path in (tmp_path / "corpus").iterdir():
        store.pipe_file(f"/bucket/corpus/{path.name}", path.read_bytes())
    store.pipe_file("/bucket/corpus/.hidden/c.txt", b"hidden")
    return tmp_path / "corpus"


def contents(store: Any, folder: str) -> dict[str, bytes]:
    return {path.removeprefix(f"/{folder}/"): store.cat_file(path) for path in store.find(f"/{folder}")}


def manifest_of(data: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(data).items() if name not in ("sources", "sha256")}


@pytest.mark.parametrize("tasks", [0, 3])
def test_a_store_equals_the_disk(tmp_path: Path, store: Any, corpus: Path, tokenizer_folder: Path, tasks: int):
    tokenize(corpus, tokenizer_folder, tmp_path / "out", deduplicate=True, **OPTIONS)
    source, out = "memory://bucket/corpus", "memory://bucket/corpus/out"

    for task in range(tasks):
        options = {"task": task, "tasks": tasks, "deduplicate": True, **OPTIONS}
        tokenize_task(source, tokenizer_folder, out, **options)
        assert tokenize_task(source, tokenizer_folder, out, **options).new == 0
    if tasks:
        merge(out)
    else:
        tokenize(source, tokenizer_folder, out, deduplicate=True, **OPTIONS)

    expected = {name: data for name, data in snapshot(tmp_path / "out").items() if data is not None}
    found = contents(store, "bucket/corpus/out")
    assert manifest_of(found.pop("manifest.json")) == manifest_of(expected.pop("manifest.json"))
    assert found == expected
    assert not store.exists("/bucket/corpus/out.tasks")
    with pytest.raises(ValueError, match="memory://bucket/corpus/out exists; nothing is overwritten"):
        tokenize(source, tokenizer_folder, out)


def test_files_of_a_store_are_found_as_on_disk(corpus: Path):
    def names(source: Any) -> list[str]:
        return [str(file.path).rpartition("/")[2] for file in files.find_files(source)]

    assert names("memory://bucket/corpus") == names(corpus)
    assert names("memory://bucket/corpus/*.jsonl*") == ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]
    assert names("memory://bucket/corpus/b.txt") == ["b.txt"]
    assert [document.text for document in documents("memory://bucket/corpus/b.txt")] == ["a text"]


def test_problems_of_stores_give_one_line(store: Any, corpus: Path, tokenizer_folder: Path, tmp_path: Path):
    store.pipe_file("/bucket/shards/manifest.json", b"{}")
    problems = {
        "memory://bucket/absent": "memory://bucket/absent: does not exist, or has no files",
        "memory://bucket/shards": "shards/manifest.json: is of token shards, which are read in place: copy the folder",
        "unknown://bucket/a": "unknown://bucket/a: Protocol not known: unknown",
    }
    for package, extra, protocol in (("gcsfs", "gcs", "gs"), ("s3fs", "s3", "s3")):
        try:
            __import__(package)
        except ImportError:
            problems[f"{protocol}://b/a"] = f"{protocol}://b/a: requires {package}: pip install 'dsmoe_jax[{extra}]'"
    for source, problem in problems.items():
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            tokenize(source, tokenizer_folder, tmp_path / "out")
        assert problem in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="output_dir must be on a local or mounted disk, got gs://bucket/run"):
        RunConfig(output_dir="gs://bucket/run")
