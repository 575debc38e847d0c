"""What a run says of itself, against slow sums, in every sink, and as a picture."""

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
from dsmoe_jax.train.picture import draw
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
        balance=aux[0],
        device_balance=aux[1],
        z_loss=scalar[2],
        gradient_norm=scalar[3],
        learning_rate=scalar[4],
        skipped=np.bool_(False),
        skipped_in_all=np.int32(4),
        skipped_in_a_row=np.int32(0),
        load=load,
        entropy=aux[2],
        overflow_passes=np.zeros(3, np.float32),
    )
    return Metrics(**fields | changes)


def device(kind: str, peak: int | None = None) -> SimpleNamespace:
    stats = None if peak is None else {"peak_bytes_in_use": peak}
    return SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)


def recorder(folder: Path, sinks: tuple[str, ...] = ("jsonl",), **options: Any) -> Recorder:
    options = {"tokens_per_step": 2048, "sequence_length": 256, "steps": 100, "devices": [device("cpu")]} | options
    return Recorder(folder, config=CONFIG, sinks=sinks, **options)


def write(folder: Path, these: range, sinks: tuple[str, ...] = ("jsonl",), **options: Any) -> None:
    with recorder(folder, sinks, **options) as record:
        for step in these:
            record.record(step, metrics(step), seconds=0.5, data_wait=0.001)


# What is counted


@pytest.mark.parametrize("preset", ["tiny", "bench", "deepseek_moe_2b"])
def test_the_flops_are_three_forward_passes_counted_matrix_by_matrix(preset: str):
    config = ModelConfig.preset(preset)

    assert flops_per_token(config, 256) == 3 * flops(config, 1, 256) / 256


def test_tied_embeddings_cost_what_a_head_of_their_own_costs():
    tied = ModelConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": True})

    assert count_parameters(tied).total < count_parameters(CONFIG).total
    assert flops_per_token(tied, 256) == flops_per_token(CONFIG, 256)


# The paper's figures count all T keys of a query; its totals are reproduced within its rounding of widths.
@pytest.mark.parametrize(
    ("preset", "tokens", "paper", "ours"),
    [
        ("deepseek_moe_2b", 2048, 4.3e12, 1.996e9),
        ("deepseek_moe_16b", 4096, 74.4e12, 17.12e9),  # the paper: 18.2 GFLOP a token
        pytest.param("deepseek_moe_145b", 4096, 585.6e12, 136.9e9, marks=pytest.mark.slow),
    ],
)
def test_the_flops_are_the_papers_less_the_keys_that_a_causal_query_never_meets(preset, tokens, paper, ours):
    config = ModelConfig.preset(preset)
    unmet = 12 * config.num_hidden_layers * config.hidden_size * (tokens - 1) / 2

    causal = flops_per_token(config, tokens)

    assert causal == pytest.approx(ours, rel=1e-3)
    assert (causal + unmet) * tokens == pytest.approx(paper, rel=0.025)


