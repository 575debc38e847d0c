"""`tests.benchmarks.gpu`: FLOPs and bytes, time budgets, the report, the command. No GPU needed."""

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
from tests.benchmarks.gpu import bars, cases, experts, generation, parts, peers, report, tuning, work
from tests.benchmarks.gpu.sizes import FULL, SMALL, sizes

ROOT = Path(__file__).parents[1]
LAYERS, EXPERTS, WIDTH, HIDDEN = 28, 64, 2048, 1408  # the 16B's; its first layer is dense
RATES = {"copy": 2e12, "read": 1e12, "matmul": 4e14}


def results(**shown: Any) -> dict[str, Any]:
    """A run of three parts: one measured, one with a failed row, one not run."""
    ceilings = [
        {"key": "ceilings.copy", "name": "copy", "seconds": [1e-3, 2e-3, 3e-3], "bytes": 4e9},
        {"key": "ceilings.matmul", "name": "matmul", "seconds": [1e-3], "flops": 4e11},
    ]
    decode = [
        {"key": "decode.bf16.1", "name": "decode b=1", "seconds": [4e-3], "tokens": 1, "bytes": 4e9, "flops": 1e9},
        {"key": "decode.bf16.8", "name": "decode b=8", "error": "out of memory: 99 GB | asked for"},
    ]
    train = [{"key": "train.8.full", "name": "step", "seconds": [1.0], "tokens": 10, "flops": 2e14, "peak": int(3e10)}]
    rates = {"copy": 2e12, "matmul": 4e14}
    return {
        "date": "2030-01-02",
        "trial": False,
        "commands": ["python -m tests.benchmarks.gpu"],
        "commit": "abc",
        "sources": "def",
        "hardware": {"gpu": "a card"},
        "versions": {"jax": "9"},
        "minutes": 1.0,
        "device": {"platform": "gpu", "device": "a card", "memory": None, "data_sheet": 1e15},
        "parts": {
            "ceilings": {"rows": ceilings, "seconds": 1.0, "ceilings": rates},
            "decode": {"rows": decode, "seconds": 1.0, "ceilings": rates},
            "train": {"rows": train, "seconds": 1.0, "ceilings": rates},
            "block": {"rows": [], "not run": "3 s were left, it takes 20", "ceilings": rates},
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

    assert lines_with("| decode b=1 | 4", page) == [
        "| decode b=1 | 4 | 4 … 4 | 1 | 250 | 0.25 | 1000 | 50.0% (bytes) |  |",
    ]
    assert lines_with("| step |", page) == ["| step | 1000 | 1000 … 1000 | 1 | 10 | 200 | 50.0% (operations) | 30 |"]
    assert "| of measured matmul |" in page
    assert "trial" not in page.lower()


def test_a_failed_row_has_a_reason_in_the_table():
    (line,) = lines_with("decode b=8", report.markdown(results()))

    assert line == "| decode b=8 |  |  |  |  |  |  |  | out of memory: 99 GB / asked for |"


def test_a_part_not_run_is_named_without_a_table():
    page = report.markdown(results())

    assert "- block (one block of the 16B and its pieces): 3 s were left, it takes 20" in page
    assert "## block" not in page


def test_without_ceilings_there_is_no_share():
    page = report.markdown(results(parts={"decode": results()["parts"]["decode"] | {"ceilings": {}}}))

    assert "| of roofline |" not in page


def written(found: dict[str, Any], out: Path) -> list[Path]:
    place = report.place(found, out)
    return report.write(report.merged(found, place.earlier), place.stem)


def test_a_report_is_json_and_markdown_with_trials_marked(tmp_path: Path):
    files = written(results(), tmp_path) + written(results(trial=True), tmp_path)

    assert [path.name for path in files] == [
        f"2030-01-02-{kind}.{ending}" for kind in ("gpu", "gpu-trial") for ending in ("json", "md")
    ]
    assert json.loads(files[0].read_text())["bars"][1]["measured"] == 20
    assert "**A trial at small sizes" in files[3].read_text()


def second(**shown: Any) -> dict[str, Any]:
    """A later run of the block alone, with different ceilings; training was not reached."""
    block: dict[str, Any] = {"rows": [{"key": "block.sort", "name": "sort", "seconds": [1.0]}]}
    ceilings: dict[str, Any] = {"rows": [{"key": "ceilings.copy", "name": "copy", "seconds": [1.0], "bytes": 1e12}]}
    parts = {"ceilings": ceilings, "train": {"rows": [], "not run": "not reached"}, "block": block}
    for part in parts.values():
        part["ceilings"] = {"copy": 1e12}
    return results(commands=["the second"], parts=parts, **shown)


def test_a_second_run_keeps_parts_it_did_not_measure(tmp_path: Path):
    written(results(), tmp_path)

    data, page = written(second(), tmp_path)

    found = json.loads(data.read_text())
    assert len(list(tmp_path.iterdir())) == 2
    assert found["commands"] == ["python -m tests.benchmarks.gpu", "the second"]
    assert found["minutes"] == 2
    assert list(found["parts"]) == ["ceilings", "decode", "train", "block"]
    assert found["parts"]["train"] == results()["parts"]["train"]
    assert found["parts"]["block"]["ceilings"] == {"copy": 1e12}
    assert "| 50.0% (operations) |" in page.read_text()
    assert len(lines_with("Of another run, against its own ceilings: copy 2000 GB/s", page.read_text())) == 2


@pytest.mark.parametrize(
    "other", [{"commit": "another"}, {"sources": "other"}, {"versions": {}}, {"device": {"device": "another card"}}]
)
def test_a_different_run_gets_a_new_report(other: dict[str, Any], tmp_path: Path):
    first = written(results(), tmp_path)[0].read_text()

    data, _ = written(second(**other), tmp_path)
    again, _ = written(second(**other), tmp_path)

    assert data.name == again.name == "2030-01-02-gpu-2.json"
    assert (tmp_path / "2030-01-02-gpu.json").read_text() == first


def test_a_truncated_report_is_not_overwritten(tmp_path: Path):
    (tmp_path / "2030-01-02-gpu.json").write_text('{"parts": {')

    assert report.place(results(), tmp_path) == report.Place(tmp_path / "2030-01-02-gpu-2", None)


def row(key: str, seconds: float, **amounts: float) -> dict[str, Any]:
    return {"key": key, "name": key, "seconds": [seconds], **amounts}


def of_parts(**rows: list[dict[str, Any]]) -> dict[str, Any]:
    return results(parts={name: {"rows": found, "ceilings": RATES} for name, found in rows.items()})


def test_every_bar_finds_its_row():
    found = bars.measured(
        of_parts(
            experts=[row("experts.16384.balanced.default.both", 0.5, flops=2e14), row("experts.few.8.sorted", 1)],
            train=[row("train.8.full", 1, flops=2e14), row("train.8.dots", 0.5, flops=2e14)],
            decode=[row("decode.bf16.1", 2, bytes=2e12), row("decode.bf16.32", 0.01, tokens=32, bytes=2e12)],
            prefill=[row("prefill.bf16", 3)],
            transformers=[
                row("transformers.decode.grouped_mm.1", 8),
                row("transformers.decode.batched_mm.1", 5),
                row("transformers.decode.grouped_mm.32", 0.04),
                row("transformers.prefill.grouped_mm", 9),
            ],
        )
    )

    assert [(line["measured"], line["met"]) for line in found] == [
        (400, True), (40, True), (50, True), (3200, True), (2.5, True)
    ]  # fmt: skip
    assert found[1]["of"] == "train.8.dots; of 1e+03 TFLOP/s, by its data sheet"
    assert found[4]["of"] == "decode.bf16.1"


def test_a_bar_is_not_met_or_not_measured():
    page = report.markdown(of_parts(decode=[row("decode.bf16.32", 1, tokens=32, flops=1)]))

    assert "| decode b=32, tok/s | 32 | 3,000 | 8,000 | no | decode.bf16.32 |" in page
    assert "| decode b=1, % of roofline |  | 45 | 70 | not measured |  |" in page


def test_mfu_without_a_data_sheet_uses_the_measured_matmul():
    found = bars.mfu(of_parts(train=[row("train.5.full", 1, flops=2e14)]) | {"device": {"data_sheet": None}})

    assert found == (50, "train.5.full; of 400 TFLOP/s, the measured matmul")


def test_uncounted_experts_are_the_expected_number_hit(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: 99 GB")

    monkeypatch.setattr(generation, "_counted", fail)

    hits = generation.hit_experts(FULL, {})

    assert hits.by_rows[1] == pytest.approx([6.0] * (LAYERS - 1))
    assert hits.why_not == "out of memory: RESOURCE_EXHAUSTED: 99 GB"


def test_the_floor_is_the_larger_of_operations_and_bytes():
    assert work.total({"flops": 4e14, "bytes": 1e12}, RATES) == 1.0
    assert work.total({"flops": 4e14, "bytes": 4e12}, RATES) == 2.0
    assert work.total({"flops": 4e14}, {}) is None
    assert work.total({"flops": 0, "bytes": 2e12}, RATES) == 1.0


def test_flops_of_the_expert_mlp_equal_a_hand_count():
    rows = 16384 * 6

    assert work.expert_flops(rows, WIDTH, HIDDEN, 3) == 18 * rows * WIDTH * HIDDEN


def test_a_step_with_frozen_weights_is_two_thirds_of_the_work():
    whole, frozen = (work.train_flops(FULL.model, 2, 64, frozen=frozen) for frozen in (False, True))

    assert 3 * frozen == 2 * whole


def test_a_decode_step_attends_to_all_cached_keys():
    one, many = (work.decode_flops(FULL.model, 3, held) for held in (1, 11))

    assert many - one == 3 * 10 * LAYERS * 4 * WIDTH  # 16 heads of 128 are as wide as the states


def test_bytes_read_by_a_decode_step():
    config = FULL.model
    bytes_of = {"embed": 2 * config.vocab_size, "layers.1.experts.gate": 64 * 27 * 10, "head": 5}

    got = work.decode_bytes(config, bytes_of, 2, 3, [6.0] * (LAYERS - 1), 2)

    assert got == 6 * 27 * 10 + 2 * 2 + 5 + 2 * 3 * (2 * LAYERS * WIDTH * 2)


def test_expected_experts_hit_by_random_tokens():
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
    with pytest.raises(ValueError, match=r"must be one of ceilings.*, got 'speed'"):
        parts.chosen(["speed"])


def test_parts_that_no_longer_fit_are_skipped():
    names = list(parts.PARTS)
    wants = sum(part.wants for part in parts.PARTS.values())

    assert parts.allotment("decode", 500, names, 600) == parts.PARTS["decode"].wants
    assert parts.allotment("decode", 100, names, 600) == 100
    assert parts.allotment("decode", parts.PARTS["decode"].least - 1, names, 600) is None
    assert parts.allotment("decode", 2 * wants, names, 2 * wants) == 2 * parts.PARTS["decode"].wants


def test_a_parts_environment_keeps_existing_values():
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


def test_after_a_failed_case_the_next_one_runs():
    def fail() -> dict[str, Any]:
        raise RuntimeError("RESOURCE_EXHAUSTED: 99 GB\n  asked for")

    def absent() -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    def found():
        yield cases.Case("a", "a", fail)
        yield cases.Case("b", "b", absent)
        yield cases.Case("c", "c", lambda: {"seconds": [1.0]})
        raise OSError("gone")

    rows_out: list[dict[str, Any]] = []
    cases.serve(found, time.monotonic() + 60, rows_out.append)

    assert rows_out == [
        {"key": "a", "name": "a", "error": "out of memory: RESOURCE_EXHAUSTED: 99 GB asked for"},
        {"key": "b", "name": "b", "error": "torch is not installed"},
        {"key": "c", "name": "c", "seconds": [1.0]},
        {"key": "", "name": "all further cases", "error": "OSError: gone"},
    ]


def test_a_case_past_the_deadline_is_reported_as_not_run():
    rows_out: list[dict[str, Any]] = []
    cases.serve(lambda: [cases.Case("a", "a", dict)], time.monotonic(), rows_out.append)

    assert rows_out == [{"key": "a", "name": "a", "error": "not run: no time left"}]


@pytest.mark.parametrize(
    ("code", "limit", "error"),
    [
        ("import sys; sys.exit('no luck')", 60, "exit code 1 of the process: no luck"),
        ("import time; time.sleep(60)", 1, "not run: the part was ended after 1 s"),
    ],
    ids=["fails", "hangs"],
)
def test_a_failed_process_keeps_its_rows_and_a_reason(code: str, limit: float, error: str):
    script = f'print(\'{{"name": "a"}}\', flush=True); {code}'

    rows = list(command.lines_of([sys.executable, "-c", script], os.environ, limit))

    assert rows == [{"name": "a"}, {"key": "", "name": "all further cases", "error": error}]


def test_the_report_is_written_after_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pages: list[str] = []

    def run_part(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        pages.extend(path.read_text() for path in tmp_path.glob("*.md"))
        return {"rows": [{"key": "k", "name": f"row of {name}", "seconds": [1.0], "bytes": 1, "flops": 1}]}

    monkeypatch.setattr(command, "run_part", run_part)
    monkeypatch.setattr(command, "driver", dict)
    clock = iter([0.0, 0.0, 1.0, 1.0, 1.0, 590.0, 590.0])
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=clock.__next__))
    args = command.options(["--minutes", "10", "--only", "decode,block", "--out", str(tmp_path)])
    args.only = ["decode", "experts", "block"]

    found = command.measure(args, lambda line: None)

    assert "row of decode" in pages[0]
    assert "- experts (the routed experts, 16K tokens, by backend and leg): not reached" in pages[0]
    assert found["parts"]["block"]["not run"] == "10 s were left, it takes 20"
    assert found["parts"]["experts"]["rows"][0]["name"] == "row of experts"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--only", "decode,speed"], "--only must be one of ceilings, decode"),
        (["--out", __file__], "is not a directory"),
        ([], "jax failed to start: no output"),
    ],
)
def test_a_user_error_is_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "_PROBE", "raise SystemExit(1)")

    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository root with one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_without_a_gpu_the_command_runs_a_trial(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    ran: list[bool] = []
    monkeypatch.setattr(command, "default_backend", lambda: "cpu")
    monkeypatch.setattr(command, "measure", lambda args, log: ran.append(args.small))

    assert command.main([]) == 0
    assert ran == [True]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No GPU found (default backend 'cpu'): running a trial")


def test_no_unneeded_module_is_imported():
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


def test_small_sizes_cover_every_batch_and_shape():
    assert sizes(small=True) is SMALL
    assert sizes(small=False) is FULL
    assert FULL.model == ModelConfig.preset("deepseek_moe_16b")
    assert sorted(FULL.batches) == [1, 8, 32, 128]
    assert FULL.trained.num_hidden_layers == FULL.train_layers < LAYERS


def test_a_compiled_programs_matmuls_are_counted():
    assert experts.describe("a = dot(b)\nc = ragged-dot(d)\ne = dot(f)") == "compiled to 1 ragged-dot, 2 dots"
    assert experts.describe("") == "compiled to nothing that looks like a matmul"


def test_the_tuned_table_has_the_fastest_candidates():
    rows = [
        {"key": "legs/bfloat16/many/fwd/batched", "seconds": [2.0, 2.0, 9.0]},
        {"key": "legs/bfloat16/many/fwd/grouped", "seconds": [1.0]},
        {"key": "legs/bfloat16/many/dgrad/grouped", "error": "no kernel"},
        {"key": "tiles/gmm/64,128,128,4,3", "seconds": [1.0]},
        {"key": "tiles/tgmm/64,128,128,4,3", "seconds": [1.0]},
        {"key": "tiles/tgmm/128,64,128,4,4", "error": "not run: no time left"},
    ]

    assert tuning.table("a card", rows) == {
        "legs": {"a card": {"bfloat16": {"many": {"fwd": "grouped"}}}},
        "tiles": {"a card": {"gmm": [64, 128, 128, 4, 3]}},
    }


def test_tuning_merges_into_an_existing_file():
    known = {
        "note": "a",
        "legs": {"another": {}, "a card": {"float32": {"few": {"fwd": "batched", "dgrad": "batched"}}}},
    }

    assert tuning.over(known, {"legs": {"a card": {"float32": {"few": {"fwd": "ragged"}}}}, "tiles": {}}) == {
        "note": "a",
        "legs": {"another": {}, "a card": {"float32": {"few": {"fwd": "ragged", "dgrad": "batched"}}}},
        "tiles": {},
    }


def test_a_trial_writes_no_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        tuning.main(["--small", "--into", str(tmp_path / "tuned.json")])

    assert "--into takes what a GPU does at full size, no trial" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_peer_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    rows_out: list[dict[str, Any]] = []

    cases.serve(lambda: peers.transformers(SMALL), time.monotonic() + 60, rows_out.append)

    assert rows_out == [{"key": "", "name": "all further cases", "error": "torch is not installed"}]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_measures_every_part(tmp_path: Path):
    done = python("-m", "tests.benchmarks.gpu", "--small", "--out", str(tmp_path))

    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("*-gpu-trial.json")
    found = json.loads(data.read_text())
    assert set(found["parts"]["block"]["ceilings"]) == {"copy", "read", "matmul"}
    failed = []
    for name, part in found["parts"].items():
        assert part["rows"], f"{name}: {part.get('not run')}"
        # A library that is not installed is not a failure.
        failed += [row for row in part["rows"] if "is not installed" not in row.get("error", "is not installed")]
    assert failed == []
