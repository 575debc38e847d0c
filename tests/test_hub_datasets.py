"""Datasets of a fake hub on loopback. Start at `test_a_dataset_of_the_hub_equals_its_files`."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.corpus import prepare
from dsmoe_jax.train.data import TokenShards, tokenize
from dsmoe_jax.train.data.hub_datasets import find_hub_files, select_files
from dsmoe_jax.train.data.sources import read_source
from dsmoe_jax.train.preflight import check_inputs
from tests.helpers.corpus import TEXTS, ids_of, write_texts
from tests.helpers.fake_hub import FakeHub, serve
from tests.helpers.hf_folder import tiny

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parent.parent
TRAIN = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
CARD = b"---\nlicense: mit\n---\n# A dataset\n"

# Runs each line, a list of arguments of `dsmoe` and variables, and answers with the exit code.
CLIENT = """
import contextlib, json, os, sys
from dsmoe_jax.cli import main
from dsmoe_jax.train.data import hub_datasets
from huggingface_hub import constants
for line in sys.stdin:
    arguments, offline = json.loads(line)
    constants.HF_HUB_OFFLINE = offline
    hub_datasets.find_hub_files.cache_clear()
    with contextlib.redirect_stdout(sys.stderr):
        code = main(arguments)
    print(json.dumps(code), flush=True)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve() as hub:
        yield hub


