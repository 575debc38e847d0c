"""Text in: sources of every kind, and the token shards made of them.

Start at `test_every_format_gives_the_same_texts`; bad input is in the tables `BAD_SOURCES` and `DAMAGE`.
"""

import errno
import gzip
import itertools
import json
import logging
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.storage import manifest as manifests
from dsmoe_jax.storage.manifest import hash_file
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.data import (
    TokenShards,
    documents,
    formats,
    is_held_out,
    is_token_shards,
    source_bytes,
    tokenize,
    tokenizer_hash,
    warn_of_overlap,
    writer,
)
from dsmoe_jax.train.data.shards import shard_files
from tests.helpers.corpus import TEXTS, byte_tokenizer, ids_of, jsonl, write_texts
from tests.helpers.hf_folder import snapshot

MODULES = {".parquet": "pyarrow", ".jsonl.zst": "zstandard"}  # what a format needs beside Python
FORMATS = (".jsonl", ".jsonl.gz", *MODULES)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


def texts_of(source: str | Path, **options: Any) -> list[str]:
    return [document.text for document in documents(source, **options)]


def files(folder: Path, **contents: bytes) -> Path:
    """Files by name, in which __ is a dot and _ a slash."""
    for name, data in contents.items():
        path = folder / name.replace("__", ".").replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# Sources


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("end", FORMATS)
def test_every_format_gives_the_same_texts(tmp_path: Path, end: str, field: str):
    pytest.importorskip(MODULES.get(end, "json"))
    path = write_texts(tmp_path / f"a{end}", TEXTS, field)

    found = list(documents(path, field=field))

    assert [document.text for document in found] == TEXTS
    assert [document.where for document in found] == [f"{path}:{n + 1}" for n in range(len(TEXTS))]


@pytest.mark.parametrize("end", [".txt", ".py", ""])
def test_any_other_file_is_one_document_byte_for_byte(tmp_path: Path, end: str):
    (tmp_path / f"a{end}").write_bytes("\ufeffa\r\nb\n".encode())

    assert list(documents(tmp_path / f"a{end}")) == [(str(tmp_path / f"a{end}"), "a\r\nb\n")]


def test_a_folder_is_read_in_the_order_of_its_paths_and_what_is_no_text_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    files(tmp_path, b__py=b"b", a_z__txt=b"a/z", a_b__jsonl=jsonl(["1", "2"]), c_d_e__md=b"c/d/e", image__png=b"\xff\0")
    files(tmp_path, blank__txt=b" \n", zeros=b"a\0", __git_config=b"hidden", __hidden=b"hidden")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")

    found = texts_of(tmp_path)

    assert found == ["1", "2", "a/z", "b", "c/d/e"]
    assert "passed over 1 blank texts and 2 files that are not UTF-8 text" in caplog.text


def test_a_pattern_finds_each_file_once(tmp_path: Path):
    files(tmp_path, a__txt=b"a", sub_b__txt=b"b", sub_c__md=b"c", sub_image__txt=b"\xff")

    assert texts_of(f"{tmp_path}/**") == ["a", "b", "c"]
    assert texts_of(f"{tmp_path}/**/*.txt") == ["a", "b"]
    assert texts_of(f"{tmp_path}/su?") == ["b", "c"]


def test_the_standard_library_is_there_without_its_tests_and_always_the_same():
    found = list(documents("python-stdlib"))
    names = [document.where for document in found]

    assert 400 < len(found) < 3000
    assert found[0].text == Path(os.__file__).with_name("__future__.py").read_text(encoding="utf-8")
    assert any(name.endswith("json/decoder.py") for name in names)
    assert all(document.text.isascii() for document in found)
    assert not any("site-packages" in name or "/test/" in name or "/tests/" in name for name in names)
    assert all(name.startswith(sys.base_prefix) for name in names)
    assert source_bytes("python-stdlib") >= sum(len(document.text.encode()) for document in found)
    assert names == sorted(names)


@pytest.mark.parametrize("end", [".txt", *FORMATS])
def test_progress_counts_all_bytes_of_the_files(tmp_path: Path, end: str):
    pytest.importorskip(MODULES.get(end, "json"))
    write_texts(tmp_path / f"a{end}", TEXTS * 50)
    steps: list[int] = []

    list(documents(tmp_path, advance=steps.append))

    assert sum(steps) == source_bytes(tmp_path) == (tmp_path / f"a{end}").stat().st_size
    assert min(steps) >= 0


