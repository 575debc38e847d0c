"""The command `dsmoe plan`: texts, mistakes, exit codes, and what it says if nothing fits."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsmoe_jax.cli.flags import AXES
from dsmoe_jax.cli.plan import make_parser
from dsmoe_jax.plan import compiled
from dsmoe_jax.plan.compiled import Compiled
from dsmoe_jax.plan.memory import PEAKS
from dsmoe_jax.plan.search import flags
from dsmoe_jax.plan.workload import optimizer_of
from dsmoe_jax.sharding import AXIS_NAMES
from dsmoe_jax.train.finetune import FinetuneConfig
from tests.helpers.command import run
from tests.helpers.hf_folder import tiny

pytestmark = pytest.mark.heavy


def text_of(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    """What `dsmoe plan` prints."""
    assert run("plan", *arguments) == code
    return capsys.readouterr().out


# --- search ---


def test_flags_of_a_search_are_the_plan(capsys: pytest.CaptureFixture[str]):
    command = ["plan", "pretrain", "deepseek_moe_2b", "--devices", 8, "--device", "a100_80gb"]
    assert run(*command, "--search") == 0
    first = capsys.readouterr().out.rpartition("flags of the first: ")[2].split()

    assert run(*command, *first) == 0

    assert capsys.readouterr().out.startswith("8 × a100_80gb: ")


LACKING = {
    "all parameters": "finetune tiny --device-memory 0.07",
    "pretraining": "pretrain tiny --device-memory 0.07",
    "far too much": "pretrain tiny --device cpu --device-memory 0.0001",
}


@pytest.mark.parametrize("name", LACKING)
def test_what_makes_room_does_so_when_it_is_planned(name: str, capsys: pytest.CaptureFixture[str]):
    command = LACKING[name].split()

    text = text_of(capsys, *command, "--search", code=1)

    assert text.startswith("nothing fits\nthe smallest candidate, --mesh.data 1 ")
    ways = re.findall(r"^with (.+): .+ less, (.+)$", text, re.MULTILINE)
    assert ways
    for changed, verdict in ways:
        code = int(verdict != "which fits")
        assert text_of(capsys, *command, "--search", *changed.split(), code=code).startswith("nothing fits") == bool(
            code
        )


def test_a_quantization_that_costs_memory_is_taken_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(PEAKS["gpu"]["experts"], "quantized", {"experts": 0.5})
    command = ["finetune", "deepseek_moe_16b", "--device", "a100_40gb", "--search", "--recipe"]

    text = text_of(capsys, *command, "qlora_1x80gb", code=1)
    assert "with --quantize None: 6.22 GB less, which fits\n" in text
    assert "--optimizer.moments" not in text

    text = text_of(capsys, *command, "lora_1x80gb", "--device-memory", 41, code=1)
    assert "--quantize" not in text
    assert "with --optimizer.moments factored: 602 MB less, which fits\n" in text


def test_a_search_tries_micro_batches_of_a_default_batch(capsys: pytest.CaptureFixture[str]):
    text = text_of(capsys, "finetune", "tiny", "--search")

    assert {"64 × 1", "1 × 64"} & set(re.findall(r"\d+ × \d+", text))
    assert "4 × 16" in text


@pytest.mark.parametrize(("devices", "batch"), [(7, 7), (100, 50)])
def test_a_search_suggests_a_batch_that_divides(devices: int, batch: int, capsys: pytest.CaptureFixture[str]):
    assert run("plan", "pretrain", "tiny", "--search", "--devices", devices) == 2
    assert f"one does with --data.batch-size {batch}\n" in capsys.readouterr().err

    assert run("plan", "pretrain", "tiny", "--search", "--devices", devices, "--data.batch-size", batch) == 0


def test_a_search_names_the_flags_that_it_replaces(capsys: pytest.CaptureFixture[str]):
    text = text_of(capsys, "pretrain", "tiny", "--search", "--mesh", "data=1", "--step.remat=dots", "--steps", 5)

    assert text.startswith("the search replaces --mesh.data, --step.remat\nfitting candidates: ")
    assert "instead of those of --mesh, --step." in " ".join(make_parser("pretrain").format_help().split())


# --- the command ---


def test_the_plan_of_a_recipe_is_printed(capsys: pytest.CaptureFixture[str]):
    assert run("plan", "pretrain", "deepseek_moe_16b", "--devices", 64, "--mesh.fsdp", 8, "--mesh.expert", 8) == 0

    text = capsys.readouterr().out
    assert text.startswith("64 × h100: data=1, fsdp=8, expert=8, tensor=1\nfits, ")
    for part in ("optimizer state", "all-gather over expert", "GFLOP per token", "estimate: ", "not measured on a GPU"):
        assert part in text


def test_the_plan_of_fine_tuning_needs_no_weights(capsys: pytest.CaptureFixture[str]):
    assert run("plan", "finetune", "deepseek_moe_16b", "--recipe", "qlora_1x80gb") == 0

    assert "frozen weights" in capsys.readouterr().out


def test_the_plan_of_generation_has_a_cache(capsys: pytest.CaptureFixture[str]):
    assert run("plan", "generate", "deepseek_moe_16b", "--devices", 2, "--max-batch-size", 8) == 0

    text = capsys.readouterr().out
    assert "cache" in text
    assert "decode" in text


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans whose programs are lowered instead of compiled."""
    plans: list[Any] = []
    jax.devices()  # before the command asks for as many as its plan has

    def lower_only(plan: Any, card: str) -> Compiled:
        mesh = compiled.mesh_of_card(card, plan.work.mesh)
        compiled.lower_step(plan.work.config, plan.work.model, mesh, (plan.work.sequences, plan.work.length))
        plans.append(plan)
        return Compiled(0, 0, 0, [], "")

    monkeypatch.setattr(compiled, "compile_plan", lower_only)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the command changes it
    return plans


