"""Uploads to a fake hub on loopback, in subprocesses with a user's environment.

Start at `test_pushed_checkpoint_comes_back`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import export_gguf, import_hf, push
from dsmoe_jax.convert.model_card import model_card
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.locks import lock_name
from tests.helpers.fake_hub import FakeHub, serve
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.heavy

MODEL = "someone/tiny-moe"


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    source = write_hf(folder / "hf", tiny(vocab_size=300), random_params(tiny(vocab_size=300)))
    make_tokenizer(folder / "tokenizer", 300)
    for file in (folder / "tokenizer").iterdir():
        file.rename(source / file.name)
    return import_hf(source, folder / "native").path


def start(hub: FakeHub, home: Path, *arguments: str | Path, token: str = "hf_secret") -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "-m", "dsmoe_jax", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def dsmoe(hub: FakeHub, home: Path, *arguments: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
    with start(hub, home, *arguments, **options) as process:
        out, error = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def nothing_left(native: Path) -> bool:
    return {path.name for path in native.parent.iterdir()} == {"hf", "native", "tokenizer"}


def files(hub: FakeHub, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return dict(repository.commits[repository.branches[branch]])


def test_pushed_checkpoint_comes_back(hub: FakeHub, native: Path, tmp_path: Path):
    pushed = dsmoe(hub, tmp_path, "push", native, MODEL, "--private", "--license", "mit")
    converted = dsmoe(hub, tmp_path, "convert", MODEL, tmp_path / "again")

    assert (pushed.returncode, converted.returncode) == (0, 0), pushed.stderr + converted.stderr
    assert f"{hub.url}/{MODEL}/commit/" in pushed.stdout
    assert hub.repositories[MODEL].private
    assert {"README.md", "modeling_deepseek.py", "configuration_deepseek.py", "tokenizer.json"} <= files(
        hub, MODEL
    ).keys()
    before, after = (json.loads((path / "dsmoe_jax.json").read_text()) for path in (native, tmp_path / "again"))
    assert before["tensors"] == after["tensors"]
    assert nothing_left(native)


@pytest.mark.slow
def test_repeated_push_sends_the_weights_once(hub: FakeHub, native: Path, tmp_path: Path):
    assert dsmoe(hub, tmp_path, "push", native, "someone/twice").returncode == 0
    sent = len(hub.objects)

    again = dsmoe(hub, tmp_path, "push", native, "someone/twice", "--revision", "v2")

    assert again.returncode == 0, again.stderr
    assert len(hub.objects) == sent
    assert files(hub, "someone/twice", "v2").keys() == files(hub, "someone/twice").keys()


def test_files_of_another_model_are_removed(hub: FakeHub, native: Path, tmp_path: Path):
    weights = ("model.safetensors", "model-00001-of-00009.safetensors", "pytorch_model-00001-of-00002.bin")
    indexes = ("pytorch_model.bin.index.json", "tf_model.h5")
    stale = (*weights, *indexes, "adapter_config.json", "adapter_model.safetensors", "tokenizer.model")
    kept = ("notes.txt", "old/model.safetensors", "model.gguf")
    hub.add("someone/full", dict.fromkeys((*stale, *kept, "README.md", "config.json"), b"{}"))

    run = dsmoe(hub, tmp_path, "push", native, "someone/full")

    assert run.returncode == 0, run.stderr
    found = files(hub, "someone/full").keys()
    assert not found & {*stale}
    assert {*kept, "model.safetensors.index.json"} <= found
    assert len(hub.repositories["someone/full"].commits) == 2
    assert f"Removing {len(stale)} files of another model from someone/full" in run.stderr
    assert "Replacing README.md of someone/full" in run.stderr


@pytest.mark.parametrize(("name", "options", "line"), [
    ("someone/no-token", {"token": ""}, "an upload needs a token: set HF_TOKEN or run `hf auth login`"),
    pytest.param("someone/forbidden", {}, "does not permit it", marks=pytest.mark.slow),
    ("someone/absent", {}, "no such repository on 127.0.0.1"),
    pytest.param("someone/silent", {}, "cannot upload to 127.0.0.1", marks=pytest.mark.slow),
    ("someone/other", {"license": "no such"}, 'the model card is invalid: "license" must be one of [apache-2.0, mit]'),
    pytest.param("someone/offline", {"url": "http://127.0.0.1:9"}, "cannot upload to 127.0.0.1:9: Connection refused",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_refusals_are_one_line(
    name: str, options: dict[str, str], line: str, hub: FakeHub, native: Path, tmp_path: Path
):
    for failure in ("forbidden", "absent", "silent"):
        hub.add(f"someone/{failure}", {}, listing=failure)
    reached = FakeHub(options.get("url", hub.url))
    license = ("--license", options["license"]) if "license" in options else ()

    refused = dsmoe(reached, tmp_path, "push", native, name, *license, token=options.get("token", "hf_secret"))

    assert refused.returncode == 2
    (last,) = [text for text in refused.stderr.splitlines() if text.startswith("dsmoe push: ")]
    assert line in last
    assert "hf_secret" not in refused.stderr
    assert "no such folder" not in last
    assert nothing_left(native)


@pytest.mark.slow
def test_public_repository_does_not_become_private(hub: FakeHub, native: Path, tmp_path: Path):
    hub.add("someone/public", {"config.json": b"{}"})

    run = dsmoe(hub, tmp_path, "push", native, "someone/public", "--private")

    assert run.returncode == 2
    line = "private is set, but the repository exists and is public; nothing was uploaded"
    assert run.stderr.splitlines()[-1] == f"dsmoe push: someone/public: {line}"
    assert len(hub.repositories["someone/public"].commits) == 1
    assert nothing_left(native)


def test_second_push_of_a_checkpoint_waits(native: Path):
    with lock_name(native, "push.lock"), pytest.raises(DSMoEError, match="native is in use by another process"):
        push(native, "someone/x")


@pytest.mark.slow
def test_hub_id_is_pushed(hub: FakeHub, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("someone/origin", {path.name: path.read_bytes() for path in (native.parent / "hf").iterdir()})
    monkeypatch.chdir(tmp_path)

    run = dsmoe(hub, tmp_path / "home", "push", "someone/origin", "else/copy")

    assert run.returncode == 0, run.stderr
    found = files(hub, "else/copy")
    assert "model.safetensors.index.json" in found
    assert b'base_model: "someone/origin"' in found["README.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(("files", "message"), [
    (["adapter_config.json"], "has no config.json: it is an adapter"),
    (["run.json"], "it is the folder of a run; did you mean .*model"),
    ([], "config.json: does not exist"),
    (None, "checkpoint must be a folder, got the file"),
], ids=["adapter", "run", "empty", "file"])  # fmt: skip
def test_other_sources_are_refused_with_a_hint(files: list[str] | None, message: str, tmp_path: Path):
    source = tmp_path / "source"
    if files is None:
        source.touch()
    else:
        source.mkdir()
        for file in files:
            (source / file).write_text("{}")

    with pytest.raises(DSMoEError, match=message):
        push(source, "someone/x")


@pytest.mark.slow
def test_interrupted_push_resumes(hub: FakeHub, native: Path, tmp_path: Path):
    hub.objects.clear()
    uploads, push = hub.uploads, ("push", native, "someone/interrupted")
    for step, number in (("put", signal.SIGINT), ("commit", signal.SIGTERM), ("commit", signal.SIGKILL)):
        hub.stall = step
        hub.stalled.clear()
        hub.go_on.clear()
        with start(hub, tmp_path, *push) as process:
            assert hub.stalled.wait(60)
            process.send_signal(number)
            process.communicate(timeout=10)  # although the hub does not answer
        hub.stall = ""
        hub.go_on.set()

        assert not files(hub, "someone/interrupted")
        killed = number == signal.SIGKILL
        assert process.returncode == (-number if killed else 130)
        assert nothing_left(native) is not killed

    assert dsmoe(hub, tmp_path, *push).returncode == 0
    assert nothing_left(native)
    assert "model.safetensors.index.json" in files(hub, "someone/interrupted")
    assert hub.uploads == uploads + 2  # the first is incomplete, and the last two runs upload nothing


@pytest.mark.parametrize(("repo_id", "base_model", "message"), [
    ("no-owner", None, "no-owner: the repository id must have the form owner/name"),
    ("some one/x", None, "some one/x: the repository id must have the form owner/name"),
    ("someone/a--b", None, "someone/a--b: Cannot have -- or .. in repo_id"),
    ("someone/x.git", None, "someone/x.git: Repo_id cannot end by '.git'"),
    ("someone/x", "someone/x", "someone/x: base_model must be another repository"),
    ("someone/x", "a b", "someone/x: base_model must be a hub id, got 'a b'"),
    ("someone/x", "https://hub/a/b", "someone/x: base_model must be a hub id, got 'https://hub/a/b'"),
])  # fmt: skip
def test_dry_run_checks_ids_as_the_hub(
    repo_id: str, base_model: str | None, message: str, native: Path, tmp_path: Path
):
    with pytest.raises(DSMoEError, match=re.escape(message)) as refused:
        push(native, repo_id, base_model=base_model, dry_run=tmp_path / "folder")

    assert "\n" not in str(refused.value)
    assert not (tmp_path / "folder").exists()


def test_full_disk_stops_before_the_hub_changes(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for folder in (None, tmp_path / "folder"):
        with pytest.raises(DSMoEError, match=r"needs 0\.00 GB more; .* has 0\.00 GB free"):
            push(native, "someone/full", dry_run=folder)

    assert nothing_left(native)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(native: Path, tmp_path: Path):
    with pytest.raises(DSMoEError, match=f"{tmp_path} exists; nothing is overwritten"):
        push(native, "someone/x", dry_run=tmp_path)

    assert not list(tmp_path.iterdir())


def test_card_has_the_dtype_of_the_export(native: Path, tmp_path: Path):
    push(native, "someone/x", dtype="bfloat16", dry_run=tmp_path / "folder")

    assert "| dtype | bfloat16 |" in (tmp_path / "folder" / "README.md").read_text()


def test_gguf_is_exported_by_hub_id(hub: FakeHub, native: Path, tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="the writer is gguf: pip install -e '.[gguf]'")
    hub.add("someone/source", {path.name: path.read_bytes() for path in (native.parent / "hf").iterdir()})

    run = dsmoe(hub, tmp_path, "export", "someone/source", tmp_path / "model.gguf", "--format", "gguf")

    assert run.returncode == 0, run.stderr
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.name"].contents() == "source"
    assert "gguf: This GGUF file" not in run.stderr
    assert "Writing the following files" not in run.stderr


def test_gguf_names_the_missing_extra(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(DSMoEError, match=r"GGUF needs the package gguf: pip install 'dsmoe_jax\[gguf\]'"):
        export_gguf(native, tmp_path / "model.gguf")


def test_dry_run_writes_the_folder_only(hub: FakeHub, native: Path, tmp_path: Path):
    requests = len(hub.requests)

    run = dsmoe(hub, tmp_path, "push", native, "someone/dry", "--dry-run", tmp_path / "folder", token="")

    assert run.returncode == 0, run.stderr
    exported = ModelConfig.from_file(tmp_path / "folder")
    assert (tmp_path / "folder" / "README.md").read_text() == model_card(native, "someone/dry", config=exported)
    assert len(hub.requests) == requests
    assert "someone/dry" not in hub.repositories


def test_card_describes_model_and_run(native: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(native)
    fields = {
        "data": {"batch_size": 8, "sequence_length": 256},
        "optimizer": {"learning_rate": 0.001, "schedule": "cosine"},
    }
    result = {"step": 1000, "loss": 3.5, "eval_loss": 3.25}
    (native.parent / "run.json").write_text(json.dumps(fields | {"result": result}))

    card = model_card(native, "someone/x", license="mit", base_model="someone/base")

    (native.parent / "run.json").unlink()
    assert card.startswith("---\n")
    for text in (
        'license: "mit"',
        'base_model: "someone/base"',
        "2 shared and 8 routed",
        "top-2",
        "1,000 steps of 8 × 256",
    ):
        assert text in card
    assert "3.2500 nats per token" in card
