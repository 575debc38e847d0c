"""`evaluate`: scores, reports, resuming and bad input, on small tasks with local data and without network."""

import json
import math
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.suites import SUITES, Row, Suite
from dsmoe_jax.generate import Generator
from tests.helpers.command import run
from tests.helpers.evaluation import CHOICES, COPY, NUM_DOCS, TASKS, TEXTS, write_tasks

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")

from dsmoe_jax.evaluate import DSMoELM, Evaluation, evaluate, responses, task_data, task_loading
from dsmoe_jax.evaluate.run import Protocol, load_rows, task_metrics
from dsmoe_jax.evaluate.task_loading import TaskLoader
from dsmoe_jax.progress import silent

pytestmark = pytest.mark.heavy

ALL = ",".join(TASKS)
CODE = {"humaneval", "mbpp"}
REQUESTS = 3 * NUM_DOCS + 2 * NUM_DOCS  # three choices


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, an empty cache of datasets, and packages torch and transformers that must not be imported."""
    import datasets.config  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(task_data, "hub_is_reachable", lambda: False)
    fakes = tmp_path_factory.mktemp("fakes")
    for module in ("torch", "transformers", "tensorflow"):
        (fakes / f"{module}.py").write_text("raise AssertionError(f'{__name__} was imported')")
    monkeypatch.syspath_prepend(fakes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_tasks(folder)
    return folder


@pytest.fixture
def loaded(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations use the compiled generator instead of loading the checkpoint."""
    monkeypatch.setattr(Generator, "from_pretrained", lambda path, **_: generator)


def local(home: Path, **changes: Any) -> dict[str, Any]:
    return {"suite": ALL, "data": home / "data", "include_path": [home / "tasks"]} | changes


def scores(evaluation: Evaluation) -> dict[str, float | None]:
    return {f"{result.row.task} {result.metric}": result.score for result in evaluation.results}


@pytest.fixture(scope="module")
def first(generator: Generator, checkpoint: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "from_pretrained", lambda path, **_: generator)
        return evaluate(checkpoint, out=tmp_path_factory.mktemp("out") / "out", **local(home))


def documents(home: Path, task: str, split: str = "test") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "data" / task / f"{split}.jsonl").read_text().splitlines()]


def shots(home: Path, count: int) -> Iterator[str]:
    """Examples before each question, as the harness samples them from the training set."""
    rng = random.Random(1234)
    train = documents(home, CHOICES, "train")
    for _ in range(NUM_DOCS):
        chosen = rng.sample(train, count)
        yield "".join(f"Q: {one['question']}\nA: {one['options'][one['answer']]}\n\n" for one in chosen)


def test_multiple_choice_equals_a_loop_over_the_documents(first: Evaluation, home: Path, generator: Generator):
    right = right_by_byte = 0
    for doc, examples in zip(documents(home, CHOICES), shots(home, 2), strict=True):
        prompt = f"{examples}Q: {doc['question']}\nA:"
        found = generator.score([prompt] * 3, [f" {option}" for option in doc["options"]])
        logprobs = [one.logprob for one in found]
        by_byte = [one / len(option) for one, option in zip(logprobs, doc["options"], strict=True)]
        right += logprobs.index(max(logprobs)) == doc["answer"]
        right_by_byte += by_byte.index(max(by_byte)) == doc["answer"]

    assert scores(first)[f"{CHOICES} acc,none"] == pytest.approx(100 * right / NUM_DOCS)
    assert scores(first)[f"{CHOICES} acc_norm,none"] == pytest.approx(100 * right_by_byte / NUM_DOCS)


def test_generation_equals_a_loop_over_the_documents(first: Evaluation, home: Path, generator: Generator):
    right = 0
    for doc in documents(home, COPY):
        text = generator(f"{doc['question']} ", max_new_tokens=6, stop=["\n", "self"]).text
        right += text == doc["options"][0]

    assert scores(first)[f"{COPY} exact_match,none"] == pytest.approx(100 * right / NUM_DOCS)


def test_bits_per_byte_equal_a_loop_over_the_documents(first: Evaluation, home: Path, generator: Generator):
    texts = [doc["question"] for doc in documents(home, TEXTS)]
    # As `hf` does with a tokenizer that adds BOS: it is predicted, too.
    found = generator.score([[0]] * len(texts), [generator.encode(text) for text in texts])
    nll = -sum(one.logprob for one in found)
    bytes_ = sum(len(text.encode()) for text in texts)

    assert scores(first)[f"{TEXTS} bits_per_byte,none"] == pytest.approx(nll / bytes_ / math.log(2), rel=1e-5)


