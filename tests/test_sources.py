"""Sources of text in every file format. Bad input is in the tables `MALFORMED` and `BAD_SOURCES`."""

import gzip
import logging
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.train.data import (
    columnar,
    documents,
    formats,
    source_bytes,
    tokenize,
    warn_on_overlap,
)
from tests.helpers.corpus import TEXTS, jsonl, write_texts

MODULES = {".parquet": "pyarrow", ".jsonl.zst": "zstandard"}  # required by a format


FORMATS = (".jsonl", ".jsonl.gz", *MODULES)


def texts_of(source: str | Path, **options: Any) -> list[str]:
    return [document.text for document in documents(source, **options)]


def files(folder: Path, **contents: bytes) -> Path:
    """Write files; in names __ is a dot and _ a slash."""
    for name, data in contents.items():
        path = folder / name.replace("__", ".").replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("end", FORMATS)
def test_every_format_gives_the_same_texts(tmp_path: Path, end: str, field: str):
    pytest.importorskip(MODULES.get(end, "json"))
    path = write_texts(tmp_path / f"a{end}", TEXTS, field)

    found = list(documents(path, field=field))

    assert [document.text for document in found] == TEXTS
    assert [document.where for document in found] == [f"{path}:{n + 1}" for n in range(len(TEXTS))]


@pytest.mark.parametrize("end", [".txt", ".py", ""])
def test_other_files_are_one_document_each(tmp_path: Path, end: str):
    (tmp_path / f"a{end}").write_bytes("\ufeffa\r\nb\n".encode())

    assert list(documents(tmp_path / f"a{end}")) == [(str(tmp_path / f"a{end}"), "a\r\nb\n")]


def test_folder_is_read_in_path_order(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    files(tmp_path, b__py=b"b", a_z__txt=b"a/z", a_b__jsonl=jsonl(["1", "2"]), c_d_e__md=b"c/d/e", image__png=b"\xff\0")
    files(tmp_path, blank__txt=b" \n", zeros=b"a\0", __git_config=b"hidden", __hidden=b"hidden")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")

    found = texts_of(tmp_path)

    assert found == ["1", "2", "a/z", "b", "c/d/e"]
    assert "skipped 1 blank text\n" in caplog.text
    assert "skipped 2 files without UTF-8 text" in caplog.text


def test_pattern_finds_each_file_once(tmp_path: Path):
    files(tmp_path, a__txt=b"a", sub_b__txt=b"b", sub_c__md=b"c", sub_image__txt=b"\xff")

    assert texts_of(f"{tmp_path}/**") == ["a", "b", "c"]
    assert texts_of(f"{tmp_path}/**/*.txt") == ["a", "b"]
    assert texts_of(f"{tmp_path}/su?") == ["b", "c"]


def test_standard_library_has_no_tests_and_is_reproducible():
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
def test_progress_counts_all_bytes(tmp_path: Path, end: str):
    pytest.importorskip(MODULES.get(end, "json"))
    write_texts(tmp_path / f"a{end}", TEXTS * 50)
    steps: list[int] = []

    list(documents(tmp_path, advance=steps.append))

    assert sum(steps) == source_bytes(tmp_path) == (tmp_path / f"a{end}").stat().st_size
    assert min(steps) >= 0


@pytest.mark.parametrize("source", ["", " ", "\t\n"])
def test_empty_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path, source: str):
    monkeypatch.chdir(files(tmp_path, a__txt=b"private"))

    for use in (texts_of, source_bytes, lambda source: tokenize(source, tokenizer_folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="source must be a path, got an empty string"):
            use(source)
    with pytest.raises(ValueError, match="tokenizer folder must be a path, got an empty string"):
        tokenize("a.txt", source, tmp_path / "out")
    with pytest.raises(ValueError, match="output path must be a path, got an empty string"):
        tokenize("a.txt", tokenizer_folder, source)


def test_tilde_is_expanded_and_variables_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(files(tmp_path, a__txt=b"a", b__txt=b"b")))

    assert texts_of("~/a.txt") == ["a"]
    assert texts_of("~/*.txt") == ["a", "b"]
    with pytest.raises(ValueError, match=r"\$HOME/a.txt: does not exist"):
        texts_of("$HOME/a.txt")


