"""Downloads from a fake hub on loopback, in subprocesses with a user's environment.

Start at `test_only_needed_files_are_fetched`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.convert import hub as our_hub
from dsmoe_jax.convert.hub import fetch, is_repo_id
from dsmoe_jax.loading import load
from dsmoe_jax.model import split
from tests.helpers import golden
from tests.helpers.fake_hub import FakeHub, serve
from tests.helpers.hf_folder import INDEX, random_params, tiny, write_hf

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parent.parent
BIN_INDEX = "pytorch_model.bin.index.json"
TOKEN = "hf_verysecret"

# Answers each line, [repository, revision, token, file], with the result of `fetch` or `fetch_file`. It runs in a
# subprocess, since huggingface_hub reads most environment variables on import.
CLIENT = """
import faulthandler, json, os, sys, traceback
from dsmoe_jax.convert.hub import fetch, fetch_file
for line in sys.stdin:
    faulthandler.dump_traceback_later(60, exit=True)
    repository, revision, token, file = json.loads(line)
    os.environ["HF_TOKEN"] = token
    try:
        found = fetch_file(repository, file, revision=revision) if file else fetch(repository, revision=revision)
        answer = {"folder": found and str(found)}
    except ValueError as error:
        answer = {"error": str(error), "traceback": traceback.format_exc()}
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that downloads."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process

    def request(
        self, repository: str, revision: str | None = None, token: str = "", file: str | None = None
    ) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([repository, revision, token, file]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def fetch(self, repository: str, revision: str | None = None, token: str = "") -> Path:
        return Path(self.request(repository, revision, token)["folder"])

    def error(self, repository: str, revision: str | None = None, token: str = "") -> str:
        """Return the error message."""
        line = self.request(repository, revision, token)["error"]
        assert line.startswith(f"{repository}: ")
        assert line.isprintable()
        assert len(line) < 500
        return line


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


def client(hub: FakeHub, cache: Path, **environment: str) -> Iterator[Client]:
    pytest.importorskip("huggingface_hub")
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", CLIENT]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env | environment) as process:
        yield Client(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def online(hub: FakeHub, cache: Path) -> Iterator[Client]:
    yield from client(hub, cache)


@pytest.fixture(scope="module")
def offline(hub: FakeHub, cache: Path) -> Iterator[Client]:
    yield from client(hub, cache, HF_HUB_OFFLINE="1")


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small model in two shards."""
    return read(write_hf(tmp_path_factory.mktemp("hub"), tiny(), random_params(tiny()), shards=2))


def index(*shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}).encode()


def holding(*names: str, **content: bytes) -> dict[str, bytes]:
    """Return placeholder files; `fetch` does not open weights."""
    return {"config.json": b"{}"} | {name: name.encode() for name in names} | content


# Names


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        "deepseek-ai/deepseek-moe-16b-base": True,
        "a/b_c.d-1": True,
        "here/model": False,  # an existing folder
        "here/dangling": False,
        "here/other": True,
        "./a/b": False,
        "../b": False,
        "/a/b": False,
        "a": False,
        "a/b/c": False,
        "a/": False,
        "a/..": False,
        "a\\b": False,
        "a/b c": False,
        "a/b\n": False,
        "ä/b": False,
    }.items(),
)
def test_repo_id_is_owner_slash_name_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: bool
):
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)

    assert is_repo_id(source) is expected


def test_invalid_repo_id_is_an_error():
    with pytest.raises(ValueError, match=r"^a/b/c: the repository id must have the form owner/name$"):
        fetch("a/b/c")


def test_missing_huggingface_hub_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(ValueError, match=r"^a/b: no such folder; a hub id needs `pip install 'dsmoe_jax\[hub\]'`$"):
        fetch("a/b")


# Files


def test_only_needed_files_are_fetched(hub: FakeHub, online: Client, checkpoint: dict[str, bytes]):
    extra = holding("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    ignored = holding(
        "README.md", ".gitattributes", "modeling_deepseek.py", "configuration_deepseek.py",
        "pytorch_model.bin", BIN_INDEX, "original/consolidated.00.pth", "original/tokenizer.model", "tokenizer.py",
        "model-00003-of-00002.safetensors",
    )  # fmt: skip
    repository = hub.add("tests/needed", ignored | extra | checkpoint)
    expected = extra | checkpoint

    folder = online.fetch("tests/needed")

    assert folder.name == repository.branches["main"]
    assert sorted(hub.fetched("tests/needed")) == sorted(expected)  # each once
    assert hub.listed("tests/needed") == 1
    assert not [request for request in hub.requests if request.file.endswith(".py")]
    assert read(folder) == expected
    got, want = split(load(folder))[1], random_params(tiny())
    assert got.keys() == want.keys()
    assert [name for name in want if np.asarray(got[name]).tobytes() != want[name].tobytes()] == []


def test_repository_of_bin_files_loads_like_its_folder(hub: FakeHub, online: Client):
    source = golden.folder("k_bin_shards")
    hub.add("tests/bins", read(source))

    folder = online.fetch("tests/bins")

    assert not [name for name in hub.fetched("tests/bins") if "safetensors" in name]
    got, want = split(load(folder))[1], split(load(source))[1]
    assert [name for name in want if np.asarray(got[name]).tobytes() != np.asarray(want[name]).tobytes()] == []


# files of the repository | files fetched with config.json
CHOICES: dict[str, tuple[Mapping[str, bytes], set[str]]] = {
    "safetensors, not bin": (holding("pytorch_model.bin", "model.safetensors"), {"model.safetensors"}),
    "one file of safetensors, not shards of bin": (
        holding("model.safetensors", "a.bin", **{BIN_INDEX: index("a.bin")}),
        {"model.safetensors"},
    ),
    "shards, not one bin": (
        holding("pytorch_model.bin", "b.safetensors", **{INDEX: index("b.safetensors", "b.safetensors")}),
        {INDEX, "b.safetensors"},
    ),
    "one file, not an index whose shards are gone": (
        holding("model.safetensors", "a.safetensors", **{INDEX: index("a.safetensors", "b.safetensors")}),
        {INDEX, "model.safetensors"},
    ),
    "shards of bin": (holding("a.bin", **{BIN_INDEX: index("a.bin")}), {BIN_INDEX, "a.bin"}),
    "one bin": (holding("pytorch_model.bin", "x.py"), {"pytorch_model.bin"}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_hub_weights_are_chosen_as_by_the_reader(hub: FakeHub, online: Client, choice: str):
    files, expected = CHOICES[choice]
    name = f"choices/{list(CHOICES).index(choice)}"
    hub.add(name, files)

    online.fetch(name)

    assert set(hub.fetched(name)) == {"config.json"} | expected


def test_shared_blob_of_the_cache_loads(hub: FakeHub, online: Client, checkpoint: dict[str, bytes]):
    hub.add("tests/shared", checkpoint)
    folder = online.fetch("tests/shared")
    blobs = folder.parent.parent / "blobs"
    for blob in list(blobs.iterdir()):  # as huggingface_hub 2 stores files from Xet
        shared = blobs.parent.parent / "blobs" / blob.name[:2] / blob.name
        shared.parent.mkdir(parents=True, exist_ok=True)
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blobs))

    load(folder)

    assert online.fetch("tests/shared") == folder


# Revisions and the cache


def test_revision_resolves_to_the_commit(hub: FakeHub, online: Client):
    repository = hub.add("tests/revisions", holding("model.safetensors"))
    main = repository.branches["main"]
    other = repository.commit(holding("pytorch_model.bin"), branch="pr/1")

    found = {revision: online.fetch("tests/revisions", revision) for revision in (None, "main", main, "pr/1", other)}

    assert {revision: folder.name for revision, folder in found.items()} == {
        None: main, "main": main, main: main, "pr/1": other, other: other
    }  # fmt: skip
    assert (found["pr/1"] / "pytorch_model.bin").is_file()
    assert not (found["main"] / "pytorch_model.bin").exists()


def test_second_fetch_downloads_only_changes(hub: FakeHub, online: Client):
    repository = hub.add("tests/twice", holding("model.safetensors", "tokenizer.json"))
    first = online.fetch("tests/twice")
    before = hub.fetched("tests/twice")

    second = online.fetch("tests/twice")

    assert second == first
    assert hub.fetched("tests/twice") == before

    sha = repository.commit(holding("model.safetensors", **{"tokenizer.json": b"new"}))
    repository.sizes["model.safetensors"] = 10**18  # more than any disk, but cached

    third = online.fetch("tests/twice")

    assert third.name == sha != first.name
    assert hub.fetched("tests/twice")[len(before) :] == ["tokenizer.json"]
    assert read(third) == repository.commits[sha]


def test_offline_uses_the_cached_snapshot(hub: FakeHub, online: Client, offline: Client):
    hub.add("tests/offline", holding("a.safetensors", **{INDEX: index("a.safetensors")}))
    fetched = online.fetch("tests/offline")
    requests = len(hub.requests)

    assert offline.fetch("tests/offline") == fetched
    assert offline.fetch("tests/offline", fetched.name) == fetched

    assert len(hub.requests) == requests


def test_offline_a_missing_file_is_named(hub: FakeHub, offline: Client, cache: Path):
    hub.add("tests/uncached", holding("model.safetensors"))

    line = offline.error("tests/uncached", "v1")

    assert line.endswith(f"HF_HUB_OFFLINE is set and the cache, {cache}/hub, has no config.json of revision 'v1'")
    assert not hub.fetched("tests/uncached")


def test_interrupted_download_resumes(hub: FakeHub, online: Client, offline: Client):
    files = holding("a.safetensors", **{INDEX: index("a.safetensors", "b.safetensors")})
    # huggingface_hub writes 10 MiB at a time, so one piece arrives.
    files["b.safetensors"] = np.random.default_rng(0).bytes((10 << 20) + 5000)
    repository = hub.add("tests/broken", files, cut={"b.safetensors": (10 << 20) + 1000})
    sha = repository.branches["main"]

    online.error("tests/broken")

    before = hub.fetched("tests/broken")
    assert before[-1] == "b.safetensors"
    assert f"lacks b.safetensors, which {INDEX} names" in offline.error("tests/broken", sha)

    repository.cut.clear()
    folder = online.fetch("tests/broken")

    assert hub.fetched("tests/broken")[len(before) :] == ["b.safetensors"]
    assert read(folder) == files
    assert offline.fetch("tests/broken") == folder


# Errors

FINE = holding("model.safetensors")
HOSTILE = "a shard must be a .safetensors file"

# files | failures of the repository | text of the error
ERRORS: dict[str, tuple[Mapping[str, bytes], dict[str, Any], str]] = {
    "absent": (FINE, {"listing": "absent"}, "no such repository on"),
    "gated": (FINE, {"download": "gated"}, "its owner grants access"),
    "gated, listing too": (FINE, {"listing": "gated"}, "its owner grants access"),
    "bad token": (FINE, {"listing": "bad token"}, "returned HTTP 401; it does not accept the token"),
    "bad token for files": (FINE, {"download": "bad token"}, "returned HTTP 401; it does not accept the token"),
    "forbidden": (FINE, {"listing": "forbidden"}, "returned HTTP 403; the token"),
    "forbidden files": (FINE, {"download": "forbidden"}, "returned HTTP 403; the token"),
    "too many requests": (FINE, {"listing": "busy"}, "returned HTTP 429; too many requests"),
    "hub out of order": (FINE, {"listing": "broken"}, "returned HTTP 503"),
    "line dead": (FINE, {"listing": "silent"}, "cannot be fetched from 127.0.0.1"),
    "another server": (FINE, {"listing": "garbage"}, "cannot be fetched from 127.0.0.1"),
    "no weights": (holding("README.md", "tf_model.h5"), {}, "the repository has no weights; looked for model.safe"),
    "no config": ({"model.safetensors": b""}, {}, "the repository has no config.json"),
    "shard above": (holding(**{INDEX: index("../../x.safetensors")}), {}, HOSTILE),
    "shard in a folder": (holding("a/x.safetensors", **{INDEX: index("a/x.safetensors")}), {}, HOSTILE),
    "absolute shard": (holding(**{INDEX: index("/x.safetensors")}), {}, HOSTILE),
    "code as a shard": (holding("evil.py", **{INDEX: index("evil.py")}), {}, HOSTILE),
    "shard that is no name": (holding(**{INDEX: b'{"weight_map": {"t": ["a"]}}'}), {}, HOSTILE),
    "escape in a shard": (holding(**{INDEX: index("\x1b[31m.safetensors")}), {}, HOSTILE),
    "absent shard": (
        holding("a.safetensors", **{INDEX: index("a.safetensors", "b.safetensors")}),
        {},
        "the repository lacks b.safetensors, which model.safetensors.index.json names",
    ),
    "one file and shards": (
        holding("model.safetensors", "a.safetensors", **{INDEX: index("a.safetensors")}),
        {},
        f"the repository holds two checkpoints, model.safetensors and the shards of {INDEX}; remove one of them",
    ),
    "empty index": (holding(**{INDEX: index()}), {}, "weight_map must be a non-empty object"),
    "index that is no JSON": (holding(**{INDEX: b"{"}), {}, f"{INDEX}: is not JSON"),
    "no room": (FINE, {"sizes": {"model.safetensors": 10**18}}, "needs 1000000000.00 GB"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_precede_the_download_of_weights(hub: FakeHub, online: Client, case: str):
    files, failures, message = ERRORS[case]
    name = f"error/{list(ERRORS).index(case)}"
    hub.add(name, files, **failures)

    line = online.error(name)

    assert message in line
    assert set(hub.fetched(name)) <= {"config.json", INDEX}


def test_unknown_repository_or_revision_is_an_error(hub: FakeHub, online: Client):
    hub.add("tests/known", FINE)

    assert "no such folder, and no such repository on 127.0.0.1:" in online.error("tests/unknown")
    assert online.error("tests/known", "v7").endswith(": has no revision 'v7'")


# Single files


def test_only_one_file_is_fetched_for_a_config(hub: FakeHub, online: Client, offline: Client):
    hub.add("tests/single", FINE)

    found = online.request("tests/single", file="config.json")["folder"]

    assert Path(found).read_bytes() == FINE["config.json"]
    assert hub.fetched("tests/single") == ["config.json"]
    assert online.request("tests/single", file="generation_config.json")["folder"] is None
    assert offline.request("tests/single", file="config.json")["folder"] == found
    assert offline.request("tests/single", file="generation_config.json")["folder"] is None


def test_an_error_of_a_single_file_is_one_line(hub: FakeHub, online: Client):
    hub.add("tests/silent", FINE, download="silent")

    lines = [online.request(name, file="config.json")["error"] for name in ("tests/silent", "tests/nowhere")]

    assert "cannot be fetched from 127.0.0.1:" in lines[0]
    assert "no such folder, and no such repository" in lines[1]
    assert not any("\n" in line for line in lines)


# The token


def test_token_is_sent_with_every_request(hub: FakeHub, online: Client):
    hub.add("tests/private", FINE)

    online.fetch("tests/private", token=TOKEN)

    assert {r.token for r in hub.requests if r.repository == "tests/private"} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("failures", ["absent", "gated", "bad token", "forbidden", "silent", "garbage"])
def test_token_is_in_no_error(hub: FakeHub, online: Client, failures: str):
    hub.add(f"secret/{failures.replace(' ', '-')}", FINE, listing=failures)

    answer = online.request(f"secret/{failures.replace(' ', '-')}", token=TOKEN)

    assert hub.requests[-1].token == f"Bearer {TOKEN}"
    assert TOKEN not in answer["error"] + answer["traceback"]


def test_malformed_token_is_in_no_error(hub: FakeHub, online: Client):
    hub.add("tests/malformed", FINE)

    answer = online.request("tests/malformed", token=f"{TOKEN}\v{TOKEN}")

    assert answer["error"].endswith(": the token is malformed")
    assert TOKEN not in answer["traceback"]


def test_every_layout_of_the_reader_is_tested():
    fetched = set().union(*(expected for _, expected in CHOICES.values()))

    assert {name for name, _, _ in our_hub.LAYOUTS} <= fetched
