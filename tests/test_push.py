"""Uploads to a fake hub on loopback, in subprocesses with a user's environment.

Start at `test_pushed_checkpoint_comes_back`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe_jax.convert import import_hf
from dsmoe_jax.convert.model_card import model_card
from tests.helpers.fake_hub import FakeHub, serve
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf

pytest.importorskip("huggingface_hub")

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


def dsmoe(
    hub: FakeHub, home: Path, *arguments: str | Path, token: str = "hf_secret"
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "-m", "dsmoe_jax", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


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
    assert {path.name for path in native.parent.iterdir()} == {"hf", "native", "tokenizer"}  # nothing is left


@pytest.mark.slow
def test_repeated_push_sends_the_weights_once(hub: FakeHub, native: Path, tmp_path: Path):
    assert dsmoe(hub, tmp_path, "push", native, "someone/twice").returncode == 0
    sent = len(hub.objects)

    again = dsmoe(hub, tmp_path, "push", native, "someone/twice", "--revision", "v2")

    assert again.returncode == 0, again.stderr
    assert len(hub.objects) == sent
    assert files(hub, "someone/twice", "v2").keys() == files(hub, "someone/twice").keys()


@pytest.mark.parametrize(("name", "token", "line"), [
    ("no-owner", "hf_secret", "repository id must have the form owner/name"),
    ("someone/no-token", "", "set HF_TOKEN or run `hf auth login`"),
    ("someone/forbidden", "hf_secret", "does not permit it"),
])  # fmt: skip
def test_refusals_are_one_line(name: str, token: str, line: str, hub: FakeHub, native: Path, tmp_path: Path):
    hub.add("someone/forbidden", {}, listing="forbidden")

    refused = dsmoe(hub, tmp_path, "push", native, name, token=token)

    assert refused.returncode == 2
    (last,) = [text for text in refused.stderr.splitlines() if text.startswith("dsmoe push: ")]
    assert line in last
    assert "hf_secret" not in refused.stderr
    assert {path.name for path in native.parent.iterdir()} == {"hf", "native", "tokenizer"}


def test_dry_run_writes_the_folder_only(hub: FakeHub, native: Path, tmp_path: Path):
    requests = len(hub.requests)

    run = dsmoe(hub, tmp_path, "push", native, "someone/dry", "--dry-run", tmp_path / "folder", token="")

    assert run.returncode == 0, run.stderr
    assert (tmp_path / "folder" / "README.md").read_text() == model_card(native, "someone/dry")
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
