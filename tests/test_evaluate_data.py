"""Data of tasks: local files, no network; the suites, and the task files of this package."""

from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate import task_data
from dsmoe_jax.evaluate.suites import NOTES, SUITES, scale
from dsmoe_jax.evaluate.task_data import hub_is_reachable, local_source, used_splits
from tests.helpers.evaluation import CHOICES, NUM_DOCS, documents, write_split, write_tasks

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")

from dsmoe_jax.evaluate.task_loading import LoadedRow, TaskLoader

pytestmark = pytest.mark.heavy

CONFIG = {"dataset_path": "owner/name", "dataset_name": "part"}
RACE = {
    "article": "A cat sat.",
    "question": "Who sat?",
    "options": ["A dog", "A cat", "A man", "An owl"],
    "answer": "B",
}
WSC = {
    "text": "小明说他饿了。",
    "label": 0,
    "target": {"span1_text": "小明", "span2_text": "他", "span1_index": 0, "span2_index": 3},
}
CHID = {
    "candidates": ["一心一意", "三心二意", "九牛一毛"],
    "content": ["他#idiom000001#地工作，从不#idiom000002#。", "这是#idiom000003#。"],
    "answers": {"text": ["一心一意", "三心二意", "九牛一毛"], "candidate_id": [0, 1, 2]},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets.config  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(task_data, "hub_is_reachable", lambda: False)


def load(task: str, data: Path, *include: Path) -> LoadedRow:
    loader = TaskLoader(include, data)
    return loader.load(loader.suite(task).rows[0])


def requests(loaded: LoadedRow, task: str, shots: int) -> list[Any]:
    assert loaded.tasks is not None, loaded.reason
    found = loaded.tasks["tasks"][task]
    found.set_config("num_fewshot", shots)
    found.set_fewshot_seed(0)
    found.build_all_requests()
    return [one.args for one in found.instances]


def test_files_of_a_task_take_precedence_over_a_repository(tmp_path: Path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    repository = local_source(tmp_path, "task", CONFIG)
    for split in ("test", "train"):
        write_split(tmp_path / "task" / f"{split}.jsonl", documents(0))
    files = local_source(tmp_path, "task", CONFIG)

    assert repository == {"path": str(tmp_path / "owner" / "name"), "name": "part"}
    assert files == {"path": "json", "data_files": {s: str(tmp_path / f"task/{s}.jsonl") for s in ("test", "train")}}
    assert local_source(tmp_path, "other", {"dataset_path": "a/b"}) is None
    assert local_source(None, "task", CONFIG) is None


def test_two_files_of_a_split_are_refused(tmp_path: Path):
    for suffix in (".jsonl", ".parquet"):
        write_split(tmp_path / "task" / f"test{suffix}", documents(0))

    with pytest.raises(DSMoEError, match="must have one file per split"):
        local_source(tmp_path, "task", CONFIG)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_copy_of_a_repository_is_read(suffix: str, tmp_path: Path):
    import pandas  # pyright: ignore[reportMissingImports]

    tasks, _ = write_tasks(tmp_path)
    folder = tmp_path / "hub" / "owner" / "choices"
    for split in ("train", "test"):
        docs = documents(split == "test")
        if suffix == ".jsonl":
            write_split(folder / f"{split}.jsonl", docs)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            pandas.DataFrame(docs).to_parquet(folder / f"{split}.parquet")

    found = requests(load(CHOICES, tmp_path / "hub", tasks), CHOICES, 0)

    assert found[0] == (f"Q: {documents(1)[0]['question']}\nA:", f" {documents(1)[0]['options'][0]}")  # pyright: ignore


def test_a_damaged_file_is_named(tmp_path: Path):
    tasks, data = write_tasks(tmp_path)
    (data / CHOICES / "test.jsonl").write_text('{"a": 1}\n{]\n')

    reason = load(CHOICES, data, tasks).reason

    assert reason == f"{CHOICES}: {CHOICES}/test.jsonl line 2: Expecting property name enclosed in double quotes"
    (data / CHOICES / "test.jsonl").write_text("")
    assert load(CHOICES, data, tasks).reason == f"{CHOICES}: {CHOICES}/test.jsonl is empty"


def test_an_unreadable_file_has_its_cause(tmp_path: Path):
    tasks, data = write_tasks(tmp_path)
    for split in ("train", "test"):
        (data / CHOICES / f"{split}.jsonl").unlink()
        (data / CHOICES / f"{split}.parquet").write_text("junk")

    reason = load(CHOICES, data, tasks).reason

    assert reason.startswith(f"{CHOICES}: {CHOICES}/test.parquet, {CHOICES}/train.parquet cannot be read: ")
    assert "minimum file footer" in reason


def test_a_missing_split_is_named_beside_those_there(tmp_path: Path):
    tasks, data = write_tasks(tmp_path)
    (data / CHOICES / "train.jsonl").rename(data / CHOICES / "training.jsonl")

    assert load(CHOICES, data, tasks).reason == f"{CHOICES}: needs the splits test, train, found test, training"


@pytest.mark.parametrize(
    ("config", "splits"),
    [
        ({"test_split": "test", "validation_split": "dev"}, ["test", "dev"]),
        ({"test_split": "test", "validation_split": "dev", "training_split": "train"}, ["test", "train"]),
        ({"validation_split": "dev", "training_split": "train", "fewshot_split": "dev"}, ["dev"]),
        ({"test_split": "test", "training_split": "train", "fewshot_config": {"samples": []}}, ["test"]),
        ({"test_split": "test", "fewshot_config": {"split": "few"}}, ["test", "few"]),
    ],
)
def test_splits_that_a_task_uses(config: dict[str, Any], splits: list[str]):
    assert used_splits(config) == splits


def test_files_of_a_task_are_found_in_a_copy_of_a_repository(tmp_path: Path):
    tasks, _ = write_tasks(tmp_path)
    folder, path = tmp_path / "hub" / "owner" / "choices", tasks / f"{CHOICES}.yaml"
    path.write_text(f"{path.read_text()}dataset_kwargs: {{data_files: {{test: b/x.jsonl, train: b/x.jsonl}}}}\n")
    for name, seed in (("a/test", 0), ("b/x", 1)):
        write_split(folder / f"{name}.jsonl", documents(seed))

    found = requests(load(CHOICES, tmp_path / "hub", tasks), CHOICES, 0)

    assert len(found) == 3 * NUM_DOCS
    assert found[0][0] == f"Q: {documents(1)[0]['question']}\nA:"


def test_groups_find_the_data_of_their_tasks(tmp_path: Path):
    tasks, data = write_tasks(tmp_path)
    (tasks / "both.yaml").write_text("group: both\ntask:\n- local_choices\n- group: inner\n  task: [local_texts]\n")

    loaded = load("both", data, tasks)

    assert loaded.reason == ""
    assert loaded.tasks is not None
    assert loaded.tasks["tasks"].keys() == {"local_choices", "local_texts"}
    assert [name for name, _ in TaskLoader([tasks], data).leaves("both")] == ["local_choices", "local_texts"]


def test_the_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch):
    def connect(*_: Any, **__: Any) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"no": "localhost"})  # no proxy
    hub_is_reachable.cache_clear()
    try:
        assert not hub_is_reachable()
    finally:
        hub_is_reachable.cache_clear()