def test_the_report_has_scores_errors_and_protocol(first: Evaluation):
    report = json.loads((first.out / "report.json").read_text())
    page = (first.out / "report.md").read_text()
    raw = json.loads((first.out / "results.json").read_text())

    row = next(row for row in report["rows"] if row["task"] == COPY)
    assert {name: row[name] for name in ("shots", "version", "n", "metric")} == {
        "shots": 0, "version": "2.0", "n": NUM_DOCS, "metric": "exact_match,none",
    }  # fmt: skip
    assert report["rows"][0]["shots"] == 2
    assert report["rows"][1]["stderr"] is not None
    assert report["versions"].keys() == {"dsmoe_jax", "lm_eval", "jax"}
    assert f"`{COPY}` 2.0, 0-shot, exact_match" in page
    assert "- seed: 1234\n" in page
    assert "- prompts: plain text, no chat template\n" in page
    assert "±" in page
    assert raw["results"].keys() == set(TASKS)
    assert (first.out / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_evaluation_resumes_with_the_same_scores(
    loaded: None, first: Evaluation, home: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    add, computed = responses.Responses.add, []

    def killed(self: Any, key: str, response: Any) -> None:
        if len(computed) == REQUESTS // 2:
            raise KeyboardInterrupt
        computed.append(key)
        add(self, key, response)

    monkeypatch.setattr(responses.Responses, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, out=tmp_path / "out", **local(home))
    with (tmp_path / "out" / "responses.jsonl").open("ab") as file:
        file.write(b'{"key": "ab')  # a torn line
    monkeypatch.setattr(responses.Responses, "add", lambda self, key, one: computed.append(key) or add(self, key, one))

    resumed = evaluate(checkpoint, out=tmp_path / "out", **local(home))

    assert len(computed) == len(set(computed)) == REQUESTS
    page = (resumed.out / "report.md").read_text()
    assert page.count(f" (since the last start, with {REQUESTS // 2} responses kept)") >= 2
    assert "since the last start" not in (first.out / "report.md").read_text()
    assert scores(resumed) == pytest.approx(scores(first), rel=1e-6)


def test_loaded_tasks_run_again_during_training(first: Evaluation, home: Path, generator: Generator):
    loader = TaskLoader([home / "tasks"], home / "data")
    protocol = Protocol()
    rows = load_rows(loader, loader.suite(ALL), protocol)

    one, two = (task_metrics(DSMoELM(generator, progress=silent), rows, protocol) for _ in range(2))

    assert one == two
    assert one == pytest.approx({name.replace(" ", "/").removesuffix(",none"): s for name, s in scores(first).items()})


def test_fewer_documents_and_more_examples(loaded: None, home: Path, checkpoint: Path, tmp_path: Path):
    found = evaluate(checkpoint, out=tmp_path / "out", **local(home, suite=CHOICES, limit=4, num_fewshot=3))

    assert [(result.n, result.shots) for result in found.results] == [(4, 3), (4, 3)]


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite with published scores, of which one benchmark has data."""
    rows = (
        Row("Choices", CHOICES, 1, "acc_norm,none", (50.0, 40.0)),
        Row("Code", "humaneval", 0, "pass@1,create_test", (26.8, 14.6)),
        Row("RACE", "dsmoe_race_high", 5, "acc,none", (46.4, 45.8)),
    )
    monkeypatch.setattr("dsmoe_jax.evaluate.task_loading.SUITES", {"base": Suite(("MoE", "LLaMA2"), rows)})
    monkeypatch.setattr(
        "dsmoe_jax.evaluate.task_loading.TaskLoader.leaves",
        lambda self, name: iter([(name, {"unsafe_code": name == "humaneval"})]),
    )


def test_a_suite_reports_what_it_did_not_run(
    loaded: None, small_suite: None, home: Path, checkpoint: Path, tmp_path: Path
):
    found = evaluate(checkpoint, out=tmp_path / "out", **local(home, suite="base"))

    reasons = [result.reason for result in found.results]
    assert reasons[0] == ""
    assert reasons[1] == "runs generated code: needs --confirm-run-unsafe-code"
    assert reasons[2].startswith("dsmoe_race_high: no data: expected ")
    page = (found.out / "report.md").read_text()
    assert "| benchmark | score | MoE (published) | LLaMA2 (published) | n | protocol |" in page
    assert "| Code | not run | 26.8 | 14.6 | – | runs generated code: needs --confirm-run-unsafe-code" in page
    assert "internal framework" in page
    assert found.results[0].shots == 1


def test_nothing_to_run_is_an_error(loaded: None, small_suite: None, home: Path, checkpoint: Path, tmp_path: Path):
    with pytest.raises(DSMoEError, match="none of 3 benchmarks can run; the first: local_choices: no data: expected"):
        evaluate(checkpoint, out=tmp_path / "out", suite="base", include_path=[home / "tasks"], data=tmp_path)


BAD: dict[str, tuple[list[str], str]] = {
    "unknown task": (["--suite", "hellaswagg"], "unknown task 'hellaswagg'; did you mean hellaswag?"),
    "unknown suite": (["--suite", "bass"], "unknown task 'bass'; did you mean base?"),
    "two suites": (["--suite", "base,chat"], "suite must be one suite or a list of tasks"),
    "code": (["--suite", "humaneval"], "runs generated code: needs --confirm-run-unsafe-code"),
    "no data": (
        ["--suite", "winogrande"],
        "winogrande: no data: expected {data}/allenai/winogrande or {data}/winogrande/",
    ),
    "limit": (
        ["--suite", CHOICES, "--limit", "0"],
        "limit must be a positive int, or a fraction of the documents in (0, 1), got 0",
    ),
    "include path": (["--include-path", "nowhere"], "include_path must be a folder, got nowhere"),
    "mesh": (
        ["--mesh", "fsd=2"],
        "--mesh axis must be one of data, fsdp, expert, tensor, got 'fsd': did you mean fsdp?",
    ),
}


@pytest.fixture
def two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness has two folders of tasks: all take seconds to read."""
    from lm_eval import tasks  # pyright: ignore[reportMissingImports]

    folders: list[str | Path] = [Path(tasks.__file__).with_name(name) for name in ("humaneval", "winogrande")]
    index = tasks.TaskManager(include_path=folders, include_defaults=False).task_index
    monkeypatch.setattr(task_loading, "_harness_tasks", lambda: index)


@pytest.mark.parametrize(
    ("flags", "message"),
    # Misspelled names are compared with all.
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * name.startswith("unknown")) for name, case in BAD.items()],
)
def test_bad_input_is_one_line(
    loaded: None,
    request: pytest.FixtureRequest,
    flags: list[str],
    message: str,
    home: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    shared = ["--out", tmp_path / "out", "--include-path", home / "tasks", "--data", home / "data"]
    if not message.startswith("unknown"):
        request.getfixturevalue("two_tasks")

    code = run("evaluate", checkpoint, *shared, *flags)

    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if message.format(data=home / "data") in line]
    assert len(lines) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suite", ["--suite", "--tasks"])
