"""Tokenization by workers and tasks equals that of one process. Start at `test_tasks_equal_one_process`."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.train.data import (
    TokenShards,
    documents,
    formats,
    join,
    merge,
    pieces,
    tokenization,
    tokenize,
    tokenize_task,
)
from tests.helpers.command import run
from tests.helpers.corpus import ids_of, write_texts
from tests.helpers.hf_folder import snapshot

SMALLEST = 4_000  # bytes of a piece
LAUNCH = Path(__file__).resolve().parent.parent / "train" / "launch"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "it", "sleeps"]
OPTIONS: dict[str, Any] = {"val_fraction": 0.1, "shard_tokens": 6_000}


def texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [f"{n} {' '.join(chance.choices(WORDS, k=chance.randrange(40)))}" for n in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are divided, files that are put together, and one that can be neither."""
    folder = tmp_path_factory.mktemp("corpus")
    write_texts(folder / "a.jsonl", texts(300))
    for n in range(20):
        (folder / f"b{n:02}.txt").write_text(texts(1, seed=n)[0])
    write_texts(folder / "c.jsonl.gz", texts(200, seed=1))
    write_texts(folder / "d.parquet", texts(150, seed=2))
    return folder


@pytest.fixture(autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SMALLEST", SMALLEST)
        yield


@pytest.fixture(scope="module")
def whole(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes; do not modify."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SMALLEST", SMALLEST)
        tokenize(corpus, tokenizer_folder, out, **OPTIONS)
    return out


def written(out: Path) -> dict[str, Any]:
    return {name: data for name, data in snapshot(out).items() if name != ".verified"}  # the cache of a reader


def run_task(corpus: Any, tokenizer: Path, out: Path, task: int, tasks: int, **options: Any) -> Any:
    return tokenize_task(corpus, tokenizer, out, task=task, tasks=tasks, **OPTIONS | options)


def test_pieces_change_nothing_but_shard_boundaries(
    corpus: Path, whole: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "SMALLEST", 1 << 30)
    tokenize(corpus, tokenizer_folder, tmp_path / "out", **OPTIONS)

    for split in ("train", "validation"):
        assert ids_of(TokenShards.open(whole, split)) == ids_of(TokenShards.open(tmp_path / "out", split))
    assert len(list(whole.glob("train-*.tokens"))) > 5
    assert not (whole / "pieces").exists()


@pytest.mark.parametrize("tasks", [1, 7])
def test_tasks_equal_one_process(corpus: Path, whole: Path, tokenizer_folder: Path, tmp_path: Path, tasks: int):
    for task in reversed(range(tasks)):
        stats = run_task(corpus, tokenizer_folder, tmp_path / "out", task, tasks)
        assert stats.new == stats.pieces
    assert "0 of them new" in str(run_task(corpus, tokenizer_folder, tmp_path / "out", 0, tasks))

    made = merge(tmp_path / "out")

    assert written(tmp_path / "out") == written(whole)
    assert made.train.documents == len(TokenShards.open(whole))
    assert os.listdir(tmp_path) == ["out"]


def test_workers_change_nothing(corpus: Path, whole: Path, tokenizer_folder: Path, tmp_path: Path):
    tokenize(corpus, tokenizer_folder, tmp_path / "out", workers=2, **OPTIONS)

    assert written(tmp_path / "out") == written(whole)


def test_missing_tasks_are_named(corpus: Path, tokenizer_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"out: no tasks to merge \(no .*out.tasks/plan.json\)"):
        merge(out)
    for task in (0, 2, 3):
        run_task(corpus, tokenizer_folder, out, task, 5)

    with pytest.raises(ValueError, match=r"out: tasks 1, 4 of 5 are not complete \(\d+ pieces of \d+ missing\)"):
        merge(out)
    assert not out.exists()


CHANGES: dict[str, tuple[Callable[[Path, dict[str, Any]], Any], str]] = {
    "a file": (lambda folder, options: write_texts(folder / "a.jsonl", texts(299)), "a.jsonl: has changed since the"),
    "another file": (lambda folder, options: (folder / "z.txt").write_text("z"), "z.txt: has changed since the first"),
    "no file": (lambda folder, options: (folder / "b.txt").unlink(), "b.txt: has changed since the first task"),
    "an option": (lambda folder, options: options.update(min_chars=3), "min_chars must be 0, as in the other tasks"),
    "tasks": (lambda folder, options: options.update(tasks=3), "tasks must be 2, as in the other tasks of .*, got 3"),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES)
def test_changes_between_tasks_are_refused(tokenizer_folder: Path, tmp_path: Path, change: Callable, problem: str):
    folder, out = tmp_path / "in", tmp_path / "out"
    write_texts(folder / "a.jsonl", texts(300))
    (folder / "b.txt").write_text("b")
    options: dict[str, Any] = {"task": 0, "tasks": 2}
    run_task(folder, tokenizer_folder, out, **options)
    change(folder, options)

    with pytest.raises(ValueError, match=problem) as refused:
        run_task(folder, tokenizer_folder, out, **options | {"task": 1})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("task", "tasks"), [(3, 3), (-1, 3), (0, 0)])
