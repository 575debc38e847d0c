"""The parts of `tests.benchmarks.gpu`: counted work, the sharing of time, the report, the command. No GPU is needed."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from tests.benchmarks.gpu import __main__ as command
from tests.benchmarks.gpu import cases, experts, parts, report, work
from tests.benchmarks.gpu.sizes import FULL, SMALL, sizes

ROOT = Path(__file__).parents[1]
LAYERS, EXPERTS, WIDTH, HIDDEN = 28, 64, 2048, 1408  # the 16B's; its first layer is dense
RATES = {"copy": 2e12, "read": 1e12, "matmul": 4e14}


def results(**shown: Any) -> dict[str, Any]:
    """A run of three parts: one measured, one with a row that failed, one not run."""
    ceilings = [
        {"key": "ceilings.copy", "name": "copy", "seconds": [1e-3, 2e-3, 3e-3], "bytes": 4e9},
        {"key": "ceilings.matmul", "name": "matmul", "seconds": [1e-3], "flops": 4e11},
    ]
    decode = [
        {"key": "decode.bf16.1", "name": "decode b=1", "seconds": [4e-3], "tokens": 1, "bytes": 4e9, "flops": 1e9},
        {"key": "decode.bf16.8", "name": "decode b=8", "error": "out of memory: 99 GB | asked for"},
    ]
    train = [{"key": "train.8", "name": "step", "seconds": [1.0], "tokens": 10, "flops": 2e14, "peak": int(3e10)}]
    return {
        "date": "2030-01-02",
        "trial": False,
        "command": "python -m tests.benchmarks.gpu",
        "commit": "abc",
        "hardware": {"gpu": "a card"},
        "versions": {"jax": "9"},
        "minutes": 1.0,
        "device": {"platform": "gpu", "memory": None},
        "parts": {
            "ceilings": {"rows": ceilings, "seconds": 1.0},
            "decode": {"rows": decode, "seconds": 1.0},
            "train": {"rows": train, "seconds": 1.0},
            "block": {"rows": [], "not run": "3 s were left, it takes 20"},
        },
        **shown,
    }


def lines_with(text: str, page: str) -> list[str]:
    return [line for line in page.splitlines() if text in line]


def test_rates_are_medians_of_the_ceilings():
    assert report.ceilings(results()) == {"copy": 4e9 / 2e-3, "matmul": 4e11 / 1e-3}
    assert report.ceilings({"parts": {}}) == {}


def test_the_report_shows_rates_and_shares_of_the_floor():
    page = report.markdown(results())

    assert lines_with("decode b=1 ", page) == [
        "| decode b=1 | 4 | 4 … 4 | 1 | 250 | 0.25 | 1000 | 50.0% (bytes) |  |",
    ]
    assert lines_with("| step |", page) == ["| step | 1000 | 1000 … 1000 | 1 | 10 | 200 | 50.0% (operations) | 30 |"]
    assert "| MFU |" in page
    assert "trial" not in page.lower()


def test_a_row_that_failed_says_why_and_cannot_break_the_table():
    (line,) = lines_with("decode b=8", report.markdown(results()))

    assert line == "| decode b=8 |  |  |  |  |  |  |  | out of memory: 99 GB / asked for |"


def test_a_part_not_run_is_named_and_has_no_table():
    page = report.markdown(results())

    assert "- block (one block of the 16B and its pieces): 3 s were left, it takes 20" in page
    assert "## block" not in page


def test_without_ceilings_there_is_no_share():
    page = report.markdown(results(parts={"decode": results()["parts"]["decode"]}))

    assert "roofline |" not in page


def test_a_report_is_json_and_markdown_and_a_trial_is_marked(tmp_path: Path):
    written = report.write(results(), tmp_path) + report.write(results(trial=True), tmp_path)

    assert [path.name for path in written] == [
        f"2030-01-02-{kind}.{ending}" for kind in ("gpu", "gpu-trial") for ending in ("json", "md")
    ]
    assert json.loads(written[0].read_text())["ceilings"]["matmul"] == 4e14
    assert "**A trial at small sizes" in written[3].read_text()


def test_the_floor_is_the_larger_of_operations_and_bytes():
    assert work.total({"flops": 4e14, "bytes": 1e12}, RATES) == 1.0
    assert work.total({"flops": 4e14, "bytes": 4e12}, RATES) == 2.0
    assert work.total({"flops": 4e14}, {}) is None
    assert work.total({"flops": 0, "bytes": 2e12}, RATES) == 1.0


def test_work_of_the_expert_mlp_is_what_a_hand_counts():
    rows = 16384 * 6

    assert work.expert_flops(rows, WIDTH, HIDDEN, 3) == 18 * rows * WIDTH * HIDDEN


def test_a_step_with_frozen_weights_is_two_thirds_of_the_work():
    whole, frozen = (work.train_flops(FULL.model, 2, 64, frozen=frozen) for frozen in (False, True))

    assert 3 * frozen == 2 * whole


def test_a_decode_step_attends_to_all_keys_that_are_held():
    one, many = (work.decode_flops(FULL.model, 3, held) for held in (1, 11))

    assert many - one == 3 * 10 * LAYERS * 4 * WIDTH  # 16 heads of 128 are as wide as the states


def test_a_decode_step_reads_the_experts_hit_a_row_of_the_embedding_and_the_cache():
    config = FULL.model
    bytes_of = {"embed": 2 * config.vocab_size, "layers.1.experts.gate": 64 * 27 * 10, "head": 5}

    got = work.decode_bytes(config, bytes_of, 2, 3, [6.0] * (LAYERS - 1), 2)

    assert got == 6 * 27 * 10 + 2 * 2 + 5 + 2 * 3 * (2 * LAYERS * WIDTH * 2)


def test_random_tokens_hit_few_experts_alone_and_nearly_all_together():
    assert work.hit_by_chance(FULL.model, 1) == pytest.approx(6)
    assert 63 < work.hit_by_chance(FULL.model, 128) < EXPERTS


@pytest.mark.parametrize("skewed", [False, True], ids=["balanced", "skewed"])
def test_group_sizes_sum_to_the_rows(skewed: bool):
    found = work.group_sizes(100, 64, 6, skewed=skewed)

    assert found.sum() == 600
    assert found.dtype == np.int32
    assert found.max() <= (100 if not skewed else 600)


def test_priority_is_ceilings_decode_experts_training_block():
    assert list(parts.PARTS)[:5] == ["ceilings", "decode", "experts", "train", "block"]
    assert parts.chosen(None) == list(parts.PARTS)
    assert parts.chosen(["block", "decode"]) == ["ceilings", "decode", "block"]
    with pytest.raises(ValueError, match="'speed' does not exist, only ceilings"):
        parts.chosen(["speed"])


def test_earlier_parts_get_what_they_want_and_what_no_longer_fits_is_left_out():
    names = list(parts.PARTS)
    wants = sum(part.wants for part in parts.PARTS.values())

    assert parts.allotment("decode", 500, names, 600) == parts.PARTS["decode"].wants
    assert parts.allotment("decode", 100, names, 600) == 100
    assert parts.allotment("decode", parts.PARTS["decode"].least - 1, names, 600) is None
    assert parts.allotment("decode", 2 * wants, names, 2 * wants) == 2 * parts.PARTS["decode"].wants


def test_a_parts_environment_keeps_what_is_given():
    given = {"XLA_FLAGS": "--a", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}

    own = parts.environment("ragged_fused", given, small=False)

    assert own["XLA_FLAGS"] == "--a --xla_gpu_experimental_use_ragged_dot_fusion=true"
    assert own["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert "JAX_PLATFORMS" not in own
    assert parts.environment("decode", {}, small=True)["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", parts.PARTS)
def test_every_part_names_a_function_that_exists(name: str):
    module, function = parts.PARTS[name].cases.split(".")

    assert f"\ndef {function}(sizes: Sizes)" in (Path(command.__file__).parent / f"{module}.py").read_text()


def test_a_case_that_fails_is_a_row_and_the_next_one_runs():
    def fail() -> dict[str, Any]:
        raise RuntimeError("RESOURCE_EXHAUSTED: 99 GB\n  asked for")

    def absent() -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    def found():
        yield cases.Case("a", "a", fail)
        yield cases.Case("b", "b", absent)
        yield cases.Case("c", "c", lambda: {"seconds": [1.0]})
        raise OSError("gone")

    told: list[dict[str, Any]] = []
    cases.serve(found, time.monotonic() + 60, told.append)

    assert told == [
        {"key": "a", "name": "a", "error": "out of memory: RESOURCE_EXHAUSTED: 99 GB asked for"},
        {"key": "b", "name": "b", "error": "torch is not installed"},
        {"key": "c", "name": "c", "seconds": [1.0]},
        {"key": "", "name": "all further cases", "error": "OSError: gone"},
    ]


def test_a_case_that_would_begin_too_late_is_told_as_not_run():
    told: list[dict[str, Any]] = []
    cases.serve(lambda: [cases.Case("a", "a", dict)], time.monotonic(), told.append)

    assert told == [{"key": "a", "name": "a", "error": "not run: no time left"}]


@pytest.mark.parametrize(
    ("code", "limit", "error"),
    [
        ("import sys; sys.exit('no luck')", 60, "exit code 1 of the process: no luck"),
        ("import time; time.sleep(60)", 1, "not run: the part was ended after 1 s"),
    ],
    ids=["fails", "hangs"],
)
def test_a_process_that_ends_badly_leaves_its_rows_and_a_reason(code: str, limit: float, error: str):
    script = f'print(\'{{"name": "a"}}\', flush=True); {code}'

    rows = list(command.lines_of([sys.executable, "-c", script], os.environ, limit))

    assert rows == [{"name": "a"}, {"key": "", "name": "all further cases", "error": error}]


def test_the_report_is_written_after_every_part_and_names_those_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pages: list[str] = []

    def run_part(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        pages.extend(path.read_text() for path in tmp_path.glob("*.md"))
        return {"rows": [{"key": "k", "name": f"row of {name}", "seconds": [1.0], "bytes": 1, "flops": 1}]}

    monkeypatch.setattr(command, "run_part", run_part)
    monkeypatch.setattr(command, "driver", dict)
    clock = iter([0.0, 0.0, 1.0, 1.0, 1.0, 590.0, 590.0])
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=clock.__next__))
    asked = command.options(["--minutes", "10", "--only", "decode,block", "--out", str(tmp_path)])
    asked.only = ["decode", "experts", "block"]

    found = command.measure(asked, lambda line: None)

    assert "row of decode" in pages[0]
    assert "- experts (the routed experts, 16K tokens, by backend and leg): not reached" in pages[0]
    assert found["parts"]["block"]["not run"] == "10 s were left, it takes 20"
    assert found["parts"]["experts"]["rows"][0]["name"] == "row of experts"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "0"], "--minutes must be more than 0, not 0"),
        (["--only", "decode,speed"], "--only 'speed' does not exist, only ceilings, decode"),
        (["--out", __file__], "is not a directory"),
        ([], "jax finds no GPU here (cpu); --small tries the parts out, at small sizes on the CPU"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "default_backend", lambda: "cpu")

    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In the repository's root, one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_where_no_gpu_is_the_command_exits_2_with_one_line():
    done = python("-m", "tests.benchmarks.gpu")

    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_nothing_that_is_not_needed_is_imported():
    absent = ("grain", "tyro", "qwix", "tokamax")
    modules = [path.stem for path in Path(command.__file__).parent.glob("*.py") if path.stem != "__init__"]
    script = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({absent}))
for module in {modules}:
    importlib.import_module("tests.benchmarks.gpu." + module)
"""

    done = python("-c", script)

    assert done.returncode == 0, done.stderr


def test_small_sizes_have_every_batch_and_shape_in_small():
    assert sizes(small=True) is SMALL
    assert sizes(small=False) is FULL
    assert FULL.model == ModelConfig.preset("deepseek_moe_16b")
    assert sorted(FULL.batches) == [1, 8, 32, 128]
    assert FULL.trained.num_hidden_layers == FULL.train_layers < LAYERS


def test_a_compiled_programs_matmuls_are_counted():
    assert experts.describe("a = dot(b)\nc = ragged-dot(d)\ne = dot(f)") == "compiled to 1 ragged-dot, 2 dots"
    assert experts.describe("") == "compiled to nothing that looks like a matmul"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_measures_every_part(tmp_path: Path):
    done = python("-m", "tests.benchmarks.gpu", "--small", "--out", str(tmp_path))

    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("*-gpu-trial.json")
    found = json.loads(data.read_text())
    assert set(found["ceilings"]) == {"copy", "read", "matmul"}
    failed = []
    for name, part in found["parts"].items():
        assert part["rows"], f"{name}: {part.get('not run')}"
        # A library that is not installed is said so, which is no failure.
        failed += [row for row in part["rows"] if "is not installed" not in row.get("error", "is not installed")]
    assert failed == []
