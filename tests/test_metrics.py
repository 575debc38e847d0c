"""Metrics compared with slow sums, and trackers."""

import io
import json
import logging
import math
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.info import count_parameters
from dsmoe_jax.train.metrics import Recorder, flops_per_token, peak_flops, read_records
from dsmoe_jax.train.step import Metrics
from tests.benchmarks.plan import flops

CONFIG = ModelConfig.preset("tiny")
LAYERS, E = (1, 2, 3), 16  # the MoE layers of `tiny`, and the experts of each


def metrics(seed: int = 0, **changes: Any) -> Metrics:
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 99, (3, E)).astype(np.float32)
    aux, scalar = rng.random((3, 3), np.float32), rng.random(5, np.float32)
    fields: Any = dict(
        loss=scalar[0],
        cross_entropy=scalar[1],
        balance_loss=aux[0],
        device_balance_loss=aux[1],
        z_loss=scalar[2],
        grad_norm=scalar[3],
        learning_rate=scalar[4],
        skipped=np.bool_(False),
        total_skips=np.int32(4),
        consecutive_skips=np.int32(0),
        expert_load=load,
        entropy=aux[2],
        overflow_passes=np.zeros(3, np.float32),
    )
    return Metrics(**fields | changes)


def device(kind: str, peak: int | None = None) -> SimpleNamespace:
    stats = None if peak is None else {"peak_bytes_in_use": peak}
    return SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)


def recorder(folder: Path, trackers: tuple[str, ...] = ("jsonl",), **options: Any) -> Recorder:
    options = {"tokens_per_step": 2048, "sequence_length": 256, "steps": 100, "devices": [device("cpu")]} | options
    return Recorder(folder, config=CONFIG, trackers=trackers, **options)


def write(folder: Path, these: range, trackers: tuple[str, ...] = ("jsonl",), **options: Any) -> None:
    with recorder(folder, trackers, **options) as record:
        for step in these:
            record.record(step, metrics(step), seconds=0.5, data_loading_seconds=0.001)


# FLOPs, devices, records


@pytest.mark.parametrize("preset", ["tiny", "bench", "deepseek_moe_2b"])
def test_flops_are_three_forward_passes(preset: str):
    config = ModelConfig.preset(preset)

    assert flops_per_token(config, 256) == 3 * flops(config, 1, 256) / 256


def test_tied_embeddings_cost_what_a_head_of_their_own_costs():
    tied = ModelConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": True})

    assert count_parameters(tied).total < count_parameters(CONFIG).total
    assert flops_per_token(tied, 256) == flops_per_token(CONFIG, 256)


# The paper counts T keys per query; its totals are reproduced within its rounding of widths.
@pytest.mark.parametrize(
    ("preset", "tokens", "paper", "ours"),
    [
        ("deepseek_moe_2b", 2048, 4.3e12, 1.996e9),
        ("deepseek_moe_16b", 4096, 74.4e12, 17.12e9),  # the paper: 18.2 GFLOP a token
        pytest.param("deepseek_moe_145b", 4096, 585.6e12, 136.9e9, marks=pytest.mark.slow),
    ],
)
def test_flops_match_the_paper_without_masked_keys(preset, tokens, paper, ours):
    config = ModelConfig.preset(preset)
    unmet = 12 * config.num_hidden_layers * config.hidden_size * (tokens - 1) / 2

    causal = flops_per_token(config, tokens)

    assert causal == pytest.approx(ours, rel=1e-3)
    assert (causal + unmet) * tokens == pytest.approx(paper, rel=0.025)