class Client:
    """A process that runs commands, with its own cache."""

    def __init__(self, process: Any, log: Path):
        self.process, self._log = process, log

    def run(self, *arguments: Any, offline: bool = False) -> tuple[int, str]:
        """Return exit code and messages."""
        before = len(self._log.read_text())
        print(json.dumps([list(map(str, arguments)), offline]), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        return code, self._log.read_text()[before:]


@pytest.fixture(scope="module")
def client(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("hf_home")
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    pipe, log = subprocess.PIPE, home / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", CLIENT], stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=ROOT, env=env
        ) as process,
    ):
        yield Client(process, log)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a dataset."""
    folder = tmp_path_factory.mktemp("files")
    for name, texts in {TRAIN[0]: TEXTS[:2], TRAIN[1]: TEXTS[2:], "data/test-00000-of-00001.parquet": ["test"]}.items():
        write_texts(folder / name, texts)
    (folder / "README.md").write_bytes(CARD)
    return folder


def test_a_dataset_of_the_hub_equals_its_files(
    hub: FakeHub, client: Client, files: Path, tokenizer_folder: Path, tmp_path: Path
):
    contents = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
    repository = hub.add("datasets/some/texts", contents)
    sha = repository.branches["main"]
    arguments = ("--tokenizer", tokenizer_folder, "--val-fraction", 0)
    tokenize([files / name for name in TRAIN], tokenizer_folder, tmp_path / "local", val_fraction=0.0)

    for name, offline in {"online": False, "offline": True}.items():
        source, out = "hf://datasets/some/texts", tmp_path / name
        code, messages = client.run("tokenize", source, *arguments, "--out", out, offline=offline)
        assert code == 0, messages

        assert ids_of(TokenShards.open(out)) == ids_of(TokenShards.open(tmp_path / "local"))
        assert json.loads((out / "manifest.json").read_text())["revisions"] == {source: sha}
    assert sorted(set(hub.fetched("datasets/some/texts"))) == ["README.md", *TRAIN]  # not the test split
    code, _ = client.run("tokenize", f"hf://datasets/some/texts@{sha}:test", *arguments, "--out", tmp_path / "test")
    assert len(TokenShards.open(tmp_path / "test")) == 1


def test_the_copy_in_parquet_is_read(hub: FakeHub, client: Client, files: Path, tokenizer_folder: Path, tmp_path: Path):
    repository = hub.add("datasets/some/csv", {"a.csv": b"text\nhello\n"})
    repository.commit({"en/train/0000.parquet": (files / TRAIN[0]).read_bytes()}, branch="refs/convert/parquet")

    code, messages = client.run(
        *("tokenize", "hf://datasets/some/csv", "--tokenizer", tokenizer_folder, "--out", tmp_path / "out")
    )

    assert code == 0, messages
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["documents"] > 0


def test_problems_give_one_line(hub: FakeHub, client: Client, files: Path, tokenizer_folder: Path, tmp_path: Path):
    train = (files / TRAIN[0]).read_bytes()
    hub.add("datasets/some/half", {TRAIN[0]: train, TRAIN[1]: train})
    hub.add("datasets/some/silent", {}, listing="silent")
    hub.add("datasets/some/images", {"a.png": b""})
    arguments = ("--tokenizer", tokenizer_folder, "--out", tmp_path / "out")
    column = ("--text-column", "body")
    problems: dict[str, tuple[str, tuple[Any, ...], bool]] = {
        "some/absent: no such dataset on 127.0.0.1": ("some/absent", (), False),
        "cannot be fetched from 127.0.0.1": ("some/silent", (), False),
        "HF_HUB_OFFLINE is set and the cache, ": ("some/never", (), True),
        "has no split 'dev': append :SPLIT, one of train": ("some/half:dev", (), False),
        "has no configuration 'en': append /CONFIG, one of default": ("some/half/en", (), False),
        "has no column 'body', only id, text": ("some/half", column, False),
        "has no revision 'other'": ("some/half@other", (), False),
        "has no files in a format that can be read: .jsonl": ("some/images", (), False),
        "must be hf://datasets/OWNER/NAME[@REVISION][/CONFIG][:SPLIT]": ("some", (), False),
        "has 1 of the 2 files data/train-*-of-00002*": ("some/half", (), True),
    }
    for expected, (name, options, offline) in problems.items():
        code, messages = client.run("tokenize", f"hf://datasets/{name}", *arguments, *options, offline=offline)

        assert code == 2
        assert messages.startswith("dsmoe tokenize: ")
        assert expected in messages
        assert len(messages.splitlines()) == 1, messages
    assert not (tmp_path / "out").exists()


CONFIGS = [
    {"config_name": "en", "data_files": [{"split": "train", "path": "en/*"}, {"split": "test", "path": ["en2/*"]}]},
    {"config_name": "de", "data_files": "de/part-*", "default": True},
]


@pytest.mark.parametrize(
    ("files", "configs", "config", "split", "expected"),
    [
        ("a.parquet b.jsonl", None, None, "train", "a.parquet"),
        ("b.jsonl a.jsonl.gz", None, None, "train", "a.jsonl.gz b.jsonl"),
        ("data/train-0.parquet data/test-0.parquet", None, None, "test", "data/test-0.parquet"),
        ("train/0.parquet dev/0.parquet", None, None, "validation", "dev/0.parquet"),
        ("en/train-0.parquet de/train-0.parquet", None, "de", "train", "de/train-0.parquet"),
        ("default/partial-train/0.parquet x/train/0.parquet", None, None, "train", "default/partial-train/0.parquet"),
        ("en/a.parquet en2/b.parquet de/part-1.parquet de/c.parquet", CONFIGS, None, "train", "de/part-1.parquet"),
        ("en/a.parquet en2/b.parquet de/part-1.parquet", CONFIGS, "en", "test", "en2/b.parquet"),
    ],
)
def test_configurations_and_splits_select_files(files: str, configs: Any, config: Any, split: str, expected: str):
    assert select_files(files.split(), {"configs": configs}, config, split) == expected.split()


@pytest.fixture
def in_process(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, for this process."""
    from huggingface_hub import constants

    for name, value in {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    find_hub_files.cache_clear()
    return hub


def test_training_reads_datasets_of_the_hub(in_process: FakeHub, files: Path, tokenizer_folder: Path, tmp_path: Path):
    names = {name: (files / name).read_bytes() for name in TRAIN}
    repository = in_process.add("datasets/some/corpus", names)

    def opened(out: str, *sources: Any, **options: Any) -> Any:
        data: dict[str, Any] = {"val_fraction": 0.0, "sequence_length": 16, "batch_size": 2}
        data |= {"sources": tuple(map(str, sources)), "tokenizer": str(tokenizer_folder)}
        config = RunConfig(output_dir=str(tmp_path / out), data=DataConfig(**data))
        check_inputs(dataclasses.replace(config, model=write_model(tmp_path)))
        return prepare(config, tiny(vocab_size=258), tmp_path / out, **options).stream

    source = "hf://datasets/some/corpus"
    found, expected = opened("hub", source), opened("local", files / TRAIN[0], files / TRAIN[1]).identity
    ids = ids_of(TokenShards.open(tmp_path / "hub" / "data" / "00"))
    local = [ids_of(TokenShards.open(tmp_path / "local" / "data" / f"0{n}")) for n in range(2)]

    assert ids == local[0] + local[1]
    repository.commit({**names, "b.txt": b"another commit with the same files"})
    find_hub_files.cache_clear()
    assert opened("hub", source, resuming=True).identity == found.identity != expected
    repository.commit({name: names[TRAIN[0]] for name in names})
    find_hub_files.cache_clear()
    with pytest.raises(ValueError, match=r"--data.sources: hf://datasets/some/corpus has changed"):
        opened("hub", source, resuming=True)


def test_examples_of_the_hub_are_read(in_process: FakeHub):
    record = b'{"instruction": "Add.", "output": "1"}\n'
    in_process.add("datasets/some/examples", {"train.jsonl": record, "test.jsonl": record})

    options: dict[str, Any] = {"parse": dict, "max_malformed_fraction": 0.0, "exclude": ()}
    found = list(read_source("hf://datasets/some/examples:test", **options))

    place = "hf://datasets/some/examples/test.jsonl:1"
    assert found == [(place, {"instruction": "Add.", "output": "1"})]


def write_model(folder: Path) -> str:
    (folder / "model.json").write_text(json.dumps(tiny(vocab_size=258).to_dict()))
    return str(folder / "model.json")
