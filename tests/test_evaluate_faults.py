"""Evaluations that meet faults: documents, groups, other stop conditions, damaged responses, a folder in use."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.suites import Row, Suite
from dsmoe_jax.generate import Generator
from dsmoe_jax.storage.locks import lock_name
from tests.helpers.evaluation import CHOICES, COPY, TEXTS, write_tasks

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")

from dsmoe_jax.evaluate import Evaluation, evaluate, task_data

pytestmark = pytest.mark.heavy

GROUPS = {
    "local_group": "group: local_group\ntask: [local_choices, local_copy]\n",
    "local_mean": (
        "group: local_mean\ntask: [local_choices]\naggregate_metric_list:\n- {metric: acc, weight_by_size: true}\n"
    ),
}


@pytest.fixture(autouse=True)
def offline(generator: Generator, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, an empty cache of datasets, and the compiled generator instead of the checkpoint."""
    import datasets.config  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(task_data, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(Generator, "from_pretrained", lambda path, **_: generator)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    tasks, _ = write_tasks(folder)
    for name, text in GROUPS.items():
        (tasks / f"{name}.yaml").write_text(text)
    for name in (CHOICES, TEXTS):
        (tasks / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text() + "tag: local_tag\n")
    return folder


@pytest.fixture
def run(home: Path, checkpoint: Path, tmp_path: Path) -> Any:
    """Evaluate tasks in `tmp_path / "out"`, 3 documents each."""

    def evaluated(suite: str, **changes: Any) -> Evaluation:
        options = {"data": home / "data", "include_path": home / "tasks", "out": tmp_path / "out", "limit": 3}
        return evaluate(checkpoint, suite=suite, **options | changes)

    return evaluated


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("local_tag", [CHOICES, CHOICES, TEXTS]),
        pytest.param("local_group", [CHOICES, CHOICES, COPY], marks=pytest.mark.slow),
        ("local_mean", ["local_mean"]),
    ],
)
def test_a_tag_has_the_scores_of_its_tasks(name: str, tasks: list[str], run: Any):
    found = run(name)

    assert [result.row.task for result in found.results] == tasks
    assert all(result.score is not None and result.n == 3 for result in found.results)
    assert all(result.shots == (0 if result.row.task in (COPY, TEXTS) else 2) for result in found.results)


def test_a_run_without_a_score_is_an_error(run: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dsmoe_jax.evaluate.report._number", lambda value: None)

    with pytest.raises(DSMoEError, match="nothing was scored; local_copy: lm_eval returned no score of local_copy"):
        run(COPY)


@pytest.mark.parametrize("change", ["eos_token_ids", "stop_strings"])
def test_other_stop_conditions_are_refused(
    change: str, run: Any, generator: Generator, monkeypatch: pytest.MonkeyPatch
):
    run(COPY)
    monkeypatch.setattr(generator, change, {"eos_token_ids": frozenset({7}), "stop_strings": ("x",)}[change])

    with pytest.raises(DSMoEError, match=f"has the scores of another {change}"):
        run(COPY)


def test_a_dtype_equal_to_the_stored_one_is_the_same(run: Any):
    run(COPY)

    run(COPY, dtype="float32")
    with pytest.raises(DSMoEError, match=r"another dtype \(as stored, now bfloat16\)"):
        run(COPY, dtype="bfloat16")


@pytest.fixture
def fragile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite whose first benchmark fails on a document."""
    task = (home / "tasks" / f"{COPY}.yaml").read_text().replace(f"task: {COPY}", "task: fragile")
    task = task.replace('doc_to_text: "{{question}} "', "doc_to_text: \"{{ 1 // (options[0][0] != 'i') }}\"")
    (home / "tasks" / "fragile.yaml").write_text(task)
    docs = [{"question": "a", "options": [word], "answer": 0} for word in ("path", "import")]
    folder = home / "data" / "fragile"
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    rows = (Row("Fragile", "fragile", 0, "exact_match,none"), Row("Copy", COPY, 0, "exact_match,none"))
    monkeypatch.setattr("dsmoe_jax.evaluate.task_loading.SUITES", {"base": Suite((), rows)})


def test_a_bad_document_costs_its_benchmark_only(fragile: None, run: Any):
    found = run("base")

    assert found.results[0].reason == "fragile: ZeroDivisionError: integer division or modulo by zero"
    assert found.results[1].score is not None
    with pytest.raises(DSMoEError, match=r"^fragile: ZeroDivisionError: "):
        run("fragile")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), KeyboardInterrupt()])
def test_faults_of_the_device_end_the_evaluation(
    error: BaseException, run: Any, generator: Generator, monkeypatch: pytest.MonkeyPatch
):
    def engine(*_: Any) -> None:
        raise error

    monkeypatch.setattr(generator, "engine", engine)

    with pytest.raises(type(error)):
        run(COPY)


@pytest.mark.parametrize("value", ["[1, 2]", '"text"', "null", "[NaN, true]", "{}"])
def test_a_wrong_value_is_computed_again(value: str, run: Any, tmp_path: Path):
    first = run(CHOICES)
    path = tmp_path / "out" / "responses.jsonl"
    head, line, *others = path.read_text().splitlines()
    key = json.loads(line)["key"]
    path.write_text("\n".join([head, f'{{"key": "{key}", "value": {value}, "truncated": false}}', *others]) + "\n")

    again = run(CHOICES)

    assert [result.score for result in again.results] == [result.score for result in first.results]
    assert json.loads(path.read_text().splitlines()[-1]) == json.loads(line)


def test_a_folder_in_use_is_refused_before_loading(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Generator, "from_pretrained", lambda path, **_: pytest.fail("the model was loaded"))

    with lock_name(tmp_path / "out"), pytest.raises(DSMoEError, match="is in use by another process"):
        run(COPY)


def test_a_missing_chat_template_is_an_error(run: Any, generator: Generator, monkeypatch: pytest.MonkeyPatch):
    assert generator.tokenizer is not None
    monkeypatch.setattr(generator.tokenizer, "chat_templates", {})

    with pytest.raises(DSMoEError, match="apply_chat_template needs a chat template, and the tokenizer has none"):
        run(COPY, apply_chat_template=True)


def test_a_task_without_a_version_shows_none(run: Any, home: Path):
    text = (home / "tasks" / f"{COPY}.yaml").read_text().partition("metadata:")[0]
    (home / "tasks" / "bare.yaml").write_text(text.replace(f"task: {COPY}", "task: bare"))
    (home / "data" / "bare").symlink_to(home / "data" / COPY)

    found = run("bare", max_gen_toks=4)

    page = (found.out / "report.md").read_text()
    assert "`bare`, 0-shot" in page
    assert "- max gen toks: 4\n" in page