def test_race_has_examples_from_the_training_set(tmp_path: Path):
    for split in ("train", "test"):
        write_split(tmp_path / "dsmoe_race_middle" / f"{split}.jsonl", [{**RACE, "article": split}])

    found = requests(load("dsmoe_race_middle", tmp_path), "dsmoe_race_middle", 1)

    prompt = "Article: train\n\nQuestion: Who sat?\nAnswer: A cat\n\nArticle: test\n\nQuestion: Who sat?\nAnswer:"
    assert found == [(prompt, f" {option}") for option in RACE["options"]]


@pytest.mark.parametrize(("label", "answer"), [(0, "是"), (1, "否"), ("true", "是"), ("false", "否")])
def test_cluewsc_asks_what_a_pronoun_refers_to(label: Any, answer: str, tmp_path: Path):
    for split in ("train", "validation"):
        write_split(tmp_path / "dsmoe_cluewsc" / f"{split}.jsonl", [{**WSC, "label": label}])

    ((prompt, arguments),) = requests(load("dsmoe_cluewsc", tmp_path), "dsmoe_cluewsc", 1)

    question = "小明说他饿了。\n问题：上文中的“他”指的是“小明”吗？\n回答："
    assert prompt == f"{question}{answer}\n\n{question}"
    assert arguments["until"] == ["\n"]


@pytest.mark.parametrize("as_list", [False, True], ids=["columns", "records"])
def test_chid_scores_every_idiom_in_every_blank(as_list: bool, tmp_path: Path):
    answers = CHID["answers"]
    records = [dict(zip(answers, one, strict=True)) for one in zip(*answers.values(), strict=True)]
    for split in ("train", "validation"):
        write_split(tmp_path / "dsmoe_chid" / f"{split}.jsonl", [{**CHID, "answers": records if as_list else answers}])

    loaded = load("dsmoe_chid", tmp_path)
    found = requests(loaded, "dsmoe_chid", 0)

    after = "地工作，从不三心二意。"
    assert found[:3] == [("他", f"{idiom}{after}") for idiom in CHID["candidates"]]
    assert found[3:6] == [("他一心一意地工作，从不", f"{idiom}。") for idiom in CHID["candidates"]]
    assert found[6:] == [("这是", f"{idiom}。") for idiom in CHID["candidates"]]
    assert loaded.tasks is not None
    assert [doc["answer"] for doc in loaded.tasks["tasks"]["dsmoe_chid"].eval_docs] == [0, 1, 2]


def test_suites_have_the_benchmarks_of_the_paper():
    assert [len(suite.rows) for suite in SUITES.values()] == [20, 19, 6]
    base = {row.benchmark: row.published for row in SUITES["base"].rows}
    assert base["MMLU"] == (45.0, 45.8, 48.2)
    assert {len(row.published) for suite in SUITES.values() for row in suite.rows} == {0, 3}
    assert NOTES.keys() <= {row.task for suite in SUITES.values() for row in suite.rows}
    assert [scale(metric) for metric in ("acc,none", "bits_per_byte,none")] == [100, 1]
