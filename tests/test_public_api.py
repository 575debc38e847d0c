"""The public names, and wrong arguments of public functions and commands: one line that says what to pass instead."""

import copy
import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import dsmoe_jax
from dsmoe_jax import MeshConfig, SamplingParams, Tokenizer, convert
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Chat, Generator
from dsmoe_jax.info import describe
from tests.helpers.adapters import random_adapter
from tests.helpers.command import load_once, run
from tests.helpers.hf_folder import snapshot
from tests.helpers.small import SMALL, small_model


def refused(message: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises(DSMoEError, match=message) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dsmoe_jax.convert.peft_matching import make_plan
    from dsmoe_jax.lora import LoraConfig

    path, config = tmp_path_factory.mktemp("adapter") / "lora", LoraConfig(r=2, target_modules=("q_proj",))
    convert.write_adapter(path, config, SMALL, random_adapter(make_plan(config, SMALL), SMALL))
    return path


@pytest.mark.parametrize("module", [dsmoe_jax, convert], ids=lambda module: module.__name__)
def test_dir_lists_public_names_only(module: Any):
    assert set(dir(module)) - {"__version__"} == set(module.__all__)


def test_chat_is_at_the_top_level():
    assert dsmoe_jax.Chat is Chat


# saving


def test_a_saved_model_has_the_files_of_its_tokenizer(checkpoint: Path, generator: Generator, tmp_path: Path):
    config = tmp_path / "generation_config.json"
    config.write_text("{}")

    dsmoe_jax.save(small_model(), tmp_path / "one", tokenizer=generator.tokenizer, extra_files=[str(config)])
    dsmoe_jax.save(small_model(), tmp_path / "two", tokenizer=checkpoint)

    assert (tmp_path / "one" / config.name).is_file()
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert Generator.from_pretrained(folder).encode("def") == generator.encode("def")


def test_only_dense_models_are_saved(checkpoint: Path, adapter: Path, tmp_path: Path):
    quantized, adapted = dsmoe_jax.load(checkpoint, quantize="int8"), dsmoe_jax.load(checkpoint, adapter=adapter)

    refused("is quantized: load the model without `quantize`", dsmoe_jax.save, quantized, tmp_path / "x")
    refused("has an adapter: merge it with `dsmoe_jax.convert.merge_to`", dsmoe_jax.save, adapted, tmp_path / "x")
    refused("^model must be a DeepSeekMoE, got 3$", dsmoe_jax.save, 3, tmp_path / "x")
    refused("absent is not a file", dsmoe_jax.save, small_model(), tmp_path / "x", extra_files=["absent"])
    refused("has no tokenizer files", dsmoe_jax.save, small_model(), tmp_path / "x", tokenizer=tmp_path)
    assert not list(tmp_path.iterdir())


# loading


def mesh_of(names: tuple[str, ...], kind: AxisType) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(8, *(1,) * (len(names) - 1)), names, axis_types=(kind,) * len(names))


def test_other_meshes_name_make_mesh(checkpoint: Path):
    own, explicit = mesh_of(("data",), AxisType.Auto), mesh_of(("data", "fsdp", "expert", "tensor"), AxisType.Explicit)

    for mesh, got in ((own, r"got data \(Auto\)"), (explicit, r"got data \(Explicit\), ")):
        refused(
            rf"^mesh must have .*dsmoe_jax\.make_mesh\(MeshConfig\(…\)\)`; {got}", dsmoe_jax.load, checkpoint, mesh=mesh
        )


@pytest.mark.parametrize("size", ["2", 2.0, True])
def test_a_mesh_size_is_an_int(size: Any):
    refused(f"^mesh axis fsdp must be a positive int or -1, got {size!r}$", dsmoe_jax.make_mesh, MeshConfig(fsdp=size))


def test_wrong_options_of_load_are_named(checkpoint: Path):
    refused("^dtype must be one of float32, bfloat16, float16, got 16$", dsmoe_jax.load, checkpoint, dtype=16)
    refused("^verify must be True or False, got 'no'$", dsmoe_jax.load, checkpoint, verify="no")


def test_other_folders_lead_to_the_model(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "tiny")

    for load in (dsmoe_jax.load, Generator.from_pretrained, SamplingParams.from_pretrained):
        refused(r"the folder of a run; did you mean \S+/tiny/model\?$", load, tmp_path / "tiny")
        refused("it is an adapter; pass its base as the model and this folder as the adapter$", load, adapter)
        refused(r"^model must be a folder, got the file \S+; did you mean", load, tmp_path / "config.json")
        refused("^bench is a preset, which has no weights: model must be a checkpoint or a hub id$", load, "bench")
    assert run("info", tmp_path / "tiny") == 2
    assert "the folder of a run; did you mean" in capsys.readouterr().err
    (tmp_path / "tiny" / "run.json").unlink()
    refused(f"^{tmp_path}/tiny/config.json: does not exist$", dsmoe_jax.load, ".")


def test_near_names_are_suggested(capsys: pytest.CaptureFixture):
    refused("got 'deepseek_moe_16': did you mean deepseek_moe_16b\\?$", describe, "deepseek_moe_16")

    assert run("generat", "x") == 2
    assert "got 'generat': did you mean generate?" in capsys.readouterr().err