def test_impossible_tasks_are_refused(corpus: Path, tokenizer_folder: Path, tmp_path: Path, task: int, tasks: int):
    with pytest.raises(ValueError, match=rf"task must be in \[0, 3\), got {task}|tasks must be at least 1, got 0"):
        run_task(corpus, tokenizer_folder, tmp_path / "out", task, tasks)


@pytest.mark.parametrize("end", [".jsonl", ".parquet"])
@pytest.mark.parametrize("count", [2, 7, 1000])
def test_parts_of_a_file_have_each_record_once(tmp_path: Path, end: str, count: int):
    path = write_texts(tmp_path / f"a{end}", expected := texts(50))
    reader = formats.reader_of(path)

    parts = [list(reader(path, formats.Columns("text"), formats.Part(n, count))) for n in range(count)]

    assert [entry.value for part in parts for entry in part] == expected
    assert all(part[-1].bytes_read >= part[0].bytes_read for part in parts if part)
    if end == ".jsonl":
        assert parts[0][0].place == ":1"
        assert next(part for part in parts[1:] if part)[0].place.startswith(" at byte ")


def test_copies_are_removed_and_counted(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(join, "_KEYS", 37)  # several ranges of keys
    monkeypatch.setattr(join, "_TOKENS", 300)
    some = texts(100)
    source = write_texts(tmp_path / "a.jsonl", repeated := [*some, *texts(60, seed=3), *some[::2], *some])
    unique = list(dict.fromkeys(repeated))
    tokenize(write_texts(tmp_path / "b.jsonl", unique), tokenizer_folder, tmp_path / "unique", **OPTIONS)

    made = tokenize(source, tokenizer_folder, tmp_path / "one", deduplicate=True, **OPTIONS)
    for task in range(3):
        run_task(source, tokenizer_folder, tmp_path / "out", task, 3, deduplicate=True)
    merge(tmp_path / "out")

    assert str(made).endswith(f"; removed {len(repeated) - len(unique)} exact copies")
    assert made.text_bytes == sum(len(text.encode()) for text in unique)
    assert written(tmp_path / "out") == written(tmp_path / "one")
    for split in ("train", "validation"):
        assert ids_of(TokenShards.open(tmp_path / "one", split)) == ids_of(TokenShards.open(tmp_path / "unique", split))


def test_a_run_continues_after_its_worker_was_killed(
    corpus: Path, whole: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode, encoded = tokenization.BulkEncoder.encode, []

    def stopping(self: Any, batches: Any):
        for label, result in encode(self, batches):
            if len(encoded) == 9:
                encoded.append(label.piece)
                raise ChildProcessError("tokenization: worker process 1 was killed by signal 9")
            encoded.append(label.piece)
            yield label, result

    monkeypatch.setattr(tokenization.BulkEncoder, "encode", stopping)
    with pytest.raises(ValueError, match="worker process 1 was killed by signal 9"):
        tokenize(corpus, tokenizer_folder, tmp_path / "out", **OPTIONS)
    tokenize(corpus, tokenizer_folder, tmp_path / "out", **OPTIONS)

    assert encoded[9] == encoded[10] > 0  # the unfinished piece
    assert written(tmp_path / "out") == written(whole)


def test_records_are_filtered_by_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    rows = [("a long text", "en"), ("ein langer Text", "de"), ("short", "en"), ("un long texte", "fr")]
    lines = [json.dumps({"content": text, "language": language}) for text, language in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    options: dict[str, Any] = {"field": "content", "where": {"language": ["en", "fr"]}, "min_chars": 6}
    found = [document.text for document in documents(tmp_path / "a.jsonl", **options)]

    assert found == ["a long text", "un long texte"]
    assert "skipped 1 record by a filter" in caplog.text
    assert "skipped 1 short text" in caplog.text
    with pytest.raises(ValueError, match="no text found that passes the filters"):
        list(documents(tmp_path / "a.jsonl", field="content", min_chars=99))
    with pytest.raises(ValueError, match="has no field 'lang'"):
        list(documents(tmp_path / "a.jsonl", field="content", where={"lang": ["en"]}))


def test_flags_filter_and_deduplicate(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    rows = [("one", "en"), ("two", "de"), ("one", "fr"), ("one", "en"), ("a", "en")]
    lines = [json.dumps({"body": text, "lang": language}) for text, language in rows]
    Path("a.jsonl").write_text("\n".join(lines))
    arguments = ("a.jsonl", "--tokenizer", tokenizer_folder, "--out", "out", "--text-column", "body")
    wrong = {
        (*arguments, "--task", 1): "--task and --tasks must be passed together",
        ("--merge", "out", "--tokenizer", "x"): "--merge takes no other arguments",
        ("a.jsonl", "--out", "out"): "the following arguments are required: --tokenizer",
        (*arguments, "--where", "lang"): "'lang' is not NAME=VALUE",
    }

    filters = ("--where", "lang=en,it", "--where", "lang=de", "--min-chars", 2, "--deduplicate", "--val-fraction", 0)
    assert run("tokenize", *arguments, *filters) == 0
    assert "of 2 documents; validation: 0 tokens of 0 documents; removed 1 exact copy" in capsys.readouterr().out
    for flags, problem in wrong.items():
        assert run("tokenize", *flags) == 2
        assert problem in capsys.readouterr().err


# Reads a document every 50 ms.
SLOWLY = """
import sys, time
from dsmoe_jax.cli import main
from dsmoe_jax.train.data import sources, tokenization

def slowly(*args):
    for document in sources.read_texts(*args):
        yield document
        time.sleep(0.05)

tokenization._BATCH_CHARS, tokenization.read_texts = 1, slowly
sys.exit(main(sys.argv[1:]))
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.parametrize("victim", ["worker", "Ctrl-C", pytest.param("command", marks=pytest.mark.slow)])
def test_a_killed_process_leaves_no_other(corpus: Path, tmp_path: Path, tokenizer_folder: Path, victim: str):
    arguments = ["tokenize", corpus, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--workers", 2]
    command = [sys.executable, "-c", SLOWLY, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for(lambda: list(tmp_path.glob(".out.incomplete/pieces/*.tokens")))
        workers = children_of(process.pid)
        number = signal.SIGINT if victim == "Ctrl-C" else signal.SIGKILL
        os.kill(workers[0] if victim == "worker" else process.pid, number)
        lines = process.stderr.read().splitlines()

    assert len(workers) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert process.returncode == {"worker": 2, "Ctrl-C": 130, "command": -signal.SIGKILL}[victim]
    if victim == "Ctrl-C":
        assert lines == [""]
    if victim == "worker":
        expected = f"dsmoe tokenize: tokenization: worker process {workers[0]} was killed by signal 9"
        assert lines == [f"{expected}; if memory was short, pass fewer --workers"]
        assert not (tmp_path / "out").exists()


def slurm(task: int) -> tuple[list[str], dict[str, str]]:
    return ["bash", str(LAUNCH / "tokenize_slurm.sh")], {
        "SLURM_ARRAY_TASK_ID": f"{task}",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }


def kubernetes(task: int) -> tuple[list[str], dict[str, str]]:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((LAUNCH / "tokenize_job.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    names = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(names["TASKS"]) == job["completions"]
    return [*container["command"], *container["args"]], names | {
        "JOB_COMPLETION_INDEX": f"{task}",
        "TASKS": "2",
        "WORKERS": "0",
    }


# `dsmoe` with the options and pieces of these tests; it reads a document every SECONDS.
DSMOE = f"""#!{sys.executable}
import os, sys, time
from dsmoe_jax.cli import main
from dsmoe_jax.train import data
from dsmoe_jax.train.data import pieces, sources, tokenization, tokenize_task

def slowly(*args):
    for document in sources.read_texts(*args):
        yield document
        time.sleep(float(os.environ["SECONDS_PER_TEXT"]))

pieces.SMALLEST, tokenization.read_texts = {SMALLEST}, slowly
data.tokenize_task = lambda *args, **options: tokenize_task(*args, **options | {OPTIONS})
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_tasks_of_the_templates_continue(corpus: Path, whole: Path, tokenizer_folder: Path, tmp_path: Path):
    dsmoe, out = tmp_path / "bin" / "dsmoe", tmp_path / "out"
    dsmoe.parent.mkdir()
    dsmoe.write_text(DSMOE)
    dsmoe.chmod(0o755)
    paths = {"SOURCES": str(corpus), "TOKENIZER": str(tokenizer_folder), "OUT": str(out)}
    environment = os.environ | {"PATH": f"{dsmoe.parent}:{os.environ['PATH']}"}

    def start(job: Callable[[int], tuple[list[str], dict[str, str]]], task: int, seconds: float) -> Any:
        command, variables = job(task)
        variables = environment | variables | paths | {"SECONDS_PER_TEXT": f"{seconds}"}
        return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE)

    def finished(task: int) -> int:
        return sum(int(path.stem) % 2 == task for path in tmp_path.glob("out.tasks/0*.json"))

    with start(slurm, 0, 0.02) as first, start(kubernetes, 1, 0.02) as second:
        wait_for(lambda: finished(0) > 1 and finished(1) > 1)
        first.kill()
        second.kill()
    done = finished(0), finished(1)
    with start(kubernetes, 0, 0) as first, start(slurm, 1, 0) as second:
        lines = [process.communicate()[0] for process in (first, second)]
    merge(out)

    for before, line in zip(done, lines, strict=True):
        found = re.search(r"task \d of 2: (\d+) pieces of \d+ complete, (\d+) of them new", line)
        assert found is not None
        assert int(found[1]) - int(found[2]) == before > 1
    assert written(out) == written(whole)