def test_links_are_followed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
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
    assert f"left out dangling links: {home}/dangling" in caplog.text
    assert f"left out duplicate names of files: {home}/thrice.txt, {home}/twice.txt" in caplog.text
    assert f"left out links to a parent folder or one already read: {home}/sub/loop" in caplog.text.replace(
        f"{home}/up, ", ""
    )


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.*", "/*"])
def test_outputs_of_this_project_are_left_out(
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
        f"left out the output of this command: {tmp_path}/own",
        f"left out files of a model or tokenizer: {tmp_path}/hf/",
    ):
        assert reason in caplog.text
    with pytest.raises(ValueError, match=f"{tmp_path}/native: is a native checkpoint, not a folder of data"):
        texts_of(tmp_path / "native")
    with pytest.raises(ValueError, match=f"{tmp_path}/native: is a native checkpoint, not a folder of data"):
        texts_of(f"{tmp_path}/native/*")
    with pytest.raises(ValueError, match="is the output of this command"):
        texts_of(tmp_path / "own", exclude=[tmp_path / "own"])


def test_overlapping_sources_and_pipes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe")

    warn_on_overlap([tmp_path, tmp_path / "a.txt"])

    assert texts_of(tmp_path) == ["a"]
    assert f"{tmp_path}/a.txt: already in source {tmp_path}; reading it twice" in caplog.text
    assert f"left out special files: {tmp_path}/pipe" in caplog.text


MALFORMED = {
    b"{": "is not JSON",
    b"[1]": "is not a JSON object",
    b'"text"': "is not a JSON object",
    b'{"txt": "a"}': "has no field 'text'",
    b'{"text": null}': "must have a string as 'text', got NoneType",
    b'{"text": 3}': "must have a string as 'text', got int",
    b'{"text": "\\ud800"}': "has a lone surrogate",
    b'{"text": "\xff"}': "is not UTF-8",
    b"[" * 100_000: "is not JSON",
    b'{"text": "a", "more": ' + b"[" * 70 + b"]" * 70 + b"}": "has JSON nested too deeply; at most 64 levels",
    b'{"text": "a", "text": "b"}': "has the key 'text' twice",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "is not JSON",
}


@pytest.mark.parametrize(("line", "problem"), MALFORMED.items(), ids=MALFORMED.values())
def test_malformed_line_is_logged_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, problem: str
):
    good = jsonl(["a"] * 60)
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good)

    assert texts_of(path) == ["a"] * 120
    assert f"Skipping malformed line: {path}:62 {problem}" in caplog.text
    assert "skipped 1 malformed line of 121" in caplog.text


def test_log_names_ten_malformed_lines_and_counts_all(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.jsonl").write_bytes((jsonl(["a"]) + b"{\n") * 30)

    texts_of(tmp_path / "a.jsonl", max_malformed_fraction=0.5)

    assert caplog.text.count("Skipping malformed line") == 10
    assert "skipped 30 malformed lines of 60" in caplog.text


def test_one_malformed_line_in_a_hundred_is_allowed(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a"] * 99) + b"{\n")
    assert len(texts_of(path)) == 99

    path.write_bytes(jsonl(["a"] * 98) + b"{\n")
    with pytest.raises(
        ValueError, match=r"a.jsonl: 1 of 99 lines are malformed, at most 1 % may be; the first: .*:99 is not"
    ):
        texts_of(path)


def test_file_without_a_valid_line_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"] * 2, "txt"))
    with pytest.raises(ValueError, match="2 of 2 lines are malformed"):
        texts_of(tmp_path / "a.jsonl", max_malformed_fraction=1.0)

    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"] * 1001, "txt"))
    with pytest.raises(ValueError, match=r"the first 1000 lines are all malformed: .*:1 has no field 'text'"):
        texts_of(tmp_path / "a.jsonl", max_malformed_fraction=1.0)


def test_parquet_row_without_text_is_malformed(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = write_texts(tmp_path / "a.parquet", ["a", None, "b"])  # pyright: ignore

    assert texts_of(path, max_malformed_fraction=0.5) == ["a", "b"]
    with pytest.raises(ValueError, match=r"1 of 3 lines are malformed.*:2 must have a string as 'text', got None"):
        texts_of(path)


ZST = b"\x28\xb5\x2f\xfd"


BAD_SOURCES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "missing": ({}, "a.txt", "a.txt: does not exist"),
    "no match": ({}, "*.txt", r"\*.txt: no files"),
    "empty folder": ({}, "", "no files"),
    "only hidden": ({"__hidden": b"a"}, "", "no files"),
    "blank": ({"a__txt": b" \n"}, "a.txt", "a.txt: no text found"),
    "no lines": ({"a__jsonl": b"\n"}, "a.jsonl", "a.jsonl: no text found"),
    "only binary": ({"a": b"\0"}, "", "no text found"),
    "named binary": ({"a__txt": b"a\0"}, "a.txt", "a.txt: is not text: contains null bytes"),
    "named latin-1": ({"a__txt": b"\xe4"}, "a.txt", "a.txt: is not UTF-8"),
    "no gzip": ({"a__jsonl__gz": b"junk"}, "a.jsonl.gz", "a.jsonl.gz: cannot be read"),
    "torn gzip": ({"a__jsonl__gz": gzip.compress(jsonl(TEXTS))[:-9]}, "a.jsonl.gz", "a.jsonl.gz: cannot be read"),
    "no zstd": ({"a__jsonl__zst": b"junkjunk"}, "a.jsonl.zst", "a.jsonl.zst: cannot be read"),
    "torn zstd": ({"a__jsonl__zst": ZST}, "a.jsonl.zst", "a.jsonl.zst: cannot be read .truncated"),
    "no parquet": ({"a__parquet": b"junk"}, "a.parquet", "a.parquet: cannot be read"),
}


@pytest.mark.parametrize(("contents", "source", "problem"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_give_one_line(tmp_path: Path, contents: dict[str, bytes], source: str, problem: str):
    pytest.importorskip(next((module for end, module in MODULES.items() if source.endswith(end)), "json"))
    files(tmp_path, **contents)

    with pytest.raises(ValueError, match=problem) as refused:
        texts_of(f"{tmp_path}/{source}")

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_long_line_is_refused_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str):
    pytest.importorskip(MODULES.get(end, "json"))
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    write_texts(tmp_path / f"a{end}", ["a" * 900, "b", "c" * 990, "d"])

    with pytest.raises(ValueError, match=r"cannot be read .a line may have at most 1,000 bytes, line 3 has more"):
        texts_of(tmp_path / f"a{end}")


def test_long_zstd_line_takes_little_memory(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as bomb:
        bomb.write(b'{"text":"')
        for _ in range(200):
            bomb.write(bytes(1 << 20))
    tracemalloc.start()

    with pytest.raises(ValueError, match="a line may have at most 33,554,432 bytes, line 1 has more"):
        texts_of(path)

    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()


def test_large_zstd_window_is_refused(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    options = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=options)
    with (tmp_path / "a.jsonl.zst").open("wb") as file, compressor.stream_writer(file) as stream:
        stream.write(jsonl(["a"]))

    with pytest.raises(ValueError, match=r"a.jsonl.zst: cannot be read .*too much memory"):
        texts_of(tmp_path / "a.jsonl.zst")


def test_endless_blank_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "_MAX_BLANK", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["a"]) + b"\n" * 20))

    with pytest.raises(ValueError, match="lines 2 to 12 are blank"):
        texts_of(tmp_path / "a.jsonl.gz")


def test_json_that_takes_much_memory_is_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "_SMALL", 1000)
    monkeypatch.setattr(formats, "_MAX_PARSED_BYTES", 50_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]) + b'{"text": "b", "more": [' + b"[]," * 400 + b"[]]}\n")

    with pytest.raises(ValueError, match=r"a.jsonl:2 has JSON that may take [\d,]+ bytes in memory, more than 50,000"):
        texts_of(tmp_path / "a.jsonl")


def test_large_text_file_is_refused_unread(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a")
    os.truncate(tmp_path / "a.txt", 1 << 36)

    with pytest.raises(ValueError, match=r"at most 1,073,741,824 bytes, got 68,719,476,736: split it"):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("rows", [1, 500])
def test_long_parquet_cell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 10_000)
    path = write_texts(tmp_path / "a.parquet", ["a" * 20_000, *map(str, range(rows - 1))])

    with pytest.raises(ValueError, match=r"at most 10,000 bytes, got [12]0,\d\d\d"):
        texts_of(path)


def test_parquet_rows_share_a_text_in_memory(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = write_texts(tmp_path / "a.parquet", ["a" * (1 << 20)] * 100)
    tracemalloc.start()

    size = sum(len(document.text) for document in documents(path))

    assert size == 100 << 20
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_parquet_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(columnar, "_SMALL_COLUMN", 100_000)
    table = pyarrow.table({"text": ["a" * 3_000_000]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)

    with pytest.raises(ValueError, match=r"column text expands from [\d,]+ to 3,000,\d\d\d bytes"):
        texts_of(tmp_path / "a.parquet")


def test_pipe_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "a.txt")

    with pytest.raises(ValueError, match=r"a\.txt: is not a regular file"):
        texts_of(tmp_path / "a.txt")


def test_zstd_file_truncated_anywhere_is_refused(tmp_path: Path):
    pytest.importorskip("zstandard")
    content = write_texts(tmp_path / "a.jsonl.zst", TEXTS * 3).read_bytes()
    ends = []

    for size in range(1, len(content)):
        (tmp_path / "a.jsonl.zst").write_bytes(content[:size])
        try:
            ends += [size] if len(texts_of(tmp_path / "a.jsonl.zst", max_malformed_fraction=0.2)) else []
        except ValueError:
            continue

    assert len(ends) <= 1  # truncated between its two frames the file is valid


def test_missing_parquet_column_lists_the_columns(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = write_texts(tmp_path / "a.parquet", TEXTS)

    with pytest.raises(ValueError, match="has no column 'body', only id, text"):
        texts_of(path, field="body")


@pytest.mark.parametrize(("end", "module"), MODULES.items(), ids=MODULES)
def test_missing_library_error_says_how_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, module: str
):
    (tmp_path / f"a{end}").write_bytes(b"x")
    for name in (module, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ValueError, match=rf"requires {module}.*: pip install 'dsmoe_jax\[data\]'"):
        texts_of(tmp_path / f"a{end}")
