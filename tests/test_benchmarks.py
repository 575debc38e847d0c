"""`tests.benchmarks`: statistics, FLOPs, tables, options, and the logits of the PyTorch twin."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.loading import load
from tests.benchmarks import __main__ as command
from tests.benchmarks import conversion, ours, plan, report
from tests.benchmarks.children import CONTENDERS
from tests.benchmarks.inputs import batch
from tests.benchmarks.timing import ratios, spread
from tests.helpers.hf_folder import random_params, tiny, write_hf

pytestmark = pytest.mark.heavy

LOGITS = 1e-4  # absolute, on logits of rms 1; correct fp32 implementations differ by about 1e-6


def test_a_spread_is_median_quartiles_and_range():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0, 1.0, 5.0)
    assert spread([7.0]) == (7.0,) * 5


def test_ratios_are_computed_per_turn():
    # The machine was half as fast in the second turn, which does not change the ratio.
    assert ratios([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]


def test_flops_of_bench_equal_a_hand_count():
    config = ModelConfig.preset("bench")
    attention = 4 * 2 * 512 * 512 + 2 * 2 * 512 * 513 // 2  # q, k, v, o; scores and their sum over 256.5 keys
    dense = 3 * 2 * 512 * 2736
    moe = 2 * 512 * 64 + (6 + 2) * 3 * 2 * 512 * 352  # router; six routed experts, two shared
    head = 2 * 512 * 8192

    assert plan.flops(config, 1, 512, head_tokens=1) == 512 * (8 * attention + dense + 7 * moe) + head
    assert plan.flops(config, 1, 512) == 512 * (8 * attention + dense + 7 * moe + head)
    assert plan.task_flops(config)["train"] == 3 * 4 * plan.flops(config, 1, 256)


def test_fewer_kv_heads_and_no_experts_reduce_the_flops():
    whole = ModelConfig.preset("bench")
    grouped = dataclasses.replace(whole, num_key_value_heads=4)

    assert plan.flops(whole, 1, 1) - plan.flops(grouped, 1, 1) == 8 * 2 * 2 * 512 * (512 - 128)
    assert (
        plan.flops(tiny(n_routed_experts=None), 1, 1)
        == 2 * (2 * 32 * 8 * (4 + 2) * 2 + 4 * 32 + 6 * 32 * 48) + 2 * 32 * 64
    )


@pytest.mark.parametrize(
    ("sense", "bar", "aim", "ratio", "expected"),
    [
        ("at least", 1.3, 2.5, 1.2, "MISSED"),
        ("at least", 1.3, 2.5, 1.3, "held"),
        ("at least", 1.3, 2.5, 2.6, "aim"),
        ("at most", 1.6, 1.15, 1.7, "MISSED"),
        ("at most", 1.6, 1.15, 1.5, "held"),
        ("at most", 1.6, 1.15, 1.1, "aim"),
        ("at most", 1.2, None, 1.1, "held"),
        ("at most", None, None, 9.0, ""),
    ],
)
def test_a_ratio_is_compared_with_its_bar_and_aim(sense: Any, bar, aim, ratio: float, expected: str):
    assert report.verdict(plan.Bar("train", "twin", "ours", sense, bar, aim), ratio) == expected


def test_every_bar_and_area_has_known_contenders():
    for area in plan.AREAS.values():
        assert set(area.contenders) <= set(CONTENDERS)
    for bar in plan.BARS:
        assert {bar.above, bar.below} <= {*plan.AREAS[bar.area].contenders, plan.FLOOR}


def results() -> dict[str, Any]:
    """Results of `measure` with simple figures."""
    area = {
        "tokens": 64,
        "rounds_taken": 3,
        "disturbance": [0.0, 0.04],
        "peak_bytes": {"ours": 2**30, "twin": 2**31},
        "limits": {"read": [40e9, 50e9], "copy": [30e9, 30e9], "matmul": [400e9, 400e9]},
        "floor_bytes": 12_000_000_000,
        "answers": {"ours": [[1, 2], [3, 4]], "twin": [[1, 2], [3, 5]]},
        "seconds": {"ours": [0.5, 0.25], "twin": [1.0, 1.0], "floor": [0.25, 0.2]},
    }
    return {
        "date": "2030-01-02",
        "minutes": 3.2,
        "command": "python -m tests.benchmarks",
        "environment": {"A": "1"},
        "commit": "abc",
        "hardware": {"cpu": "a fast one", "cores": "2"},
        "versions": {"jax": "0.10.1"},
        "checks": {"logits, training": 3e-6},
        "areas": {"decode b=1": area},
    }


def test_the_report_has_all_measurements():
    page = report.markdown(results())

    for line in (
        "# Benchmarks on CPU, 2030-01-02",
        "- hardware: cpu a fast one, cores 2",
        "| decode b=1 | twin / ours | 3 | 2.5 … 3.5 | 2 … 4 | 4 | ≥ 1.8 | ≥ 2.5 | aim |",
        "| decode b=1 | ours / floor | 1.62 | 1.44 … 1.81 | 1.25 … 2 | 1.25 | ≤ 1.6 | ≤ 1.15 | MISSED |",
        "| decode b=1 | ours | 171 | 375 | 312.5 … 437.5 | 250 … 500 | 2 | 1.00 |",
        "| decode b=1 | 45 (40 … 50) | 30 (30 … 30) | 400 (400 … 400) | 12 GB read | 2 of 3 | 4% |",
        "| logits, training | 3.0e-06 apart |",
        "| greedy tokens, decode b=1, twin | 3 of 4 equal |",
    ):
        assert line in page.splitlines()


def test_the_report_is_dated_json_and_markdown(tmp_path):
    data, page = report.write(results(), tmp_path / "new")

    assert (data.name, page.name) == ("2030-01-02-cpu.json", "2030-01-02-cpu.md")
    assert json.loads(data.read_text())["bars"][0]["ratio"]["median"] == 3.0


def test_verdicts_on_a_busy_machine_are_marked():
    restless = results()
    restless["areas"]["decode b=1"]["disturbance"] = [0.0, 0.5]

    assert "| aim, disturbed |" in report.markdown(restless)


def test_a_ratio_needs_both_contenders():
    alone = results()
    alone["areas"]["decode b=1"]["seconds"].pop("twin")

    assert "twin / ours" not in report.markdown(alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--only", "prefill,decode"], "--only must be one of prefill, decode1"),
        (["--contenders", ""], "--contenders must be one of ours, twin, transformers, got ''"),
        (["--out", __file__], "is not a directory"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_an_invalid_option_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys):
    try:
        code = command.main(arguments)
    except SystemExit as exited:  # by argparse
        code = exited.code

    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda package: None)

    assert command.main(["--contenders", "ours,twin"]) == 2
    assert capsys.readouterr().err == (
        "tests.benchmarks: twin needs torch: pip install -e '.[bench]', or leave it out (--contenders)\n"
    )


class Recorded:
    """A fake child with given turns: (figure, CPU share of other processes)."""

    def __init__(self, *turns: tuple[float, float]):
        self.turns = list(turns)

    def take_turn(self, action: str, *, warm_up: bool = False) -> tuple[float, float]:
        return self.turns.pop(0)


def test_rounds_repeat_until_enough_are_quiet():
    children: Any = {"ours": Recorded((1.0, 0.0), (9.0, 0.8), (2.0, 0.01), (3.0, 0.0))}

    rounds, taken = command.take_rounds(2, [("ours", "ours", "run")], children)

    assert [round.figures["ours"] for round in rounds] == [1.0, 2.0]
    assert taken == 3


def test_the_least_disturbed_rounds_are_selected():
    children: Any = {"ours": Recorded(*((float(i), share) for i, share in enumerate([0.9, 0.2, 0.5, 0.3])))}

    rounds, taken = command.take_rounds(2, [("ours", "ours", "run")], children)

    assert [round.figures["ours"] for round in rounds] == [1.0, 3.0]
    assert taken == 4


@pytest.mark.parametrize("task", ["prefill", "decode1", "train"])
def test_every_action_of_ours_runs_on_a_tiny_model(tmp_path, monkeypatch, task: str):
    for name, size in {"PREFILL_TOKENS": 8, "PROMPT": 4, "NEW_TOKENS": 2, "TRAIN_SHAPE": (2, 8)}.items():
        monkeypatch.setattr(plan, name, size)
    actions = ours.actions(task, write_hf(tmp_path, tiny(), random_params(tiny())))

    answers = {name: action() for name, action in actions.items()}

    assert answers["run"] > 0
    if task == "decode1":
        cache = 2 * 2 * 2 * 8 * (plan.PROMPT + plan.NEW_TOKENS) * 4  # layers, keys and values, heads, their width
        weights = sum(value.nbytes for name, value in random_params(tiny()).items() if ".experts." not in name)
        assert cache < answers["floor bytes"] < cache + weights + 2 * 8 * 3 * 32 * 16 * 4
        assert np.shape(answers["tokens"]) == (plan.NEW_TOKENS + 1, 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_topk_prob": True}, {"attention_bias": True, "n_shared_experts": None, "moe_layer_freq": 2}],
    ids=["plain", "norm_topk_prob", "biases, no shared experts"],
)
def test_the_pytorch_twins_logits_equal_ours(tmp_path, changes: dict[str, Any]):
    pytest.importorskip("torch", reason="the twin is PyTorch: pip install -e '.[bench]'")
    from tests.benchmarks.peer_torch import load_twin, twin_peer
    from tests.benchmarks.torch_tasks import decoded_logits, training_logits

    config = tiny(num_hidden_layers=3, **changes)
    folder = write_hf(tmp_path, config, random_params(config))
    twin = twin_peer(load_twin(folder))
    ids = batch(config, 3, 12)

    want = np.asarray(load(folder)(ids).logits)

    np.testing.assert_allclose(training_logits(twin, ids), want, rtol=0, atol=LOGITS)
    np.testing.assert_allclose(decoded_logits(twin, ids), want[:, 5:], rtol=0, atol=LOGITS)


def test_the_twin_rejects_a_checkpoint_without_a_tensor(tmp_path):
    pytest.importorskip("torch", reason="the twin is PyTorch: pip install -e '.[bench]'")
    from tests.benchmarks.peer_torch import load_twin

    folder = write_hf(tmp_path, tiny(), random_params(tiny()))
    (folder / "config.json").write_text(json.dumps(tiny(num_hidden_layers=3).to_dict()))

    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.2"):
        load_twin(folder)


def test_an_interrupted_benchmark_of_conversion_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(work: Path, rounds: int) -> None:
        (work / "shard").write_bytes(b"0")
        raise KeyboardInterrupt

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversion, "turns", interrupted)
    monkeypatch.setattr("sys.argv", ["conversion", "--work", "work", "--out", "reports"])

    with pytest.raises(KeyboardInterrupt):
        conversion.main()

    assert {path.name for path in tmp_path.rglob("*")} == {"work", "reports"}


@pytest.mark.parametrize("name", ["parity", "quantization"])
def test_reports_run_without_pytest(monkeypatch: pytest.MonkeyPatch, name: str):
    for module in (f"tests.{name}", "tests.helpers.golden", "tests.helpers.quantization"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "pytest", None)

    assert importlib.import_module(f"tests.{name}").main
