"""Fine-tuning from a Hugging Face folder or a hub id."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import dsmoe_jax
from dsmoe_jax.convert import export_hf
from dsmoe_jax.convert.peft import WEIGHTS
from dsmoe_jax.model import split
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.finetune import finetuning
from dsmoe_jax.train.job import pretraining
from tests import test_finetune
from tests.helpers.hf_folder import flip_bit
from tests.test_finetune import config

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]
home = test_finetune.home


@pytest.fixture(scope="module")
def hf(home: Path) -> Path:
    """The same checkpoint in the layout of Hugging Face."""
    return export_hf(home / "base", home / "hf").path


@pytest.mark.parametrize("quantize", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_hugging_face_base_trains_as_a_native_one(home: Path, hf: Path, tmp_path: Path, quantize: Any):
    def params(base: Path) -> dict[str, Any]:
        job = finetuning(config(home, tmp_path / "out", init_from=str(base), quantize=quantize), tmp_path / "out")
        frozen = job.load_frozen(None)
        return {**frozen, **job.init_params(None, frozen)}

    ours, theirs = params(home / "base"), params(hf)

    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, value, theirs[name])), name


def test_an_adapter_names_its_base_as_typed(home: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dsmoe_jax.convert.hub.fetch", lambda repo_id, revision: hf)
    settings = config(home, tmp_path / "out", init_from="tests/base", revision="v1")
    job = finetuning(settings, tmp_path / "out")

    job.save(tmp_path / "adapter", job.init_params(None, job.load_frozen(None)))

    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "tests/base"
    modes = {(tmp_path / "adapter" / name).stat().st_mode for name in ("adapter_config.json", WEIGHTS)}
    assert len(modes) == 1


def test_another_hugging_face_base_cannot_be_resumed_on(home: Path, hf: Path, tmp_path: Path):
    settings = config(home, tmp_path / "out", init_from=str(shutil.copytree(hf, tmp_path / "copy")))
    before = finetuning(settings, tmp_path / "out").resume_metadata["config"]["init_from"]

    file = next((tmp_path / "copy").glob("*.safetensors"))
    flip_bit(file, -1)

    assert finetuning(settings, tmp_path / "out").resume_metadata["config"]["init_from"] != before
    assert json.loads((tmp_path / "out" / "hashes.json").read_text())


def test_pretraining_starts_from_a_hugging_face_folder(home: Path, hf: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("the sky is blue and the sea is wide\n\n" * 40)
    data = DataConfig(sources=(str(tmp_path / "text.txt"),), sequence_length=16, batch_size=8, val_fraction=0.0)
    settings = RunConfig(output_dir=str(tmp_path / "out"), init_from=str(hf), data=data)

    job = pretraining(settings, tmp_path / "out")

    assert job.corpus.tokenizer == hf
    want = split(dsmoe_jax.load(home / "base"))[1]
    for name, value in job.init_params(None, {}).items():
        np.testing.assert_array_equal(value, want[name])
