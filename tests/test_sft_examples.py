"""Writing and reading of fine-tuning examples. Bad input is in the tables `BAD_ARGUMENTS` and `DAMAGE`."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.data import TokenShards, is_token_shards, tokenizer_hash
from dsmoe_jax.train.sft import Examples, is_examples, show, write_examples
from dsmoe_jax.train.sft.formats import Completion
from tests.helpers.corpus import BOS, EOS, byte_tokenizer
from tests.helpers.sft import CHAT, RECORDS, chat, jsonl, read

LONG = 10_000


CORPUS = [{"prompt": f"say {n}", "completion": "number " * (n % 7) + str(n)} for n in range(60)]


@pytest.mark.parametrize(
    ("split", "said_of_them"),
    [
        (False, "4 special-token strings in 2 examples become control tokens; set split_special_tokens"),
        (True, "encoded 4 special-token strings in 2 examples as text"),
    ],
)
def test_special_token_strings_in_examples_are_counted(
    tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: bool, said_of_them: str
):
    lines = [{"prompt": f"a{EOS}{EOS}", "completion": BOS}, {"prompt": "a", "completion": "b"}]
    lines += [{"messages": chat(f"x{EOS}", "y").messages}]

    with caplog.at_level(logging.INFO):
        source = jsonl(tmp_path / "a.jsonl", lines)
        write_examples(source, tokenizer_folder, tmp_path / "out", sequence_length=LONG, split_special_tokens=split)

    assert said_of_them in caplog.text
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["split_special_tokens"] is split


def test_ignored_fields_are_logged_once(tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    lines = [{"messages": [{**CHAT[0], "id": n}, CHAT[1]], "source": "web", "score": n, "weight": 1} for n in range(3)]

    write_examples(jsonl(tmp_path / "a.jsonl", lines), tokenizer_folder, tmp_path / "out", sequence_length=LONG)

    assert caplog.text.count("ignored fields: messages[].id (3 lines), score (3 lines), source (3 lines)") == 1


def test_files_of_the_run_are_excluded(tmp_path: Path, tokenizer_folder: Path):
    jsonl(tmp_path / "a.jsonl", CORPUS)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    jsonl(run / "metrics.jsonl", [{"step": 1}] * 9)

    found = write_examples(tmp_path, tokenizer_folder, run / "examples", sequence_length=LONG, exclude=[run])

    assert found.train.documents == len(CORPUS)


def examples_of(found: Examples) -> list[tuple[list[int], list[bool]]]:
    return [(tokens.tolist(), loss_mask.tolist()) for tokens, loss_mask in map(found.example, range(len(found)))]


def test_examples_round_trip(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer):
    source = jsonl(tmp_path / "a.jsonl", CORPUS)

    report = write_examples(source, tokenizer_folder, tmp_path / "out", sequence_length=LONG, val_fraction=0.2)

    train, validation = (Examples.open(tmp_path / "out", split, verify=True) for split in ("train", "validation"))
    want = [read(Completion(**line), tokenizer) for line in CORPUS]
    pairs = [(tokens.tolist(), loss_mask.tolist()) for tokens, loss_mask in want]
    assert sorted(examples_of(train) + examples_of(validation)) == sorted(pairs)
    assert examples_of(train) == [pair for pair in pairs if pair in examples_of(train)]  # in order
    assert 0 < len(validation) < 30
    assert report.train[:2] == (len(train), train.tokens) == (len(train), train.lengths.sum())
    assert report.train.loss_tokens == sum(sum(loss_mask) for _, loss_mask in examples_of(train))
    assert report.validation[:2] == (len(validation), validation.tokens)
    assert train.example(0).tokens.dtype == np.int32
    assert train.example(0).loss_mask.dtype == bool
    assert (train.vocab_size, train.tokenizer_hash) == (tokenizer.vocab_size, tokenizer_hash(tokenizer_folder))


def test_examples_are_token_shards_with_loss_masks(tmp_path: Path, tokenizer_folder: Path):
    write_examples(jsonl(tmp_path / "a.jsonl", CORPUS), tokenizer_folder, tmp_path / "out", sequence_length=LONG)

    assert is_examples(tmp_path / "out")
    assert is_token_shards(tmp_path / "out")
    assert TokenShards.open(tmp_path / "out").tokens == Examples.open(tmp_path / "out").tokens
    assert not is_examples(tmp_path)
    with pytest.raises(ValueError, match="out: holds token shards, already tokenized"):
        write_examples(tmp_path / "out", tokenizer_folder, tmp_path / "other", sequence_length=LONG)


def test_file_formats_give_equal_examples(tmp_path: Path, tokenizer_folder: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet, zstandard = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("zstandard")
    lines = [*({"messages": chat(f"q {n}", f"a {n}").messages} for n in range(9))]
    plain = jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "d.parquet")

    digests = {
        write_examples(path, tokenizer_folder, tmp_path / path.name[0], sequence_length=LONG)
        and Examples.open(home).digest
        for path in sorted(tmp_path.iterdir())
        for home in [tmp_path / path.name[0]]
    }

    assert len(digests) == 1


def test_parquet_rows_may_mix_formats(tmp_path: Path, tokenizer_folder: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = [fields for fields, _ in RECORDS.values()]
    schema = sorted({name for fields in lines for name in fields} - {"id"})
    rows = [{name: fields.get(name) for name in schema} for fields in lines if "id" not in fields]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    found = write_examples(tmp_path / "a.parquet", tokenizer_folder, tmp_path / "out", sequence_length=LONG)

    assert found.train.documents == len(rows)


def test_other_files_in_a_folder_are_skipped(tmp_path: Path, tokenizer_folder: Path, caplog: Any):
    caplog.set_level(logging.INFO)
    home = tmp_path / "data"
    home.mkdir()
    jsonl(home / "a.jsonl", CORPUS)
    (home / "README.md").write_text("about")

    assert write_examples(home, tokenizer_folder, tmp_path / "out", sequence_length=LONG).train.documents == len(CORPUS)
    assert "skipped 1 file of formats other than" in caplog.text


def test_validation_split_depends_on_content_alone(tmp_path: Path, tokenizer_folder: Path):
    pairs = [{"instruction": f"say {n}", "output": str(n)} for n in range(30)]
    for name, lines in {"one": pairs, "twice": pairs * 2, "turned": pairs[::-1]}.items():
        write_examples(
            jsonl(tmp_path / f"{name}.jsonl", lines),
            tokenizer_folder,
            tmp_path / name,
            sequence_length=LONG,
            val_fraction=0.3,
        )
    chats = [{"messages": chat(line["instruction"], line["output"]).messages} for line in pairs]
    chats = jsonl(tmp_path / "chats.jsonl", chats)
    write_examples(
        chats,
        tokenizer_folder,
        tmp_path / "chats",
        sequence_length=LONG,
        val_fraction=0.3,
        template="deepseek-instruct",
    )

    def validation(name: str) -> list[str]:
        found = Examples.open(tmp_path / name, "validation")
        decode = Tokenizer.from_pretrained(tokenizer_folder).decode
        answers = [decode(tokens[loss_mask]) for tokens, loss_mask in map(found.example, range(len(found)))]
        return sorted(answer.removesuffix("\n<|EOT|>").strip() for answer in answers)

    assert validation("twice") == sorted(validation("one") * 2)
    assert validation("turned") == validation("one") == validation("chats")


def test_digest_covers_tokens_and_loss_masks(tmp_path: Path, tokenizer_folder: Path):
    chats = jsonl(tmp_path / "a.jsonl", [{"messages": chat("a", "b", "c", "d").messages}])
    for name, options in {
        "one": {},
        "same": {},
        "last": {"train_on": "last"},
        "short": {"sequence_length": 40},
    }.items():
        write_examples(chats, tokenizer_folder, tmp_path / name, **({"sequence_length": LONG} | options))

    one, same, last, short = (Examples.open(tmp_path / name) for name in ("one", "same", "last", "short"))

    assert one.digest == same.digest
    assert len({one.digest, last.digest, short.digest}) == 3
    assert np.array_equal(one.example(0).tokens, last.example(0).tokens)


def test_other_tokenizer_or_small_vocabulary_is_refused(tmp_path: Path, tokenizer_folder: Path):
    write_examples(jsonl(tmp_path / "a.jsonl", CORPUS), tokenizer_folder, tmp_path / "out", sequence_length=LONG)
    found = Examples.open(tmp_path / "out")

    found.check(tokenizer_hash=tokenizer_hash(tokenizer_folder), vocab_size=258)
    with pytest.raises(ValueError, match="out: written with another tokenizer"):
        found.check(tokenizer_hash=tokenizer_hash(byte_tokenizer(tmp_path / "other", fill=1)))
    with pytest.raises(ValueError, match="the model's vocab_size must be at least 258, got 200"):
        found.check(vocab_size=200)


# fmt: off
RAISE, DROP = ({"excess_length_strategy": strategy} for strategy in ("raise", "drop"))
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "sources must name at least one source":      ({"sources": []}, "sources must name at least one source"),
    "no such source":  ({"sources": "nowhere.jsonl"}, "nowhere.jsonl: does not exist"),
    "no file of lines": ({"sources": __file__}, "test_sft_examples.py: must be one of .jsonl, .jsonl.gz"),
    "only other files": ({"sources": f"{Path(__file__).parent}/test_sft_ex*.py"}, "no examples found"),
    "format":          ({"format": "alpaca"}, "format must be one of auto, instruction, messages, sharegpt"),
    "train_on":        ({"train_on": "first"}, "train_on must be one of all, last, got 'first'"),
    "excess length":   ({"excess_length_strategy": "cut"}, "_strategy must be one of truncate, drop, raise, got 'cut'"),
    "template":        ({"template": "mine"}, "template must be one of chat, deepseek-instruct or a file, got 'mine'"),
    "template folder": ({"template": "/"}, "template / cannot be read"),
    "length":          ({"sequence_length": 1}, "sequence_length must be at least 2, a token and its label, got 1"),
    "val_fraction":    ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
    "all validation":  ({"val_fraction": 0.9999999}, "val_fraction 0.9999999 leaves none of 60 examples to train on"),
    "a long example":  ({"sequence_length": 30, **RAISE}, r"a.jsonl:5: example must have at most 30 tokens, got 36"),
    "all are long":    ({"sequence_length": 7, **DROP}, "sequence_length 7 is less than the length of all 60 examples"),
}


@pytest.mark.parametrize(("options", "problem"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_no_output(
    tmp_path: Path, tokenizer_folder: Path, options: dict[str, Any], problem: str
):
    usual = {"sources": jsonl(tmp_path / "a.jsonl", CORPUS), "sequence_length": LONG}

    with pytest.raises(ValueError, match=problem) as refused:
        write_examples(tokenizer_folder=tokenizer_folder, out=tmp_path / "out", **(usual | options))

    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file_is_refused(tmp_path: Path, tokenizer_folder: Path, content: bytes):
    (tmp_path / "a.jsonl").write_bytes(content)

    with pytest.raises(ValueError, match=r"a.jsonl: no examples found"):
        write_examples(tmp_path / "a.jsonl", tokenizer_folder, tmp_path / "out", sequence_length=LONG)


def test_missing_eos_and_existing_output_are_refused(tmp_path: Path, tokenizer_folder: Path):
    source = jsonl(tmp_path / "a.jsonl", CORPUS)

    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        write_examples(source, byte_tokenizer(tmp_path / "t", eos=False), tmp_path / "out", sequence_length=LONG)
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        write_examples(source, tokenizer_folder, tmp_path, sequence_length=LONG)


def change(home: Path, **fields: Any) -> None:
    path = home / "manifest.json"
    retained = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(retained | fields))


MASK = "train.loss_mask"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"out: no token shards \(no manifest.json\)"),
    "format": (lambda f: change(f, format="x"), "format must be 'dsmoe token shards 2', got 'x'"),
    "another digit": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"all"', '"oll"')),
        "damaged: 'manifest.json' does not match its SHA-256",
    ),
    "no splits": (lambda f: change(f, splits=[]), "`splits` must be of type dict"),
    "no files": (lambda f: change(f, files={}), "`train-00000.tokens` must be of type dict, got None"),
    "no mask": (lambda f: (f / MASK).unlink(), f"'{MASK}' is missing"),
    "short": (lambda f: (f / MASK).write_bytes(b"\1"), rf"'{MASK}' has 1 bytes, expected \d+"),
    "other bytes": (
        lambda f: (f / MASK).write_bytes(bytes((f / MASK).stat().st_size)),
        f"'{MASK}' does not match its SHA-256",
    ),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_examples_give_one_line(
    tmp_path: Path, tokenizer_folder: Path, damage: Callable[[Path], Any], problem: str
):
    write_examples(jsonl(tmp_path / "a.jsonl", CORPUS), tokenizer_folder, tmp_path / "out", sequence_length=LONG)
    damage(tmp_path / "out")

    with pytest.raises(ValueError, match=problem) as refused:
        Examples.open(tmp_path / "out", verify=True)

    assert "\n" not in str(refused.value)


def test_overlong_examples_are_truncated_or_dropped(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
):
    source = jsonl(tmp_path / "a.jsonl", CORPUS)
    write_examples(source, tokenizer_folder, tmp_path / "full", sequence_length=LONG)
    lengths = Examples.open(tmp_path / "full").lengths

    for strategy, done in {"truncate": "truncated", "drop": "dropped"}.items():
        report = write_examples(
            source, tokenizer_folder, tmp_path / strategy, sequence_length=40, excess_length_strategy=strategy
        )
        assert report.overlong == (lengths > 40).sum() > 0
        longest = f"{done} {report.overlong} of 60 examples (longer than 40 tokens, the longest {lengths.max()})"
        assert caplog.text.count(longest) == 1

    assert Examples.open(tmp_path / "truncate").lengths.tolist() == np.minimum(lengths, 40).tolist()
    assert Examples.open(tmp_path / "drop").lengths.tolist() == lengths[lengths <= 40].tolist()


def test_show_highlights_loss_tokens(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer):
    from io import StringIO

    from rich.console import Console

    lines = [{"prompt": "a [bold]\x1b[2J", "completion": "b" * 200}, {"prompt": "c", "completion": "d"}]
    write_examples(jsonl(tmp_path / "a.jsonl", lines), tokenizer_folder, tmp_path / "out", sequence_length=LONG)
    plain, colored = StringIO(), StringIO()

    show(Examples.open(tmp_path / "out"), tokenizer, 1, Console(file=plain))
    show(Examples.open(tmp_path / "out"), tokenizer, 9, Console(file=colored, force_terminal=True, no_color=False))

    head = "example 0 of 2: 214 tokens, 201 with loss"
    assert plain.getvalue() == (f"{head}\n{BOS}a [bold]\\x1b[2J⟦{'b' * 200}{EOS}⟧\n\n")
    assert f"\x1b[1;32m{'b' * 200}{EOS}\x1b[0m" in colored.getvalue()
    assert "example 1 of 2" in colored.getvalue()
    assert "\x1b[2J" not in colored.getvalue()
    assert "⟦" not in colored.getvalue()