@pytest.mark.parametrize("others", ["", "--lora.r 2 --quantize int8 --devices 2"], ids=["all weights", "qlora"])
def test_fine_tuning_is_compiled_without_a_learning_rate(
    others: str, lowered: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    command = "--device cpu --compile --data.sequence-length 16 --data.batch-size 2"

    assert "the step, compiled in" in text_of(capsys, "finetune", tmp_path, *command.split(), *others.split())

    assert len(lowered) == 1
    assert float(np.asarray(optimizer_of(FinetuneConfig())[1](50))) > 0


def test_a_search_compiles_what_it_finds(lowered: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    command = ["pretrain", "tiny", "--model", tmp_path / "config.json", "--device", "cpu", "--search", "--compile"]

    text = text_of(capsys, *command, "--data.sequence-length", 16)

    assert f"flags of the first: {flags(lowered[0])}\n\nthe step, compiled in" in text
    assert text_of(capsys, *command, "--device-memory", 1e-6, code=1).startswith("nothing fits")
    assert len(lowered) == 1


@pytest.mark.parametrize("kind", ["pretrain", "generate"])
def test_a_card_without_a_compiler_is_refused_first(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    assert run("plan", kind, "tiny", "--device", "b200", "--compile") == 2

    output = capsys.readouterr()
    assert output.out == ""
    assert "device to compile for must be one of a100_40gb, a100_80gb, h100, h200, got 'b200'" in output.err


def test_the_exit_code_says_whether_a_run_fits(capsys: pytest.CaptureFixture[str]):
    for kind in ("pretrain", "generate"):
        assert text_of(capsys, kind, "tiny", "--device", "L40S").splitlines()[1].startswith("fits, ")
        text = text_of(capsys, kind, "tiny", "--device-memory", 0.05, code=1)
        assert text.splitlines()[1].startswith("does not fit, ")


def test_settings_are_checked_against_the_model(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]):
    text = text_of(capsys, "pretrain", "tiny", "--data.sequence-length", 99_999_999, code=1)

    assert "data.sequence_length 99999999 exceeds the model's max_position_embeddings 256" in caplog.text
    assert "8.16 EB of 78.1 GB per device" in text
    assert re.search(r"attention scores \(temporary\) +8.16 EB\n", text)
    assert "369 EFLOP per step" in text


def test_a_recipe_is_planned_within_the_context_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))

    assert "× 64 tokens per step" in text_of(capsys, "finetune", tmp_path, "--recipe", "lora_1x80gb")


