"""Exports: outputs, formats and errors that users meet. Start at `test_output_inside_the_checkpoint_is_refused`."""

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.convert import export_gguf, export_hf, import_hf, merge_to
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage import atomic_dir
from tests.helpers.command import run
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf
from tests.helpers.tokenizers import train_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(vocab_size=320)
    source = tmp_path_factory.mktemp("source") / "hf"
    make_tokenizer(source, 300)
    return write_hf(source, config, random_params(config))


@pytest.mark.parametrize("export", [export_hf, export_gguf, lambda source, out: merge_to(source, "adapter", out)],
                         ids=["hf", "gguf", "merged"])  # fmt: skip
def test_output_inside_the_checkpoint_is_refused(export: Any, source: Path):
    if export is export_gguf:
        pytest.importorskip("gguf", reason="the writer is gguf: pip install -e '.[gguf]'")
    before = {*source.iterdir()}

    with pytest.raises(DSMoEError, match=f"out.gguf is inside the checkpoint {source}; choose a path outside"):
        export(source, source / "out.gguf")

    assert {*source.iterdir()} == before


def test_name_of_the_output_implies_gguf(source: Path, tmp_path: Path):
    pytest.importorskip("gguf", reason="the writer is gguf: pip install -e '.[gguf]'")

    code = run("export", source, tmp_path / "model.gguf")

    assert code == 0
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_q8_0_needs_gguf(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    code = run("export", source, tmp_path / "out", "--dtype", "q8_0")

    assert code == 2
    assert capsys.readouterr().err == "dsmoe export: --dtype q8_0 needs --format gguf\n"


def test_progress_bars_of_the_hub_need_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")  # restored after the test
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")

    run("info", "tiny")

    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_sentencepiece_is_exported_with_a_warning(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spm = shutil.copytree(source, tmp_path / "spm")
    (spm / "tokenizer.json").unlink()
    train_model(spm / "tokenizer.model")

    for folder in (source, spm):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            export_hf(folder, tmp_path / f"out_{folder.name}")

        warned = [text for text in caplog.messages if "pass use_fast=False; in 5.x ids differ" in text]
        assert len(warned) == (folder == spm)


def test_full_disk_names_the_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "tokenizer.json", None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/out'"):
        export_hf(source, tmp_path / "out")


def test_space_for_the_tokenizer_is_counted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needed: list[int] = []
    monkeypatch.setattr(atomic_dir, "check_space", lambda _, needs: needed.append(needs))

    report = export_hf(source, tmp_path / "out")

    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    small = (tmp_path / "out" / "tokenizer.json").stat().st_size
    assert report.bytes + small <= needed[0] <= 1.1 * written


def test_own_code_is_imported_without_a_note(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    export_hf(source, tmp_path / "out", with_modeling=True)

    with caplog.at_level(logging.INFO):
        import_hf(tmp_path / "out", tmp_path / "native")

    assert "auto_map" not in caplog.text