@pytest.mark.parametrize("source", ["", " ", "\t\n"])
def test_an_empty_source_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path, source: str
):
    monkeypatch.chdir(files(tmp_path, a__txt=b"private"))

    for use in (texts_of, source_bytes, lambda source: tokenize(source, tokenizer_folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="source must be a path, got an empty string"):
            use(source)
    with pytest.raises(ValueError, match="tokenizer folder must be a path, got an empty string"):
        tokenize("a.txt", source, tmp_path / "out")
    with pytest.raises(ValueError, match="output path must be a path, got an empty string"):
        tokenize("a.txt", tokenizer_folder, source)


def test_a_tilde_is_the_home_folder_and_a_variable_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(files(tmp_path, a__txt=b"a", b__txt=b"b")))

    assert texts_of("~/a.txt") == ["a"]
    assert texts_of("~/*.txt") == ["a", "b"]
    with pytest.raises(ValueError, match=r"\$HOME/a.txt: does not exist"):
        texts_of("$HOME/a.txt")


def test_links_are_followed_once_and_lead_nowhere_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    home = files(tmp_path / "data", a__txt=b"a", sub_b__txt=b"b")
    files(tmp_path / "elsewhere", c__txt=b"c")
    (home / "link").symlink_to(tmp_path / "elsewhere")
    (home / "sub" / "loop").symlink_to(home)
    (home / "up").symlink_to(tmp_path)
    (home / "dangling").symlink_to("nothing")
    (home / "twice.txt").symlink_to("a.txt")
    os.link(home / "a.txt", home / "thrice.txt")

    found = texts_of(home)

    assert found == ["a", "c", "b"]
    assert f"left out links that lead nowhere: {home}/dangling" in caplog.text
    assert f"names of files that are read already: {home}/thrice.txt, {home}/twice.txt" in caplog.text
    assert f"are read already: {home}/sub/loop" in caplog.text.replace(f"{home}/up, ", "")


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.*", "/*"])
def test_what_this_project_wrote_is_no_text(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, pattern: str
):
    caplog.set_level(logging.INFO)
    files(tmp_path, a__txt=b"a", own_metrics__jsonl=b"{}", sub_b__txt=b"b")
    files(tmp_path / "runs" / "x", run__json=b"{}", metrics__jsonl=b"{}", tokenizer_tokenizer__json=b"{}")
    (files(tmp_path / "native", config__json=b"{}") / "dsmoe_jax.json").write_text("{}")
    files(tmp_path / "hf", config__json=b"{}", tokenizer__json=b"{}", model__safetensors=b"x", notes__txt=b"notes")
    tokenize(tmp_path / "a.txt", tokenizer_folder, tmp_path / "shards")

    found = texts_of(f"{tmp_path}{pattern}", exclude=[tmp_path / "own"])

    assert sorted(found) == ["a", "b", "notes"]
    for reason in (
        f"left out a training run: {tmp_path}/runs/x",
        f"left out a native checkpoint: {tmp_path}/native",
        f"left out token shards: {tmp_path}/shards",
        f"left out what this command writes: {tmp_path}/own",
        f"left out files of a model or tokenizer: {tmp_path}/hf/",
    ):
        assert reason in caplog.text
    with pytest.raises(ValueError, match=f"{tmp_path}/native: is a native checkpoint, not a folder of data"):
        texts_of(tmp_path / "native")
    with pytest.raises(ValueError, match=f"{tmp_path}/native: is a native checkpoint, not a folder of data"):
        texts_of(f"{tmp_path}/native/*")
    with pytest.raises(ValueError, match="is what this command writes to"):
        texts_of(tmp_path / "own", exclude=[tmp_path / "own"])


def test_a_file_of_two_sources_and_a_pipe_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe")

    warn_of_overlap([tmp_path, tmp_path / "a.txt"])

    assert texts_of(tmp_path) == ["a"]
    assert f"{tmp_path}/a.txt: is in source {tmp_path} already; it is read twice" in caplog.text
    assert f"left out what is no regular file: {tmp_path}/pipe" in caplog.text


BROKEN_LINES = {
    b"{": "is not JSON",
    b"[1]": "is not a JSON object",
    b'"text"': "is not a JSON object",
    b'{"txt": "a"}': "has no field 'text'",
    b'{"text": null}': "has a NoneType as 'text', not a text",
    b'{"text": 3}': "has a int as 'text', not a text",
    b'{"text": "\\ud800"}': "has half of a surrogate pair",
    b'{"text": "\xff"}': "is not UTF-8",
    b"[" * 100_000: "is not JSON",
    b'{"text": "a", "more": ' + b"[" * 70 + b"]" * 70 + b"}": "has JSON nested too deeply; at most 64 levels",
    b'{"text": "a", "text": "b"}': "has the key 'text' twice",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "is not JSON",
}


@pytest.mark.parametrize(("line", "problem"), BROKEN_LINES.items(), ids=BROKEN_LINES.values())
def test_a_broken_line_is_named_in_the_log_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, problem: str
):
    good = jsonl(["a"] * 60)
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good)

    assert texts_of(path) == ["a"] * 120
    assert f"{path}:62 {problem}: left out" in caplog.text
    assert "left out 1 broken lines of 121" in caplog.text


def test_the_log_names_ten_broken_lines_and_counts_all(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.jsonl").write_bytes((jsonl(["a"]) + b"{\n") * 30)

    texts_of(tmp_path / "a.jsonl", most_broken=0.5)

    assert caplog.text.count("is not JSON: left out") == 10
    assert "left out 30 broken lines of 60" in caplog.text


def test_one_line_in_a_hundred_may_be_broken_and_not_one_more(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a"] * 99) + b"{\n")
    assert len(texts_of(path)) == 99

    path.write_bytes(jsonl(["a"] * 98) + b"{\n")
    with pytest.raises(
        ValueError, match=r"a.jsonl: 1 of 99 lines are broken, at most 1 % may be; the first: .*:99 is not"
    ):
        texts_of(path)


def test_a_file_without_one_whole_line_is_refused_whatever_may_be_broken(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"] * 2, "txt"))
    with pytest.raises(ValueError, match="2 of 2 lines are broken"):
        texts_of(tmp_path / "a.jsonl", most_broken=1.0)

    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"] * 1001, "txt"))
    with pytest.raises(ValueError, match=r"the first 1000 lines are all broken: .*:1 has no field 'text'"):
        texts_of(tmp_path / "a.jsonl", most_broken=1.0)


def test_a_parquet_row_without_text_is_a_broken_line(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = write_texts(tmp_path / "a.parquet", ["a", None, "b"])  # pyright: ignore

    assert texts_of(path, most_broken=0.5) == ["a", "b"]
    with pytest.raises(ValueError, match=r"1 of 3 lines are broken.*:2 has a NoneType as 'text'"):
        texts_of(path)


ZST = b"\x28\xb5\x2f\xfd"
BAD_SOURCES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "missing": ({}, "a.txt", "a.txt: does not exist"),
    "no match": ({}, "*.txt", r"\*.txt: no files"),
    "empty folder": ({}, "", "no files"),
    "only hidden": ({"__hidden": b"a"}, "", "no files"),
    "blank": ({"a__txt": b" \n"}, "a.txt", "a.txt: holds no text"),
    "no lines": ({"a__jsonl": b"\n"}, "a.jsonl", "a.jsonl: holds no text"),
    "only binary": ({"a": b"\0"}, "", "holds no text"),
    "named binary": ({"a__txt": b"a\0"}, "a.txt", "a.txt: is not text: it has zero bytes"),
    "named latin-1": ({"a__txt": b"\xe4"}, "a.txt", "a.txt: is not UTF-8"),
    "no gzip": ({"a__jsonl__gz": b"junk"}, "a.jsonl.gz", "a.jsonl.gz: cannot be read"),
    "torn gzip": ({"a__jsonl__gz": gzip.compress(jsonl(TEXTS))[:-9]}, "a.jsonl.gz", "a.jsonl.gz: cannot be read"),
    "no zstd": ({"a__jsonl__zst": b"junkjunk"}, "a.jsonl.zst", "a.jsonl.zst: cannot be read"),
    "torn zstd": ({"a__jsonl__zst": ZST}, "a.jsonl.zst", "a.jsonl.zst: cannot be read .its end is missing"),
    "no parquet": ({"a__parquet": b"junk"}, "a.parquet", "a.parquet: cannot be read"),
}


@pytest.mark.parametrize(("contents", "source", "problem"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_bad_source_gets_one_line(tmp_path: Path, contents: dict[str, bytes], source: str, problem: str):
    pytest.importorskip(next((module for end, module in MODULES.items() if source.endswith(end)), "json"))
    files(tmp_path, **contents)

    with pytest.raises(ValueError, match=problem) as refused:
        texts_of(f"{tmp_path}/{source}")

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_that_is_too_long_is_refused_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    pytest.importorskip(MODULES.get(end, "json"))
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    write_texts(tmp_path / f"a{end}", ["a" * 900, "b", "c" * 990, "d"])

    with pytest.raises(ValueError, match=r"cannot be read .line 3 has more than 1,000 bytes, the most that a line may"):
        texts_of(tmp_path / f"a{end}")


def test_a_long_line_of_zstd_takes_little_memory(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as bomb:
        bomb.write(b'{"text":"')
        for _ in range(200):
            bomb.write(bytes(1 << 20))
    tracemalloc.start()

    with pytest.raises(ValueError, match="line 1 has more than 33,554,432 bytes"):
        texts_of(path)

    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()


def test_a_zstd_window_beyond_the_usual_is_refused(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    options = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=options)
    with (tmp_path / "a.jsonl.zst").open("wb") as file, compressor.stream_writer(file) as stream:
        stream.write(jsonl(["a"]))

    with pytest.raises(ValueError, match=r"a.jsonl.zst: cannot be read .*too much memory"):
        texts_of(tmp_path / "a.jsonl.zst")


def test_blank_lines_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "_MAX_BLANK", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["a"]) + b"\n" * 20))

    with pytest.raises(ValueError, match="lines 2 to 12 are blank"):
        texts_of(tmp_path / "a.jsonl.gz")


def test_json_that_takes_much_memory_is_a_broken_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "_SMALL", 1000)
    monkeypatch.setattr(formats, "_MAX_PARSED_BYTES", 50_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]) + b'{"text": "b", "more": [' + b"[]," * 400 + b"[]]}\n")

    with pytest.raises(ValueError, match=r"a.jsonl:2 has JSON that may take [\d,]+ bytes in memory, at most 50,000"):
        texts_of(tmp_path / "a.jsonl")


def test_a_text_that_is_too_large_is_refused_unread(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a")
    os.truncate(tmp_path / "a.txt", 1 << 36)

    with pytest.raises(ValueError, match=r"has 68,719,476,736 bytes, one text at most 1,073,741,824: split it"):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("rows", [1, 500])
def test_a_cell_of_parquet_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 10_000)
    path = write_texts(tmp_path / "a.parquet", ["a" * 20_000, *map(str, range(rows - 1))])

    with pytest.raises(ValueError, match=r"[12]0,\d\d\d bytes.*, at most 10,000"):
        texts_of(path)


def test_rows_of_parquet_that_share_a_text_take_it_once(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = write_texts(tmp_path / "a.parquet", ["a" * (1 << 20)] * 500)
    tracemalloc.start()

    size = sum(len(document.text) for document in documents(path))

    assert size == 500 << 20
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_column_packed_beyond_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(formats, "_SMALL_COLUMN", 100_000)
    table = pyarrow.table({"text": ["a" * 3_000_000]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)

    with pytest.raises(ValueError, match=r"its column text has 3,000,\d\d\d bytes in [\d,]+\)"):
        texts_of(tmp_path / "a.parquet")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.txt")

    with pytest.raises(ValueError, match=r"a\.txt: is not a regular file"):
        texts_of(tmp_path / "a.txt")


def test_a_zstd_file_that_is_cut_anywhere_is_refused(tmp_path: Path):
    pytest.importorskip("zstandard")
    whole = write_texts(tmp_path / "a.jsonl.zst", TEXTS * 3).read_bytes()
    ends = []

    for size in range(1, len(whole)):
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:size])
        try:
            ends += [size] if len(texts_of(tmp_path / "a.jsonl.zst", most_broken=0.2)) else []
        except ValueError:
            continue

    assert len(ends) <= 1  # between its two frames the file is a whole one


def test_a_parquet_file_without_the_column_is_told_what_it_has(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = write_texts(tmp_path / "a.parquet", TEXTS)

    with pytest.raises(ValueError, match="it has no column 'body', only id, text"):
        texts_of(path, field="body")


@pytest.mark.parametrize(("end", "module"), MODULES.items(), ids=MODULES)
def test_a_missing_library_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, module: str
):
    (tmp_path / f"a{end}").write_bytes(b"x")
    for name in (module, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ValueError, match=rf"needs {module}.*: pip install 'dsmoe_jax\[data\]'"):
        texts_of(tmp_path / f"a{end}")


# Shards


def test_shards_round_trip_to_the_text(tmp_path: Path, tokenizer_folder: Path):
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)

    made = tokenize(path, tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out", verify=True)

    assert [tokenizer.decode(ids) for ids in ids_of(shards)] == TEXTS
    assert ids_of(shards) == [[0, *tokenizer.encode(text, add_special_tokens=False), 1] for text in TEXTS]
    assert shards.lengths.tolist() == [len(text.encode()) + 2 for text in TEXTS]
    assert (made.documents, made.tokens, made.heldout_documents) == (len(TEXTS), shards.tokens, 0)
    assert (shards.vocab_size, shards.eos_token_id, shards.dtype) == (258, 1, np.dtype("<u2"))
    assert str(made) == f"{tmp_path}/out: 265 tokens of 5 documents to train on, 0 of 0 held out; 0.0 MB of text"


def test_a_part_of_a_document_is_a_view_of_the_file(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out")

    part = shards.read(3, 2, 5)

    assert part.tolist() == shards.read(3).tolist()[2:5]
    assert part.base is not None
    assert not part.flags.writeable


@pytest.mark.parametrize("shard_tokens", [1, 30, 1000])
def test_a_shard_is_closed_when_it_is_full_and_no_document_crosses(
    tmp_path: Path, tokenizer_folder: Path, shard_tokens: int
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    tokenize(path, tokenizer_folder, tmp_path / "one", val_fraction=0.0)

    tokenize(path, tokenizer_folder, tmp_path / "many", val_fraction=0.0, shard_tokens=shard_tokens)

    shards = TokenShards.open(tmp_path / "many", verify=True)
    sizes = [file.stat().st_size // 2 for file in sorted((tmp_path / "many").glob("*.tokens"))]
    assert ids_of(shards) == ids_of(TokenShards.open(tmp_path / "one"))
    assert len(sizes) == {1: 5, 30: 3, 1000: 1}[shard_tokens]
    assert all(size >= shard_tokens for size in sizes[:-1])


def test_a_vocabulary_past_65536_takes_uint32(tmp_path: Path):
    small = byte_tokenizer(tmp_path / "small", fill=65_536 - 258)
    large = byte_tokenizer(tmp_path / "large", fill=65_537 - 258)
    path = write_texts(tmp_path / "a.jsonl", TEXTS)

    for folder in (small, large):
        tokenize(path, folder, tmp_path / f"{folder.name}.out", val_fraction=0.0)
    narrow, wide = (TokenShards.open(tmp_path / f"{name}.out", verify=True) for name in ("small", "large"))

    assert (narrow.dtype, wide.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert ids_of(narrow) == ids_of(wide)


def test_the_same_shards_made_twice_are_byte_identical(tmp_path: Path, tokenizer_folder: Path):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * 20)

    for name in ("one", "two"):
        tokenize(path, tokenizer_folder, tmp_path / name, val_fraction=0.3, shard_tokens=100)

    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.parametrize("at_once", [1, 30, 10_000])
def test_how_many_documents_are_encoded_together_changes_no_byte(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * 20)
    tokenize(path, tokenizer_folder, tmp_path / "usual", val_fraction=0.3)

    monkeypatch.setattr(writer, "_AT_ONCE", at_once)
    tokenize(path, tokenizer_folder, tmp_path / "other", val_fraction=0.3)

    assert snapshot(tmp_path / "usual") == snapshot(tmp_path / "other")


def test_several_sources_follow_one_another(tmp_path: Path, tokenizer_folder: Path):
    sources = [write_texts(tmp_path / f"{i}.jsonl", [text]) for i, text in enumerate(TEXTS)]

    tokenize(sources, tokenizer_folder, tmp_path / "out", val_fraction=0.0)

    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    assert [tokenizer.decode(ids) for ids in ids_of(TokenShards.open(tmp_path / "out"))] == TEXTS


def test_the_standard_library_can_be_tokenized_and_the_progress_ends_where_it_should(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writer, "documents", lambda *args, **options: itertools.islice(documents(*args, **options), 50))

    made = tokenize("python-stdlib", tokenizer_folder, tmp_path / "out")

    assert made.documents + made.heldout_documents == 50
    assert made.tokens + made.heldout_tokens == made.text_bytes + 100
    assert is_token_shards(tmp_path / "out")


def test_what_is_held_out_depends_on_the_text_alone_and_copies_stay_together(tmp_path: Path, tokenizer_folder: Path):
    texts = [f"text {n % 200}" for n in range(600)]
    more = [f"other {n}" for n in range(100)]
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)

    found = []
    for name, some in (("a", texts), ("b", [*more, *texts[::-1]])):
        tokenize(write_texts(tmp_path / f"{name}.jsonl", some), tokenizer_folder, tmp_path / name, val_fraction=0.25)
        splits = [ids_of(TokenShards.open(tmp_path / name, split, verify=True)) for split in ("train", "heldout")]
        found.append([[tokenizer.decode(ids) for ids in split] for split in splits])

    (train, heldout), (train_again, heldout_again) = found
    assert sorted(train + heldout) == sorted(texts)
    assert not set(train) & set(heldout)
    assert set(heldout) == set(heldout_again) - set(more)
    assert set(train) == set(train_again) - set(more)
    assert 30 <= len(set(heldout)) <= 70


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_about_the_share_is_held_out(share: float):
    held = sum(is_held_out(str(n).encode(), share) for n in range(20_000))

    assert held / 20_000 == pytest.approx(share, abs=0.02 if share else 0)


@pytest.mark.parametrize("split", [False, True], ids="split={}".format)
def test_special_strings_in_documents_are_counted_and_split_on_request(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, split: bool
):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    (tmp_path / "a.txt").write_text(f"a{tokenizer.eos_token}b{tokenizer.eos_token}")

    with caplog.at_level("INFO"):
        tokenize(tmp_path / "a.txt", tokenizer_folder, tmp_path / "out", val_fraction=0.0, split_special_tokens=split)

    what = "are encoded as text" if split else "become control tokens; split_special_tokens encodes them as text"
    assert f"2 special-token strings in the text of 1 documents {what}" in caplog.text
    ids = TokenShards.open(tmp_path / "out").read(0).tolist()
    assert [i for i in ids if i == tokenizer.eos_token_id] == [tokenizer.eos_token_id] * (1 if split else 2)


def test_shards_know_their_tokenizer_and_their_vocabulary(tmp_path: Path, tokenizer_folder: Path):
    other = byte_tokenizer(tmp_path / "other", fill=1)
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out")

    shards.check(tokenizer_hash=tokenizer_hash(tokenizer_folder), vocab_size=258)
    shards.check()

    with pytest.raises(ValueError, match=r"out: made with another tokenizer .*; tokenize the text again"):
        shards.check(tokenizer_hash=tokenizer_hash(other))
    with pytest.raises(ValueError, match="out: made with a vocabulary of 258; the model's vocab_size is 257"):
        shards.check(vocab_size=257)


def test_the_hash_of_a_tokenizer_is_of_its_files_and_of_no_other(tmp_path: Path, tokenizer_folder: Path):
    copy = byte_tokenizer(tmp_path / "copy")
    (copy / "README.md").write_text("no part of it")

    same = tokenizer_hash(copy)
    (copy / "tokenizer_config.json").write_text("{}")

    assert same == tokenizer_hash(tokenizer_folder) != tokenizer_hash(copy)


# Failures


def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * 3)
    before = snapshot(tmp_path)
    for error in (KeyboardInterrupt(), MemoryError(), ValueError("bad")):

        def stopping(source: Any, error: BaseException = error, **_: Any):
            yield from itertools.islice(documents(source), 7)
            raise error

        monkeypatch.setattr(writer, "documents", stopping)
        monkeypatch.setattr(writer, "_AT_ONCE", 2)

        with pytest.raises(type(error)):
            tokenize(path, tokenizer_folder, tmp_path / "out", shard_tokens=50)

        assert snapshot(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here that is always full")
@pytest.mark.parametrize("copies", [1, 2000], ids=["at the end", "in the middle"])
@pytest.mark.parametrize("full", ["tokens", "documents"])
def test_a_full_disk_gets_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, full: str, copies: int
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * copies)
    before = snapshot(tmp_path)

    def on_a_full_disk(split: str, index: int) -> tuple[str, ...]:
        return tuple("/dev/full" if name.endswith(full) else name for name in shard_files(split, index))

    monkeypatch.setattr(writer, "shard_files", on_a_full_disk)

    with pytest.raises(ValueError, match=r"out cannot be written: No space left on device$"):
        tokenize(path, tokenizer_folder, tmp_path / "out", shard_tokens=100_000)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("short", [0, 1], ids=["enough", "a byte short"])
def test_a_disk_without_room_for_the_rest_is_refused_while_there_is_room(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, short: int
):
    files(tmp_path, a__txt=b"x" * 1000)
    sources = [tmp_path / "a.txt"] * 4  # 1,002 tokens of two bytes each, and a boundary of eight
    free = iter([10**9, *(3 * 2012 - step * 2012 - short for step in range(4))])  # atomic_dir asks first
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    before = snapshot(tmp_path)

    if short:
        with pytest.raises(ValueError, match=r"out needs 0\.00 GB more; .* has 0\.00 GB free"):
            tokenize(sources, tokenizer_folder, tmp_path / "out", val_fraction=0.0)
        assert snapshot(tmp_path) == before
        assert len(list(free)) == 3  # refused at the first look
    else:
        assert tokenize(sources, tokenizer_folder, tmp_path / "out", val_fraction=0.0).tokens == 4 * 1002


def test_nothing_is_overwritten(tmp_path: Path, tokenizer_folder: Path):
    (tmp_path / "out").mkdir()

    with pytest.raises(ValueError, match="out exists; nothing is overwritten"):
        tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out")


def test_bad_arguments_get_one_line_and_leave_nothing(tmp_path: Path, tokenizer_folder: Path):
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    empty = tmp_path / "empty"
    empty.mkdir()
    tokenize(path, tokenizer_folder, tmp_path / "done", val_fraction=0.0)
    no_eos = byte_tokenizer(tmp_path / "no_eos", eos=False)
    before = snapshot(tmp_path)
    bad: tuple[tuple[Any, Path, dict[str, Any], str], ...] = (
        ([], tokenizer_folder, {}, "no sources"),
        (path, tokenizer_folder, {"val_fraction": 1.0}, "val_fraction must be at least 0 and less than 1"),
        (path, tokenizer_folder, {"val_fraction": -0.1}, "val_fraction must be"),
        (path, tokenizer_folder, {"val_fraction": 1 - 1e-12}, "leaves none of 5 documents to train on"),
        (path, tokenizer_folder, {"shard_tokens": 0}, "shard_tokens must be at least 1"),
        (tmp_path / "done", tokenizer_folder, {}, "done: holds token shards already"),
        ([path, tmp_path / "nowhere"], tokenizer_folder, {}, "nowhere: does not exist"),
        (empty, tokenizer_folder, {}, "empty: no files"),
        (path, empty, {}, "no tokenizer in"),
        (path, no_eos, {}, "has no eos token to end a document with"),
        (path, tokenizer_folder, {"field": "body"}, "5 of 5 lines are broken"),
    )
    for sources, tokenizer, options, problem in bad:
        with pytest.raises(ValueError, match=problem) as refused:
            tokenize(sources, tokenizer, tmp_path / "out", **options)

        assert "\n" not in str(refused.value)
        assert snapshot(tmp_path) == before


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest.pop("sha256")  # older ones have none, and are held to their form all the same
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def flip(name: str) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[9] ^= 1
        (folder / name).write_bytes(data)

    return apply


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2])


TOKENS, BOUNDARIES = "train-00000.tokens", "train-00000.documents"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"out: no token shards \(no manifest.json\)"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is not JSON"),
    "another format": (edit(lambda m: m.update(format="x")), "format 'x', this version reads 'dsmoe token shards 1'"),
    "no vocabulary": (edit(lambda m: m.pop("vocab_size")), "`vocab_size` must be a int, got None"),
    "a true vocabulary": (edit(lambda m: m.update(vocab_size=True)), "`vocab_size` must be a int, got True"),
    "another dtype": (edit(lambda m: m.update(dtype="float32")), "dtype 'float32' is not one of uint16, uint32"),
    "no split": (edit(lambda m: m["splits"].pop("heldout")), "`heldout` must be a dict"),
    "shards of text": (edit(lambda m: m["splits"]["train"].update(shards=["a"])), "`tokens` must be a dict"),
    "an empty shard": (
        edit(lambda m: m["splits"]["train"]["shards"][0]["tokens"].update(bytes=0)),
        "a shard of 0 bytes",
    ),
    "another digit in the manifest": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"eos_token_id": 1', '"eos_token_id": 3')
        ),
        "manifest.json: damaged: its own SHA-256 is another",
    ),
    "no tokens": (lambda folder: (folder / TOKENS).unlink(), f"{TOKENS}: is missing"),
    "no boundaries": (lambda folder: (folder / BOUNDARIES).unlink(), f"{BOUNDARIES}: is missing"),
    "cut tokens": (cut(TOKENS), rf"{TOKENS}: has 528 bytes, not 530"),
    "cut boundaries": (cut(BOUNDARIES), rf"{BOUNDARIES}: has 46 bytes, not 48"),
    "a flipped token": (flip(TOKENS), f"{TOKENS}: has other bytes than were written"),
    "a flipped boundary": (flip(BOUNDARIES), f"{BOUNDARIES}: has other bytes than were written"),
}


@pytest.mark.parametrize(("spoil", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_shards_get_one_line(tmp_path: Path, tokenizer_folder: Path, spoil: Callable, problem: str):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    spoil(tmp_path / "out")

    with pytest.raises(ValueError, match=problem) as refused:
        TokenShards.open(tmp_path / "out", verify=True)

    assert "\n" not in str(refused.value)


def test_boundaries_that_do_not_ascend_are_refused_without_a_look_at_the_hashes(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    good = np.fromfile(tmp_path / "out" / BOUNDARIES, "<u8")
    for at, value in ((0, 1), (2, good[1]), (2, 2**63), (5, good[5] + 1)):
        bad = good.copy()
        bad[at] = value
        bad.tofile(tmp_path / "out" / BOUNDARIES)

        with pytest.raises(ValueError, match=f"{BOUNDARIES}: the boundaries of the documents do not ascend"):
            TokenShards.open(tmp_path / "out", verify=False)


def test_files_are_hashed_once_and_again_when_touched(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    tokens, hashed = tmp_path / "out" / TOKENS, []
    monkeypatch.setattr(manifests, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))

    TokenShards.open(tmp_path / "out")
    first, hashed[:] = sorted(hashed), []
    TokenShards.open(tmp_path / "out")
    again = list(hashed)
    stat = tokens.stat()
    flip(TOKENS)(tmp_path / "out")
    os.utime(tokens, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert first == [BOUNDARIES, TOKENS]
    assert again == []
    with pytest.raises(ValueError, match=f"{TOKENS}: has other bytes than were written"):
        TokenShards.open(tmp_path / "out")


def test_shards_in_a_folder_that_cannot_be_written_are_read(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)

    def refuse(path: Path, fields: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(manifests, "write_json", refuse)

    assert len(TokenShards.open(tmp_path / "out")) == len(TEXTS)
    assert not (tmp_path / "out" / ".verified").exists()


def test_an_id_beyond_the_vocabulary_is_never_read(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out")
    with (tmp_path / "out" / TOKENS).open("r+b") as file:  # while the run has it mapped
        file.write(b"\xff\xff")

    with pytest.raises(ValueError, match=rf"{TOKENS}: damaged: token id 65535 in document 0, the vocabulary has \d+"):
        shards.read(0)


def test_an_unknown_split_is_refused(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)

    with pytest.raises(ValueError, match="split 'test' is not one of train, heldout"):
        TokenShards.open(tmp_path / "out", "test")