def test_peak_flops_sum_over_known_devices():
    h100, pcie = device("NVIDIA H100 80GB HBM3"), device("NVIDIA H100 PCIe")

    assert peak_flops([h100, h100, pcie]) == 2 * 989e12 + 756e12
    assert peak_flops([device("NVIDIA GB200")]) == 2.5e15
    assert peak_flops([h100, device("cpu")]) is None
    assert peak_flops([device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")]) is None


def test_metrics_equal_slow_sums(tmp_path: Path):
    measured = metrics()
    load = measured.expert_load.tolist()
    load[1][5] = load[1][6] = 0.0
    h100s = [device("NVIDIA H100 80GB HBM3", peak=peak) for peak in (5, 7)]

    with recorder(tmp_path, devices=h100s) as record:
        record.record(
            1, measured._replace(expert_load=np.array(load, np.float32)), seconds=0.25, data_loading_seconds=0.01
        )
    (got,) = read_records(tmp_path)

    aux = [sum(float(x) for x in losses) for losses in (measured.balance_loss, measured.device_balance_loss)]
    assert [got["balance_loss"], got["device_balance_loss"]] == pytest.approx(aux)
    for name in ("loss", "cross_entropy", "z_loss", "grad_norm", "learning_rate"):
        assert got[name] == float(getattr(measured, name))
    assert (got["skipped"], got["total_skips"], got["consecutive_skips"]) == (0, 4, 0)
    assert (got["tokens_per_second"], got["data_loading_share"]) == (8192, 0.04)
    assert got["mfu"] == pytest.approx(8192 * flops_per_token(CONFIG, 256) / (2 * 989e12))
    assert got["device_memory_bytes"] == 7
    for n, layer in enumerate(LAYERS):
        assert got[f"moe/{layer}/load_imbalance"] == pytest.approx(max(load[n]) / (sum(load[n]) / E))
        assert got[f"moe/{layer}/unused_experts"] == load[n].count(0.0)
        assert got[f"moe/{layer}/balance_loss"] == float(measured.balance_loss[n])
        assert got[f"moe/{layer}/entropy"] == float(measured.entropy[n])
        assert got[f"moe/{layer}/expert_load"] == load[n]
    assert got["load_imbalance"] == max(got[f"moe/{layer}/load_imbalance"] for layer in LAYERS)
    assert (got["unused_experts"], got["overflow_passes"]) == (2, 0)


def test_an_unknown_device_has_no_mfu_and_reports_host_memory(tmp_path: Path):
    write(tmp_path, range(1, 2))

    (got,) = read_records(tmp_path)

    assert "mfu" not in got
    assert "device_memory_bytes" not in got
    assert 1 << 24 < got["host_memory_bytes"] < 1 << 40


def test_a_dense_model_has_no_routing_metrics(tmp_path: Path):
    dense = ModelConfig.from_dict({**CONFIG.to_dict(), "n_routed_experts": None, "num_experts_per_tok": None})
    none = np.zeros(0, np.float32)
    measured = metrics(
        expert_load=np.zeros((0, 0)), balance_loss=none, device_balance_loss=none, entropy=none, overflow_passes=none
    )

    with Recorder(
        tmp_path, config=dense, tokens_per_step=8, sequence_length=8, steps=1, trackers=("jsonl", "console")
    ) as record:
        record.record(1, measured, seconds=1.0, data_loading_seconds=0.0)

    assert not [key for key in read_records(tmp_path)[0] if "load_imbalance" in key or key.startswith("moe/")]


def test_expert_load_is_recorded_at_intervals(tmp_path: Path):
    write(tmp_path, range(1, 26), expert_load_interval=10, steps=25)

    assert [one["step"] for one in read_records(tmp_path) if "moe/1/expert_load" in one] == [1, 10, 20, 25]


# metrics.jsonl


def test_non_finite_values_are_null_and_listed(tmp_path: Path):
    with recorder(tmp_path) as record:
        record.record(
            1, metrics(loss=np.float32(math.nan), grad_norm=np.float32(math.inf)), seconds=1.0, data_loading_seconds=0.0
        )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    got = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert got["not_finite"] == ["loss", "grad_norm"]
    assert (got["loss"], got["grad_norm"]) == (None, None)


def test_the_first_record_describes_the_run(tmp_path: Path):
    write(tmp_path, range(1, 3), name="tiny")

    first, second = read_records(tmp_path)

    assert first["run"]["parameters"] == count_parameters(CONFIG).total
    assert first["run"] | {"name": "tiny", "steps": 100, "tokens_per_step": 2048, "devices": "1 × cpu"} == first["run"]
    assert not {"run", "resumed_from"} & set(second)
    assert "resumed_from" not in first


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path):
    write(tmp_path, range(1, 8))
    with recorder(tmp_path, resumed_from=4) as record:
        record.record_eval(4, 3.5, 512)
        record.record(5, metrics(50), seconds=1.0, data_loading_seconds=0.0)

    counted, every = read_records(tmp_path), read_records(tmp_path, superseded=True)

    assert [one["step"] for one in counted] == [1, 2, 3, 4, 4, 5]
    assert [one["step"] for one in every] == [1, 2, 3, 4, 5, 6, 7, 4, 5]
    assert [one.get("resumed_from") for one in every] == [None] * 7 + [4, None]
    assert counted[-1]["loss"] == float(metrics(50).loss)


def test_a_restarted_run_supersedes_all_records(tmp_path: Path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(1, 3))

    assert [one["step"] for one in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("left", [1, 100, 70_000])
def test_an_incomplete_last_line_is_truncated(tmp_path: Path, left: int):
    write(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    with file.open("a") as end:
        end.write('{"step": 4, "loss": "'.ljust(left, "x")[:left])
    assert [one["step"] for one in read_records(tmp_path)] == [1, 2, 3]

    write(tmp_path, range(4, 6), resumed_from=3)

    assert [one["step"] for one in read_records(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_file_with_only_an_incomplete_line_is_emptied(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"st')

    write(tmp_path, range(1, 3))

    assert [one["step"] for one in read_records(tmp_path)] == [1, 2]


def test_an_invalid_line_is_refused_by_number(tmp_path: Path):
    write(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as end:
        end.write("17\n")

    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 3 is not a record"):
        read_records(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_names_the_file(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"), recorder(tmp_path) as record:
        record.record_eval(1, 2.0, 3)


# Other trackers


def test_console_logs_at_intervals_and_evaluations(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    measured = metrics(
        loss=np.float32(5.12), cross_entropy=np.float32(5.11), balance_loss=np.full(3, 0.004, np.float32),
        device_balance_loss=np.zeros(3), grad_norm=np.float32(0.8), learning_rate=np.float32(1e-3),
        expert_load=np.array([[1] * 15 + [3]] * 3, np.float32), total_skips=np.int32(0),
    )  # fmt: skip
    peaks = {"devices": [device("NVIDIA A100-SXM4-80GB")], "tokens_per_step": 12_300_000}

    with recorder(tmp_path, ("console",), log_interval=50, steps=120, **peaks) as record:
        for step in range(1, 121):
            record.record(step, measured, seconds=1.0, data_loading_seconds=0.1)
        record.record_eval(120, 4.98, 512)

    head = "loss 5.12 ce 5.11 aux 0.012 norm 0.8 lr 1.0e-03 12.3M tok/s"
    share = 12.3e6 * flops_per_token(CONFIG, 256) / 312e12
    line = f"{head} mfu {share:.0%} load 2.7× unused 0 data loading 10%"
    first = f"step 1/120 {head.removesuffix(' 12.3M tok/s')} load 2.7× unused 0"  # its time includes compilation
    steps = [first, *(f"step {step}/120 {line}" for step in (50, 100, 120))]
    assert [one.message for one in caplog.records] == [*steps, "step 120/120 eval/loss 4.98"]


def test_a_terminal_shows_a_progress_bar_below_the_log(tmp_path: Path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logging.getLogger().setLevel(logging.WARNING)

    with recorder(tmp_path, ("console",)) as record:
        record.record(40, metrics(loss=np.float32(5.12)), seconds=1.0, data_loading_seconds=0.0)
        logging.getLogger("elsewhere").warning("saved")
        assert handler.stream is not terminal

    assert handler.stream is terminal
    assert "saved\n" in terminal.getvalue()
    assert "40/100" in terminal.getvalue()
    assert "loss 5.12" in terminal.getvalue()


def events(folder: Path) -> list[Any]:
    """Events of TensorBoard files: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_purges_repeated_steps(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, range(1, 4), ("jsonl", "tensorboard"))
    write(tmp_path, range(3, 4), ("tensorboard",), resumed_from=2)

    found = events(tmp_path)

    scalars = {one.step: {v.tag: v.simple_value for v in one.summary.value} for one in found if one.summary.value}
    want = {key: value for key, value in read_records(tmp_path)[1].items() if isinstance(value, int | float)}
    assert scalars[2] == pytest.approx(want)
    assert [one.step for one in found if one.HasField("session_log")] == [1, 3]


def test_missing_tensorboard_logs_how_to_install_it(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)

    write(tmp_path, range(1, 4), ("tensorboard",))

    assert [one.message for one in caplog.records] == ["Skipping TensorBoard: pip install 'dsmoe_jax[tensorboard]'"]


def test_a_resumed_run_continues_its_wandb_run(tmp_path: Path, monkeypatch):
    pages, logged = [], []
    page = SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: None, finish=lambda: logged.append("end"))
    fake = SimpleNamespace(init=lambda **options: (pages.append(options["id"]), page)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)

    write(tmp_path, range(1, 2), ("wandb",))
    write(tmp_path, range(2, 3), ("wandb",), resumed_from=1)

    assert len(pages) == 2
    assert len(set(pages)) == 1
    assert [one if one == "end" else one["step"] for one in logged] == [1, "end", 2, "end"]
    assert "moe/1/expert_load" not in logged[0]


def test_missing_wandb_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(ValueError, match=r"pip install 'dsmoe_jax\[wandb\]'"):
        recorder(tmp_path, ("jsonl", "wandb"))


def test_an_unknown_tracker_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="trackers must be of console, jsonl, tensorboard, wandb, plot, got 'csv'"):
        recorder(tmp_path, ("csv",))
