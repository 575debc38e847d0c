"""Functions and verbs that take a hub id; `tests/test_hub.py` tests the downloads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsmoe_jax
from dsmoe_jax.convert import export_hf, import_hf, merge_to, verify, write_adapter
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.lora import LoraConfig
from tests.helpers.adapters import random_adapter
from tests.helpers.command import run
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf

ID, REVISION = "tests/model", ("--revision", "v1")
IDS = np.array([[0, 5, 9, 2]])
CONFIG = tiny(vocab_size=300)
Calls = list[tuple[str, str | None]]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer and sampling defaults."""
    folder = tmp_path_factory.mktemp("ids") / "hf"
    make_tokenizer(folder, 300)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7}))
    return write_hf(folder, CONFIG, random_params(CONFIG))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, hf: Path) -> Calls:
    """Downloads return `hf`, and are listed: the file or "all", and the revision."""
    calls: Calls = []

    def fetch(repo_id: str, *, revision: str | None = None) -> Path:
        calls.append(("all", revision))
        return hf

    def fetch_file(repo_id: str, file: str, *, revision: str | None = None) -> Path:
        calls.append((file, revision))
        return hf / file

    monkeypatch.setattr("dsmoe_jax.convert.hub.fetch", fetch)
    monkeypatch.setattr("dsmoe_jax.convert.hub.fetch_file", fetch_file)
    return calls


def test_models_and_generators_load_by_id(hf: Path, fetched: Calls):
    model, generator = dsmoe_jax.load(ID), Generator.from_pretrained(ID, revision="v1")

    np.testing.assert_array_equal(model(IDS).logits, dsmoe_jax.load(hf)(IDS).logits)
    assert generator.tokenizer is not None
    assert generator.sampling_defaults == {"temperature": 0.7}
    assert fetched == [("all", None), ("all", "v1")]


def test_sampling_defaults_need_one_file(fetched: Calls):
    assert SamplingParams.from_pretrained(ID, revision="v1") == SamplingParams(temperature=0.7)
    assert fetched == [("generation_config.json", "v1")]


def test_info_needs_only_the_config(hf: Path, fetched: Calls, capsys: pytest.CaptureFixture):
    codes = [run("info", ID, *REVISION), run("info", hf)]

    by_id, by_path = (part for part in capsys.readouterr().out.split("parameters") if part)
    assert codes == [0, 0]
    assert by_id == by_path
    assert "vocabulary                         300\n" in by_id
    assert "context length" in by_id
    assert fetched == [("config.json", "v1")]


def test_functions_convert_by_id(hf: Path, fetched: Calls, tmp_path: Path):
    config = LoraConfig(r=2, target_modules=("q_proj",))
    write_adapter(tmp_path / "adapter", config, CONFIG, random_adapter(make_plan(config, CONFIG), CONFIG))

    native = import_hf(ID, tmp_path / "native", revision="v1").path
    back = export_hf(ID, tmp_path / "back", revision="v2").path
    merge_to(ID, tmp_path / "adapter", tmp_path / "merged", revision="v3")
    report = verify(native, ID, revision="v4")

    assert (report.mismatches, verify(back, hf).mismatches) == ([], [])
    want = dsmoe_jax.load(hf, adapter=tmp_path / "adapter")(IDS).logits
    np.testing.assert_allclose(dsmoe_jax.load(tmp_path / "merged")(IDS).logits, want, rtol=0, atol=1e-4)
    assert fetched == [("all", f"v{number}") for number in (1, 2, 3, 4)]


def test_verbs_take_a_revision(hf: Path, fetched: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    codes = [
        run("generate", ID, *REVISION, "--prompt", "hi", "--max-new-tokens", "2"),
        run("export", ID, "back", *REVISION),
        run("verify", ID, *REVISION),
        run("verify", "back", ID, *REVISION),
    ]

    assert codes == [0] * 4
    assert fetched == [("all", "v1")] * 4
    reports = [json.loads(Path(name).read_text()) for name in ("model.verify.json", "back.verify.json")]
    assert [(report["source"], report["mismatches"]) for report in reports] == [(ID, []), ("back", [])]


@pytest.mark.parametrize("verb", ["generate", "chat", "export", "verify", "merge", "info"])
def test_a_revision_of_a_path_is_refused(verb: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    others: dict[str, tuple[Any, ...]] = {
        "generate": ("--prompt", "x"),
        "export": (tmp_path / "out",),
        "merge": (tmp_path, tmp_path / "out"),
    }

    code = run(verb, hf, *others.get(verb, ()), *REVISION)

    assert code == 2
    assert capsys.readouterr().err == f"dsmoe {verb}: revision 'v1' needs a hub id, got the local path {hf}\n"