def test_a_tokenizer_of_a_hub_id_names_the_generator():
    refused(
        r"^owner/name: does not exist; .*Generator\.from_pretrained\(…\)\.tokenizer$",
        Tokenizer.from_pretrained,
        "owner/name",
    )


# the model


# fmt: off
MASKED: dict[str, tuple[dict[str, Any], str]] = {
    "ragged":    ({"token_ids": [[1, 2], [3]]}, r"^token_ids must be \[B, T\], got sequences of different lengths"),
    "float":     ({"attention_mask": np.ones((1, 2), "f4")}, r"^attention_mask must be int or bool .*, got float32$"),
    "negative":  ({"position_ids": np.array([[-1, 0]])}, "^position_ids must not be negative, got -1$"),
    "shape":     ({"attention_mask": [1, 1]}, r"^attention_mask must have the shape .*, got \(2,\)$"),
}
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), MASKED.values(), ids=MASKED)
def test_wrong_inputs_of_the_model_are_named(arguments: dict[str, Any], message: str):
    refused(message, small_model(), **{"token_ids": [[1, 2]], **arguments})


def test_a_mask_may_be_boolean():
    want = small_model()([[1, 2]], np.array([[1, 1]])).logits

    np.testing.assert_array_equal(small_model()([[1, 2]], np.array([[True, True]])).logits, want)


# generation


@pytest.mark.parametrize("params", [{"max_tokens": 2}, 5, [{}], "x"], ids=str)
def test_params_must_be_sampling_params(generator: Generator, params: Any):
    message = "^params must be SamplingParams or a list of them, got "

    refused(message, generator, ["a"], params)
    refused(message, generator.stream, "a", params)


def test_wrong_arguments_of_a_generator_are_named(generator: Generator):
    refused("'sampling_params'; did you mean 'params'", generator, "a", sampling_params=SamplingParams())
    for model in ("path", None):
        refused("^model must be a DeepSeekMoE, got .*; Generator.from_pretrained loads one$", Generator, model)
    refused("^tokenizer must be .*; Tokenizer.from_pretrained loads one$", Generator, small_model(), "path")
    refused("^text must be a string or token ids, got None$", generator.perplexity, None)
    refused("^n must be 1 for a chat, got 2$", Chat, generator, n=2)


def test_errors_from_python_name_no_flags():
    refused(
        "^a text prompt needs a tokenizer, and this generator has none: pass token ids$", Generator(small_model()), "a"
    )


def test_max_tokens_reads_and_replaces_max_new_tokens():
    params = SamplingParams(max_tokens=3)

    assert (params.max_tokens, params.max_new_tokens, SamplingParams().max_tokens) == (3, 3, 128)
    for name in ("max_tokens", "max_new_tokens"):
        changed = dataclasses.replace(params, **{name: 7})
        assert (changed.max_tokens, changed.max_new_tokens) == (7, 7)
    assert dataclasses.replace(params, seed=1).max_tokens == 3
    assert copy.copy(params) == pickle.loads(pickle.dumps(params)) == params
    refused("must be equal, got 7 and 8", dataclasses.replace, params, max_tokens=8, max_new_tokens=7)


# commands


def generate(checkpoint: Path, *flags: str) -> int:
    return run("generate", checkpoint, "--prompt", "def", "--ignore-eos", *flags)


def test_two_lengths_are_refused(checkpoint: Path, capsys: pytest.CaptureFixture):
    assert generate(checkpoint, "--max-new-tokens", "3", "--max-tokens", "5") == 2
    assert "max_new_tokens and its alias max_tokens must be equal, got 3 and 5" in capsys.readouterr().err


def test_sampling_flags_warn_at_temperature_zero(
    checkpoint: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    load_once(monkeypatch, generator)
    warning = "--top-p, --seed have no effect at temperature 0, greedy decoding"

    assert generate(checkpoint, "--max-tokens", "1", "--seed", "1", "--top-p", "0.5") == 0
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [warning]
    caplog.clear()
    assert generate(checkpoint, "--max-tokens", "1", "--seed", "1", "--temperature", "1") == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_file_of_prompts_may_be_stdin(
    checkpoint: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    import io

    load_once(monkeypatch, generator)
    line = json.dumps({"token_ids": [5, 6], "max_new_tokens": 2, "ignore_eos": True})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line.encode())))

    assert run("generate", checkpoint, "--file", "-", "--max-tokens", "9") == 0  # the line takes precedence
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 2


def test_a_report_overwrites_nothing_but_a_report(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    native, notes, report = tmp_path / "native", tmp_path / "notes.json", tmp_path / "report.json"
    shutil.copytree(checkpoint, native)
    notes.write_text('{"my": "notes"}')
    before = snapshot(tmp_path)
    files = {
        native / "config.json": "must be outside the checkpoint",
        native / "new.json": "must be outside the checkpoint",
        notes: "exists and is no earlier report; nothing is overwritten",
        tmp_path / "absent" / "report.json": "absent is not a folder",
    }

    for file, message in files.items():
        assert run("verify", checkpoint, native, "--report", file) == 2
        assert message in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert [run("verify", native, "--report", report) for _ in range(2)] == [0, 0]