def test_the_peak_is_that_of_all_devices_and_unknown_where_one_is():
    h100, pcie = device("NVIDIA H100 80GB HBM3"), device("NVIDIA H100 PCIe")

    assert peak_flops([h100, h100, pcie]) == 2 * 989e12 + 756e12
    assert peak_flops([device("NVIDIA GB200")]) == 2.5e15
    assert peak_flops([h100, device("cpu")]) is None
    assert peak_flops([device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")]) is None


def test_every_number_of_a_record_is_what_a_slow_sum_says(tmp_path: Path):
    said = metrics()
    load = said.load.tolist()
    load[1][5] = load[1][6] = 0.0
    h100s = [device("NVIDIA H100 80GB HBM3", peak=peak) for peak in (5, 7)]

    with recorder(tmp_path, devices=h100s) as record:
        record.record(1, said._replace(load=np.array(load, np.float32)), seconds=0.25, data_wait=0.01)
    (got,) = read_records(tmp_path)

    aux = [sum(float(x) for x in losses) for losses in (said.balance, said.device_balance)]
    assert [got["balance_loss"], got["device_balance_loss"]] == pytest.approx(aux)
    for name in ("loss", "cross_entropy", "z_loss", "gradient_norm", "learning_rate"):
        assert got[name] == float(getattr(said, name))
    assert (got["skipped"], got["skipped_in_all"], got["skipped_in_a_row"]) == (0, 4, 0)
    assert (got["tokens_per_second"], got["data_wait_share"]) == (8192, 0.04)
    assert got["mfu"] == pytest.approx(8192 * flops_per_token(CONFIG, 256) / (2 * 989e12))
    assert got["device_memory_bytes"] == 7
    for n, layer in enumerate(LAYERS):
        assert got[f"moe/{layer}/max_over_mean_load"] == pytest.approx(max(load[n]) / (sum(load[n]) / E))
        assert got[f"moe/{layer}/unused_experts"] == load[n].count(0.0)
        assert got[f"moe/{layer}/balance_loss"] == float(said.balance[n])
        assert got[f"moe/{layer}/entropy"] == float(said.entropy[n])
        assert got[f"moe/{layer}/load"] == load[n]
    assert got["max_over_mean_load"] == max(got[f"moe/{layer}/max_over_mean_load"] for layer in LAYERS)
    assert (got["unused_experts"], got["overflow_passes"]) == (2, 0)


def test_without_a_known_device_there_is_no_mfu_and_memory_is_the_processes(tmp_path: Path):
    write(tmp_path, range(1, 2))

    (got,) = read_records(tmp_path)

    assert "mfu" not in got
    assert "device_memory_bytes" not in got
    assert 1 << 24 < got["host_memory_bytes"] < 1 << 40


def test_a_dense_model_has_no_routing_to_speak_of(tmp_path: Path):
    dense = ModelConfig.from_dict({**CONFIG.to_dict(), "n_routed_experts": None, "num_experts_per_tok": None})
    none = np.zeros(0, np.float32)
    said = metrics(load=np.zeros((0, 0)), balance=none, device_balance=none, entropy=none, overflow_passes=none)

    with Recorder(
        tmp_path, config=dense, tokens_per_step=8, sequence_length=8, steps=1, sinks=("jsonl", "console")
    ) as record:
        record.record(1, said, seconds=1.0, data_wait=0.0)

    assert not [key for key in read_records(tmp_path)[0] if "load" in key or key.startswith("moe/")]
    pytest.importorskip("matplotlib")
    draw(tmp_path, tmp_path / "run.png")


def test_the_load_of_each_expert_is_recorded_at_both_ends_and_every_so_often(tmp_path: Path):
    write(tmp_path, range(1, 26), heat_every=10, steps=25)

    assert [one["step"] for one in read_records(tmp_path) if "moe/1/load" in one] == [1, 10, 20, 25]


# metrics.jsonl


def test_what_is_not_finite_is_null_and_named_in_strict_json(tmp_path: Path):
    with recorder(tmp_path) as record:
        record.record(
            1, metrics(loss=np.float32(math.nan), gradient_norm=np.float32(math.inf)), seconds=1.0, data_wait=0.0
        )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    got = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert got["not_finite"] == ["loss", "gradient_norm"]
    assert (got["loss"], got["gradient_norm"]) == (None, None)


def test_the_first_record_of_a_run_has_its_facts(tmp_path: Path):
    write(tmp_path, range(1, 3), name="tiny")

    first, second = read_records(tmp_path)

    assert first["run"]["parameters"] == count_parameters(CONFIG).total
    assert first["run"] | {"name": "tiny", "steps": 100, "tokens_per_step": 2048, "devices": "1 × cpu"} == first["run"]
    assert not {"run", "resumed_from"} & set(second)
    assert "resumed_from" not in first


def test_a_resumed_run_appends_and_the_steps_it_did_again_count_once(tmp_path: Path):
    write(tmp_path, range(1, 8))
    with recorder(tmp_path, resumed_from=4) as record:
        record.evaluation(4, 3.5, 512)
        record.record(5, metrics(50), seconds=1.0, data_wait=0.0)

    counted, every = read_records(tmp_path), read_records(tmp_path, superseded=True)

    assert [one["step"] for one in counted] == [1, 2, 3, 4, 4, 5]
    assert [one["step"] for one in every] == [1, 2, 3, 4, 5, 6, 7, 4, 5]
    assert [one.get("resumed_from") for one in every] == [None] * 7 + [4, None]
    assert counted[-1]["loss"] == float(metrics(50).loss)


def test_a_run_from_the_start_in_the_same_folder_takes_the_place_of_the_one_before(tmp_path: Path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(1, 3))

    assert [one["step"] for one in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("left", [1, 100, 70_000])
def test_a_torn_last_line_is_left_out_and_taken_away_before_the_next(tmp_path: Path, left: int):
    write(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    with file.open("a") as end:
        end.write('{"step": 4, "loss": "'.ljust(left, "x")[:left])
    assert [one["step"] for one in read_records(tmp_path)] == [1, 2, 3]

    write(tmp_path, range(4, 6), resumed_from=3)

    assert [one["step"] for one in read_records(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_file_that_is_nothing_but_a_torn_line_begins_anew(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"st')

    write(tmp_path, range(1, 3))

    assert [one["step"] for one in read_records(tmp_path)] == [1, 2]


def test_a_line_that_is_no_record_is_refused_by_number(tmp_path: Path):
    write(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as end:
        end.write("17\n")

    with pytest.raises(ValueError, match=r"metrics\.jsonl line 3 is not a record"):
        read_records(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"), recorder(tmp_path) as record:
        record.evaluation(1, 2.0, 3)


# The other sinks


def test_the_console_has_a_line_every_so_many_steps_and_one_an_evaluation(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    said = metrics(
        loss=np.float32(5.12), cross_entropy=np.float32(5.11), balance=np.full(3, 0.004, np.float32),
        device_balance=np.zeros(3), gradient_norm=np.float32(0.8), learning_rate=np.float32(1e-3),
        load=np.array([[1] * 15 + [3]] * 3, np.float32), skipped_in_all=np.int32(0),
    )  # fmt: skip
    peaks = {"devices": [device("NVIDIA A100-SXM4-80GB")], "tokens_per_step": 12_300_000}

    with recorder(tmp_path, ("console",), log_every=50, steps=120, **peaks) as record:
        for step in range(1, 121):
            record.record(step, said, seconds=1.0, data_wait=0.1)
        record.evaluation(120, 4.98, 512)

    head = "loss 5.12 ce 5.11 aux 0.012 norm 0.8 lr 1.0e-03 12.3M tok/s"
    share = 12.3e6 * flops_per_token(CONFIG, 256) / 312e12
    line = f"{head} mfu {share:.0%} load 2.7× unused 0 data wait 10%"
    steps = [f"step {step}/120 {line}" for step in (1, 50, 100, 120)]
    assert [one.message for one in caplog.records] == [*steps, "step 120/120 held-out loss 4.98"]


def test_on_a_terminal_there_is_a_bar_and_the_log_appears_above_it(tmp_path: Path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    logging.getLogger().setLevel(logging.WARNING)

    with recorder(tmp_path, ("console",)) as record:
        record.record(40, metrics(loss=np.float32(5.12)), seconds=1.0, data_wait=0.0)
        logging.getLogger("elsewhere").warning("saved")
        assert handler.stream is not terminal

    assert handler.stream is terminal
    assert "saved\n" in terminal.getvalue()
    assert "40/100" in terminal.getvalue()
    assert "loss 5.12" in terminal.getvalue()


def events(folder: Path) -> list[Any]:
    """The events of TensorBoard's files: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_has_every_number_and_hides_what_a_resumed_run_does_again(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, range(1, 4), ("jsonl", "tensorboard"))
    write(tmp_path, range(3, 4), ("tensorboard",), resumed_from=2)

    found = events(tmp_path)

    scalars = {one.step: {v.tag: v.simple_value for v in one.summary.value} for one in found if one.summary.value}
    want = {key: value for key, value in read_records(tmp_path)[1].items() if isinstance(value, int | float)}
    assert scalars[2] == pytest.approx(want)
    assert [one.step for one in found if one.HasField("session_log")] == [1, 3]


def test_without_tensorboard_one_line_says_how_to_have_it(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)

    write(tmp_path, range(1, 4), ("tensorboard",))

    assert [one.message for one in caplog.records] == ["no TensorBoard records: pip install 'dsmoe_jax[tensorboard]'"]


def test_a_resumed_run_goes_on_in_its_page_of_wandb(tmp_path: Path, monkeypatch):
    pages, logged = [], []
    page = SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: None, finish=lambda: logged.append("end"))
    fake = SimpleNamespace(init=lambda **options: (pages.append(options["id"]), page)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)

    write(tmp_path, range(1, 2), ("wandb",))
    write(tmp_path, range(2, 3), ("wandb",), resumed_from=1)

    assert len(pages) == 2
    assert len(set(pages)) == 1
    assert [one if one == "end" else one["step"] for one in logged] == [1, "end", 2, "end"]
    assert "moe/1/load" not in logged[0]


def test_wandb_is_asked_for_by_name_so_its_absence_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)

    with pytest.raises(ValueError, match=r"pip install 'dsmoe_jax\[wandb\]'"):
        recorder(tmp_path, ("jsonl", "wandb"))


def test_a_sink_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="sink 'csv' is not one of console, jsonl, tensorboard, wandb"):
        recorder(tmp_path, ("csv",))


# The picture


def test_a_run_becomes_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with recorder(tmp_path, heat_every=10, name="tiny") as record:
        for step in range(1, 61):
            lost = {"cross_entropy": np.float32(math.nan)} if step == 30 else {}
            dead = metrics(step).load * (np.arange(E) != 3)
            record.record(step, metrics(step, load=dead, **lost), seconds=1.0, data_wait=0.0)
        record.evaluation(60, 2.0, 512)

    draw(tmp_path, tmp_path / "run.png")

    picture = (tmp_path / "run.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width > 1000, height > 700, len(picture) > 30_000) == (True, True, True)


def test_one_step_is_enough_for_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    write(tmp_path, range(1, 2))

    draw(tmp_path, tmp_path / "run.png")

    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_a_picture_of_nothing_is_refused(tmp_path: Path):
    pytest.importorskip("matplotlib")

    with pytest.raises(ValueError, match="holds no record of a step yet"):
        draw(tmp_path, tmp_path / "run.png")


def test_a_picture_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ValueError, match=r"pip install 'dsmoe_jax\[demo\]'"):
        draw(tmp_path, tmp_path / "run.png")