def test_the_command_evaluates(
    suite: str, loaded: None, home: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--include-path", home / "tasks", "--data", home / "data", "--out", tmp_path / "out", "--limit", 0.25]

    code = run("evaluate", checkpoint, suite, f"{CHOICES}, {CHOICES} ", *flags)

    assert code == 0
    assert "Evaluated 2 of 2 scores" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["n"] for row in report["rows"]] == [NUM_DOCS // 4] * 2
    assert "- limit: 0.25" in (tmp_path / "out" / "report.md").read_text()


def test_the_scores_of_another_model_are_not_mixed(loaded: None, first: Evaluation, home: Path, checkpoint: Path):
    with pytest.raises(
        DSMoEError, match=r"has the scores of another quantize \(None, now int8\): choose another --out"
    ):
        evaluate(checkpoint, out=first.out, quantize="int8", **local(home))


def test_a_folder_of_something_else_is_refused(loaded: None, home: Path, checkpoint: Path):
    with pytest.raises(DSMoEError, match=r"is not empty and has no responses.jsonl"):
        evaluate(checkpoint, out=home, **local(home))


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)

    with pytest.raises(DSMoEError, match=r"evaluation needs lm_eval .*: pip install 'dsmoe_jax\[eval\]'"):
        evaluate("model", out=tmp_path / "out")


@pytest.mark.slow
def test_the_harness_has_every_task_of_the_suites(capsys: pytest.CaptureFixture[str]):
    loader = TaskLoader()
    leaves = {row.task: list(loader.leaves(row.task)) for suite in SUITES.values() for row in suite.rows}

    code = run("evaluate", "--suite", "base", "--list-data", "--data", "data")

    assert all(leaves.values())
    assert len(leaves["mmlu"]) == 57
    assert [task for task, found in leaves.items() if any(config.get("unsafe_code") for _, config in found)] == [
        "humaneval",
        "mbpp",
    ]
    assert code == 0
    commands = capsys.readouterr().out.splitlines()
    assert "hf download --repo-type dataset cais/mmlu --local-dir data/cais/mmlu" in commands
    assert len(commands) == len(set(commands)) > 15
    assert json.dumps(commands).count("clue/clue") == 2
    assert "# data/mmlu_abstract_algebra/{test,dev}.jsonl and those of 56 more tasks of mmlu" in commands
    assert "# data/humaneval/test.jsonl" in commands


@pytest.mark.parametrize("unsafe", [False, True])
def test_the_harness_can_run_the_same_tasks(unsafe: bool, capsys: pytest.CaptureFixture[str]):
    from lm_eval._cli.harness import HarnessCLI  # pyright: ignore[reportMissingImports]

    code = run("evaluate", "org/llama", "--list-tasks", *["--confirm-run-unsafe-code"][: int(unsafe)])

    assert code == 0
    found = {}
    for line in capsys.readouterr().out.splitlines():
        environment, command = line.split("lm_eval ")
        args = HarnessCLI()._parser.parse_args(["run", *shlex.split(command)])
        assert args.model_args == {"pretrained": "org/llama"}
        assert TaskLoader([args.include_path])._manager_for([*args.tasks])
        assert bool(environment) == getattr(args, "confirm_run_unsafe_code", False) == (not CODE.isdisjoint(args.tasks))
        found |= dict.fromkeys(args.tasks, args.num_fewshot)
    rows = [row for row in SUITES["base"].rows if unsafe or row.task not in CODE]
    assert found == {row.task: row.shots for row in rows}
