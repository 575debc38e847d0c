"""Token shards: writing, reading, damage. Bad manifests and files are in the table `DAMAGE`."""

import errno
import itertools
import json
import os
import shutil
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
    is_token_shards,
    is_validation,
    sources,
    split_writer,
    tokenization,
    tokenize,
    tokenizer_hash,
    validation_threshold,
)
from dsmoe_jax.train.data.split_writer import shard_files
from tests.helpers.corpus import TEXTS, byte_tokenizer, ids_of, write_texts
from tests.helpers.hf_folder import snapshot


def test_shards_round_trip(tmp_path: Path, tokenizer_folder: Path):
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)

    made = tokenize(path, tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out", verify=True)

    assert [tokenizer.decode(ids) for ids in ids_of(shards)] == TEXTS
    assert ids_of(shards) == [[0, *tokenizer.encode(text, add_special_tokens=False), 1] for text in TEXTS]
    assert shards.lengths.tolist() == [len(text.encode()) + 2 for text in TEXTS]
    assert (made.train, made.validation.documents) == ((len(TEXTS), shards.tokens, 0), 0)
    assert (shards.vocab_size, shards.eos_token_id, shards.dtype) == (258, 1, np.dtype("<u2"))
    assert str(made) == f"{tmp_path}/out: training: 265 tokens of 5 documents; validation: 0 tokens of 0 documents"


def test_read_returns_a_view_of_the_file(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out")

    part = shards.read(3, 2, 5)

    assert part.tolist() == shards.read(3).tolist()[2:5]
    assert part.base is not None
    assert not part.flags.writeable


@pytest.mark.parametrize("shard_tokens", [1, 30, 1000])
def test_full_shards_are_closed_between_documents(tmp_path: Path, tokenizer_folder: Path, shard_tokens: int):
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    tokenize(path, tokenizer_folder, tmp_path / "one", val_fraction=0.0)

    tokenize(path, tokenizer_folder, tmp_path / "many", val_fraction=0.0, shard_tokens=shard_tokens)

    shards = TokenShards.open(tmp_path / "many", verify=True)
    sizes = [file.stat().st_size // 2 for file in sorted((tmp_path / "many").glob("*.tokens"))]
    assert ids_of(shards) == ids_of(TokenShards.open(tmp_path / "one"))
    assert len(sizes) == {1: 5, 30: 3, 1000: 1}[shard_tokens]
    assert all(size >= shard_tokens for size in sizes[:-1])


def test_vocabulary_beyond_65536_uses_uint32(tmp_path: Path):
    small = byte_tokenizer(tmp_path / "small", fill=65_536 - 258)
    large = byte_tokenizer(tmp_path / "large", fill=65_537 - 258)
    path = write_texts(tmp_path / "a.jsonl", TEXTS)

    for folder in (small, large):
        tokenize(path, folder, tmp_path / f"{folder.name}.out", val_fraction=0.0)
    narrow, wide = (TokenShards.open(tmp_path / f"{name}.out", verify=True) for name in ("small", "large"))

    assert (narrow.dtype, wide.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert ids_of(narrow) == ids_of(wide)


def test_shards_are_reproducible(tmp_path: Path, tokenizer_folder: Path):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * 20)

    for name in ("one", "two"):
        tokenize(path, tokenizer_folder, tmp_path / name, val_fraction=0.3, shard_tokens=100)

    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.parametrize("at_once", [1, 30, 10_000])
def test_encoding_batch_size_changes_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * 20)
    tokenize(path, tokenizer_folder, tmp_path / "usual", val_fraction=0.3)

    monkeypatch.setattr(tokenization, "_BATCH_CHARS", at_once)
    tokenize(path, tokenizer_folder, tmp_path / "other", val_fraction=0.3)

    assert snapshot(tmp_path / "usual") == snapshot(tmp_path / "other")


def test_several_sources_are_concatenated(tmp_path: Path, tokenizer_folder: Path):
    sources = [write_texts(tmp_path / f"{i}.jsonl", [text]) for i, text in enumerate(TEXTS)]

    tokenize(sources, tokenizer_folder, tmp_path / "out", val_fraction=0.0)

    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    assert [tokenizer.decode(ids) for ids in ids_of(TokenShards.open(tmp_path / "out"))] == TEXTS


def test_standard_library_can_be_tokenized(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenization, "read_texts", lambda *args: itertools.islice(sources.read_texts(*args), 50))

    made = tokenize("python-stdlib", tokenizer_folder, tmp_path / "out")

    assert made.train.documents + made.validation.documents == 50
    assert made.train.tokens + made.validation.tokens == made.text_bytes + 100
    assert is_token_shards(tmp_path / "out")


def test_validation_split_depends_on_text_alone(tmp_path: Path, tokenizer_folder: Path):
    texts = [f"text {n % 200}" for n in range(600)]
    more = [f"other {n}" for n in range(100)]
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)

    found = []
    for name, some in (("a", texts), ("b", [*more, *texts[::-1]])):
        tokenize(write_texts(tmp_path / f"{name}.jsonl", some), tokenizer_folder, tmp_path / name, val_fraction=0.25)
        splits = [ids_of(TokenShards.open(tmp_path / name, split, verify=True)) for split in ("train", "validation")]
        found.append([[tokenizer.decode(ids) for ids in split] for split in splits])

    (train, validation), (train_again, heldout_again) = found
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert set(validation) == set(heldout_again) - set(more)
    assert set(train) == set(train_again) - set(more)
    assert 30 <= len(set(validation)) <= 70


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_validation_fraction_is_approximate(share: float):
    count = sum(is_validation(str(n).encode(), validation_threshold([], share)) for n in range(20_000))

    assert count / 20_000 == pytest.approx(share, abs=0.02 if share else 0)


@pytest.mark.parametrize("split", [False, True], ids="split={}".format)
def test_special_token_strings_in_documents_are_counted(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, split: bool
):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    (tmp_path / "a.txt").write_text(f"a{tokenizer.eos_token}b{tokenizer.eos_token}")

    with caplog.at_level("INFO"):
        tokenize(tmp_path / "a.txt", tokenizer_folder, tmp_path / "out", val_fraction=0.0, split_special_tokens=split)

    found = "2 special-token strings in 1 document"
    assert (f"encoded {found} as text" if split else f"{found} become control tokens") in caplog.text
    ids = TokenShards.open(tmp_path / "out").read(0).tolist()
    assert [i for i in ids if i == tokenizer.eos_token_id] == [tokenizer.eos_token_id] * (1 if split else 2)


def test_check_compares_tokenizer_and_vocabulary(tmp_path: Path, tokenizer_folder: Path):
    other = byte_tokenizer(tmp_path / "other", fill=1)
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out")

    shards.check(tokenizer_hash=tokenizer_hash(tokenizer_folder), vocab_size=258)
    shards.check()

    with pytest.raises(ValueError, match=r"out: written with another tokenizer .*; tokenize the text again"):
        shards.check(tokenizer_hash=tokenizer_hash(other))
    with pytest.raises(ValueError, match="out: the model's vocab_size must be at least 258, got 257"):
        shards.check(vocab_size=257)


def test_tokenizer_hash_covers_its_files_only(tmp_path: Path, tokenizer_folder: Path):
    copy = byte_tokenizer(tmp_path / "copy")
    (copy / "README.md").write_text("no part of it")

    same = tokenizer_hash(copy)
    (copy / "tokenizer_config.json").write_text("{}")

    assert same == tokenizer_hash(tokenizer_folder) != tokenizer_hash(copy)


def test_interrupted_writing_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * 3)
    before = snapshot(tmp_path)
    for error in (KeyboardInterrupt(), MemoryError(), ValueError("bad")):

        def stopping(*args: Any, error: BaseException = error):
            yield from itertools.islice(sources.read_texts(*args), 7)
            raise error

        monkeypatch.setattr(tokenization, "read_texts", stopping)
        monkeypatch.setattr(tokenization, "_BATCH_CHARS", 2)

        with pytest.raises(type(error)):
            tokenize(path, tokenizer_folder, tmp_path / "out", shard_tokens=50)

        assert snapshot(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here that is always full")
@pytest.mark.parametrize("copies", [1, 2000], ids=["at the end", "in the middle"])
@pytest.mark.parametrize("full", ["tokens", "documents"])
def test_full_disk_gives_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, full: str, copies: int
):
    path = write_texts(tmp_path / "a.jsonl", TEXTS * copies)
    before = snapshot(tmp_path)

    def on_a_full_disk(split: str, index: int) -> tuple[str, ...]:
        return tuple("/dev/full" if name.endswith(full) else name for name in shard_files(split, index))

    monkeypatch.setattr(split_writer, "shard_files", on_a_full_disk)

    with pytest.raises(ValueError, match=r"out cannot be written: No space left on device$"):
        tokenize(path, tokenizer_folder, tmp_path / "out", shard_tokens=100_000)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("short", [0, 1], ids=["enough", "a byte short"])