def test_numbers_and_nouns_agree(capsys: pytest.CaptureFixture[str]):
    text = text_of(capsys, "pretrain", "tiny", "--step.gradient-accumulation-steps", 4)

    assert "4 micro-batches of 2 sequences per device; 13.9 MFLOP per token, 28.4 GFLOP per step" in text
    assert "\n1 output of 4,096 tokens at once" in text_of(capsys, "generate", "tiny", "--max-batch-size", 1)
    text = text_of(capsys, "pretrain", "tiny", "--data.batch-size", 1, "--data.sequence-length", 1)
    assert "\n1 sequence × 1 token per step, 1 micro-batch of 1 sequence per device" in text


MISTAKES = {
    "plan pretrain tiny --device h10": "got 'h10': did you mean h100?",
    "plan pretrain tiny --device a100": "did you mean a100_80gb?",
    "plan pretrain tiny --device-memory inf": "device figures must be positive and finite, got inf for memory",
    "plan pretrain tiny --device-bandwidth nan": "device figures must be positive and finite, got nan for bandwidth",
    "plan pretrain tiny --link-bandwidth 0": "device figures must be positive and finite, got 0 for link",
    "plan pretrain tiny --mesh fsdp": "--mesh must be AXIS=N,…, got 'fsdp'",
    "plan pretrain tiny --mesh fsd=2": "dsmoe plan: --mesh axis must be one of data, fsdp, expert, tensor, got 'fsd'",
    "plan pretrain tiny --mesh fsdp=2=3": "--mesh.fsdp must be an integer, got '2=3'",
    "plan generate bench --max-batch-size 0": "dsmoe plan: --max-batch-size must be at least 1, got 0",
    "plan generate bench --context-length 1": "dsmoe plan: --context-length must be at least 2, got 1",
    "plan generate bench --search": "--search is for pretrain and finetune",
    "plan generate bench another": "unexpected argument 'another'",
    "plan generate bench --revision x": "bench is a preset, which has no weights",
    "plan generate bench --devices 2 --mesh.expert 1 --mesh.tensor 2 --quantize nf4": "cannot be sharded over tensor=2",
    "plan train tiny": "run must be one of pretrain, finetune, generate, got 'train'",
    "plan pretrain tiny --devices 0": "--devices must be at least 1, got 0",
    "plan pretrain tiny --devices many": "argument --devices: invalid int value: 'many'",
    "plan pretrain tiny --device-tflops -1": "device figures must be positive and finite, got -1 for flops",
    "plan pretrain tiny --devices 6 --mesh.fsdp 4": "mesh (data=1, fsdp=4, expert=1, tensor=1) needs 4 devices",
    "plan pretrain tiny --devices 5 --data.batch-size 5": (
        "embed: embed of size 192 does not divide over fsdp=5; --search tries all meshes and micro-batches"
    ),
    "plan generate tiny --devices 7": "do not divide over expert=7; they do with --mesh data=7,expert=1",
    "plan generate tiny --devices 24 --mesh.data 2": "over expert=12; they do with --mesh data=6,expert=4",
    "plan finetune tiny --quantize int3": "--quantize must be one of int4, int8, nf4, got 'int3'",
    "plan pretrain tiny --step.device-balance-groups 3": "device_balance_groups must divide 16 experts, got 3",
    "plan pretrain tiny --devices 3": "data.batch_size must be a multiple of 3",
    "plan pretrain tiny --mesh.tensor 4 --devices 4": "attention heads do not divide over tensor=4",
    "plan pretrain tiny --devises 4": "unknown flag --devises: did you mean --devices?",
    "plan generate tiny --device-memry 4": "unknown flag --device-memry: did you mean --device-memory?",
    "plan generate deepseek_moe_15b": "no such file or folder",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line(typed: str, capsys: pytest.CaptureFixture[str]):
    assert run(*typed.split()) == 2

    error = capsys.readouterr().err
    assert MISTAKES[typed] in error
    assert error.count("\n") == 1


def test_a_mesh_is_spelled_in_two_ways(capsys: pytest.CaptureFixture[str]):
    texts = []
    for mesh in (["--mesh", "fsdp=2,expert=4"], ["--mesh=fsdp=2", "--mesh.expert", 4]):
        for verb in ("pretrain", "generate"):
            assert run("plan", verb, "tiny", "--devices", 8, *mesh) == 0
            texts.append(capsys.readouterr().out)

    assert texts[:2] == texts[2:]
    assert all(text.startswith("8 × h100: data=1, fsdp=2, expert=4, tensor=1\n") for text in texts)
    assert AXES == AXIS_NAMES