def test_disk_space_for_the_rest_is_checked_early(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, short: int
):
    (tmp_path / "a.txt").write_bytes(b"x" * 1000)
    sources = [tmp_path / "a.txt"] * 4  # 1,002 tokens of 2 bytes and an offset of 8 bytes each
    free = iter([10**9, *(3 * 2012 - step * 2012 - short for step in range(4))])  # atomic_dir checks first
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    before = snapshot(tmp_path)

    if short:
        with pytest.raises(ValueError, match=r"out needs 0\.00 GB more; .* has 0\.00 GB free"):
            tokenize(sources, tokenizer_folder, tmp_path / "out", val_fraction=0.0)
        assert snapshot(tmp_path) == before
        assert len(list(free)) == 3  # refused at the first check
    else:
        assert tokenize(sources, tokenizer_folder, tmp_path / "out", val_fraction=0.0).train.tokens == 4 * 1002


def test_existing_output_is_refused(tmp_path: Path, tokenizer_folder: Path):
    (tmp_path / "out").mkdir()

    with pytest.raises(ValueError, match="out exists; nothing is overwritten"):
        tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out")


def test_bad_arguments_give_one_line_and_leave_nothing(tmp_path: Path, tokenizer_folder: Path):
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    empty = tmp_path / "empty"
    empty.mkdir()
    tokenize(path, tokenizer_folder, tmp_path / "done", val_fraction=0.0)
    no_eos = byte_tokenizer(tmp_path / "no_eos", eos=False)
    before = snapshot(tmp_path)
    bad: tuple[tuple[Any, Path, dict[str, Any], str], ...] = (
        ([], tokenizer_folder, {}, "sources must name at least one source"),
        (path, tokenizer_folder, {"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\)"),
        (path, tokenizer_folder, {"val_fraction": -0.1}, "val_fraction must be"),
        (path, tokenizer_folder, {"val_fraction": 1 - 1e-12}, "leaves none of 5 documents to train on"),
        (path, tokenizer_folder, {"shard_tokens": 0}, "shard_tokens must be at least 1"),
        (tmp_path / "done", tokenizer_folder, {}, "done: holds token shards, already tokenized"),
        ([path, tmp_path / "nowhere"], tokenizer_folder, {}, "nowhere: does not exist"),
        (empty, tokenizer_folder, {}, "empty: no files"),
        (path, empty, {}, "no tokenizer; looked for"),
        (path, tmp_path / "nix", {}, "nix: does not exist"),
        (path, no_eos, {}, "has no EOS token"),
        (path, tokenizer_folder, {"field": "body"}, "5 of 5 lines are malformed"),
    )
    for source, tokenizer, options, problem in bad:
        with pytest.raises(ValueError, match=problem) as refused:
            tokenize(source, tokenizer, tmp_path / "out", **options)

        assert "\n" not in str(refused.value)
        assert snapshot(tmp_path) == before


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest.pop("sha256")  # old manifests have none; their types are checked
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


TOKENS, OFFSETS = "train-00000.tokens", "train-00000.documents"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"out: no token shards \(no manifest.json\)"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is not JSON"),
    "another format": (edit(lambda m: m.update(format="x")), "format must be 'dsmoe token shards 2', got 'x'"),
    "no vocabulary": (edit(lambda m: m.pop("vocab_size")), "`vocab_size` must be of type int, got None"),
    "a true vocabulary": (edit(lambda m: m.update(vocab_size=True)), "`vocab_size` must be of type int, got True"),
    "another dtype": (
        edit(lambda m: m.update(dtype="float32")),
        "`dtype` must be one of uint16, uint32, got 'float32'",
    ),
    "no split": (edit(lambda m: m["splits"].pop("validation")), "`validation` must be of type dict"),
    "shards of text": (edit(lambda m: m["splits"]["train"].update(shards=["a"])), "`tokens` must be of type str"),
    "an empty shard": (
        edit(lambda m: m["files"][TOKENS].update(bytes=0)),
        f"'{TOKENS}' has impossible size 0",
    ),
    "another digit in the manifest": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"eos_token_id": 1', '"eos_token_id": 3')
        ),
        "damaged: 'manifest.json' does not match its SHA-256",
    ),
    "no tokens": (lambda folder: (folder / TOKENS).unlink(), f"'{TOKENS}' is missing"),
    "no boundaries": (lambda folder: (folder / OFFSETS).unlink(), f"'{OFFSETS}' is missing"),
    "cut tokens": (cut(TOKENS), rf"'{TOKENS}' has 528 bytes, expected 530"),
    "cut boundaries": (cut(OFFSETS), rf"'{OFFSETS}' has 46 bytes, expected 48"),
    "a flipped token": (flip(TOKENS), f"'{TOKENS}' does not match its SHA-256"),
    "a flipped boundary": (flip(OFFSETS), f"'{OFFSETS}' does not match its SHA-256"),
}


@pytest.mark.parametrize(("spoil", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_shards_give_one_line(tmp_path: Path, tokenizer_folder: Path, spoil: Callable, problem: str):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    spoil(tmp_path / "out")

    with pytest.raises(ValueError, match=problem) as refused:
        TokenShards.open(tmp_path / "out", verify=True)

    assert "\n" not in str(refused.value)


def test_unordered_offsets_are_refused_without_hashing(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    good = np.fromfile(tmp_path / "out" / OFFSETS, "<u8")
    for at, value in ((0, 1), (2, good[1]), (2, 2**63), (5, good[5] + 1)):
        bad = good.copy()
        bad[at] = value
        bad.tofile(tmp_path / "out" / OFFSETS)

        with pytest.raises(ValueError, match=f"{OFFSETS}: document offsets must ascend from 0"):
            TokenShards.open(tmp_path / "out", verify=False)


def test_files_are_hashed_once_until_they_change(
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

    assert first == ["tokenizer.json", "tokenizer_config.json", OFFSETS, TOKENS]
    assert again == []
    with pytest.raises(ValueError, match=f"'{TOKENS}' does not match its SHA-256"):
        TokenShards.open(tmp_path / "out")


def test_shards_in_a_read_only_folder_are_read(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)

    def refuse(path: Path, fields: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(manifests, "write_json", refuse)

    assert len(TokenShards.open(tmp_path / "out")) == len(TEXTS)
    assert not (tmp_path / "out" / ".verified").exists()


def test_id_beyond_the_vocabulary_is_refused(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)
    shards = TokenShards.open(tmp_path / "out")
    with (tmp_path / "out" / TOKENS).open("r+b") as file:  # while the run has it mapped
        file.write(b"\xff\xff")

    with pytest.raises(ValueError, match=rf"{TOKENS}: damaged: token ids must be below vocab_size \d+, got 65535"):
        shards.read(0)


def test_unknown_split_is_refused(tmp_path: Path, tokenizer_folder: Path):
    tokenize(write_texts(tmp_path / "a.jsonl", TEXTS), tokenizer_folder, tmp_path / "out", val_fraction=0.0)

    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        TokenShards.open(tmp_path / "out", "test")
