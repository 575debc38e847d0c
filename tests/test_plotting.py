"""Plots and tables of runs: what they show, that it can be read, and the verb `plot`."""

import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.train.metrics import Recorder
from dsmoe_jax.train.plotting import _millions, draw
from dsmoe_jax.train.run_records import RunRecords, summarize
from tests.helpers.command import run
from tests.test_metrics import metrics, recorder

pytestmark = pytest.mark.heavy

matplotlib = pytest.importorskip("matplotlib")
INFO = {"name": "tiny", "parameters": 4_502_208, "activated": 2_511_552, "vocab_size": 2048, "tokens_per_step": 512}


def cosine(step: int, steps: int) -> float:
    """The learning rate of a step, after 5 steps of warmup."""
    return min(step / 5, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)) * 1e-3


def write_run(
    folder: Path,
    steps: int,
    *,
    layers: int = 2,
    eval_interval: int | None = 10,
    resumes: tuple[int, ...] = (),
    nan_from: int | None = None,
    rate: Any = cosine,
    vocab_size: int = 2048,
) -> Path:
    """Write the metrics of a run whose loss falls from ln V."""
    folder.mkdir()
    lines, info, random = [], {**INFO, "steps": steps, "vocab_size": vocab_size}, np.random.default_rng(0)
    for step in range(1, steps + 1):
        loss = None if nan_from and step >= nan_from else math.log(vocab_size) * (0.5 + 0.5 * math.exp(-step / 20))
        record = {"step": step, "tokens": 512 * step, "loss": loss and loss + 0.01, "cross_entropy": loss}
        record |= {"learning_rate": rate(step, steps), "tokens_per_second": 1000.0}
        for layer in range(1, layers + 1):
            load = random.integers(0, 20, 8).tolist()
            record |= {f"moe/{layer}/load_imbalance": 1.5, f"moe/{layer}/expert_load": load}
        if step - 1 in (0, *resumes):
            record |= {"run": info} | ({"resumed_from": step - 1} if step > 1 else {})
        lines.append(record)
        if eval_interval and (step % eval_interval == 0 or step in (1, steps)):
            lines.append({"step": step, "eval/loss": loss and loss + 0.05, "eval/tokens": 99})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


# One run


def test_a_run_is_a_picture_of_good_size(tmp_path: Path):
    with recorder(tmp_path, expert_load_interval=10, name="tiny") as record:
        for step in range(1, 31):
            lost = {"cross_entropy": np.float32(math.nan)} if step == 20 else {}
            dead = metrics(step).expert_load * (np.arange(16) != 3)
            record.record(step, metrics(step, expert_load=dead, **lost), seconds=1.0, data_loading_seconds=0.0)
        record.record_eval(30, 2.0, 512)

    draw(tmp_path, tmp_path / "run.png")

    picture = (tmp_path / "run.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(picture[n : n + 4], "big") for n in (16, 20))
    assert (width > 1000, height > 700, len(picture) > 30_000) == (True, True, True)


def texts(figure: Any) -> Iterator[Any]:
    """Visible texts: titles, axis labels, legends, labels of events, tick labels."""
    for axes in figure.axes:
        yield from (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
        if axes.get_legend():
            yield from axes.get_legend().get_texts()
        for axis in (axes.xaxis, axes.yaxis):
            yield from (label for tick in axis._update_ticks() for label in (tick.label1, tick.label2))
    for legend in figure.legends:
        yield from legend.get_texts()
    if figure._suptitle:
        yield figure._suptitle


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        pytest.param({"steps": 10, "eval_interval": 2}, marks=pytest.mark.slow),
        {"steps": 40, "layers": 0},
        {"steps": 20, "layers": 60},
        {"steps": 100, "resumes": (30, 70), "rate": lambda step, steps: 1e-3 if step <= 70 else 5e-4},
        {"steps": 60, "nan_from": 40},
        pytest.param({"steps": 40, "eval_interval": None, "vocab_size": 102_400}, marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items() if name != "rate"),
)
def test_texts_do_not_overlap(tmp_path: Path, figures: list[Any], options: dict[str, Any]):
    draw(write_run(tmp_path / "a-run", **options), tmp_path / "run.png")

    (figure,) = figures
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure) if text.get_visible()]
    boxes = [(text, box) for text, box in boxes if text]
    width, height = figure.bbox.size
    assert len(boxes) > 8
    for text, box in boxes:
        assert (box.x0 >= 0, box.y0 >= 0, box.x1 <= width, box.y1 <= height) == (True,) * 4, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)


def test_title_has_the_console_losses(tmp_path: Path, figures: list[Any]):
    folder = write_run(tmp_path / "run", 30)
    last, evaluation = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[-2:])

    draw(folder, tmp_path / "run.png")

    title = figures[0].axes[0].get_title("left")
    assert title == f"Step 30: loss {last['loss']:.4f}, eval/loss {evaluation['eval/loss']:.4f}"


def test_the_validation_curve_is_within_the_axes(tmp_path: Path, figures: list[Any]):
    draw(write_run(tmp_path / "run", 30), tmp_path / "run.png")

    axes = figures[0].axes[0]
    (curve,) = [line for line in axes.lines if line.get_label() == "validation"]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert curve.get_xdata().tolist() == [1, 10, 20, 30]
    assert left < 1 < 30 < right
    assert low < min(curve.get_ydata()) < max(curve.get_ydata()) < high
    legend = axes.get_legend().get_window_extent()
    assert not legend.padded(-1).overlaps(axes.bbox)


def test_resumes_and_learning_rates_are_marked(tmp_path: Path, figures: list[Any]):
    rate = lambda step, _: 1e-3 if step <= 70 else 5e-4  # noqa: E731
    draw(write_run(tmp_path / "run", 100, resumes=(30, 70), rate=rate), tmp_path / "run.png")

    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["resumed", "resumed, lr 1.0e-03 → 5.0e-04"]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [30.5, 70.5]


@pytest.mark.parametrize("steps", [3, 10, 30, 400])
def test_schedules_without_jumps_have_no_events(tmp_path: Path, steps: int):
    assert RunRecords.read(write_run(tmp_path / "run", steps, layers=0)).events == []


def test_losses_that_are_not_finite_are_marked(tmp_path: Path, figures: list[Any]):
    draw(write_run(tmp_path / "run", 30, nan_from=21), tmp_path / "run.png")

    axes = figures[0].axes[0]
    assert axes.get_title("left") == "Step 30: loss nan, eval/loss nan"
    assert "not finite: 10 steps" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_plotting_without_steps_is_refused(tmp_path: Path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    cases = {"none": "none does not exist$", ".": "is not the output directory of a run: it has no metrics.jsonl$"}

    for folder, message in {**cases, "new": "has no recorded step$"}.items():
        with pytest.raises(ValueError, match=message):
            draw(tmp_path / folder, tmp_path / "run.png")


def test_plotting_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ValueError, match=r"pip install 'dsmoe_jax\[demo\]'"):
        draw(tmp_path, tmp_path / "run.png")


def test_a_run_is_drawn_by_tokens(tmp_path: Path, figures: list[Any]):
    draw(write_run(tmp_path / "run", 30, resumes=(10,)), tmp_path / "run.png", by="tokens")

    loss = figures[0].axes[0]
    imbalance = next(axes for axes in figures[0].axes if axes.get_title("left") == "Load imbalance")
    curve = next(line for line in loss.lines if line.get_label() == "validation")
    assert (loss.get_xlabel(), imbalance.get_xlabel()) == ("tokens", "tokens")
    assert curve.get_xdata().tolist() == [512, 5120, 10240, 15360]
    assert imbalance.lines[0].get_xdata()[-1] == 15360
    assert [line.get_xdata()[0] for line in loss.lines if line.get_linestyle() == "--"] == [10.5 * 512]


def test_one_layer_has_no_color_bar(tmp_path: Path, figures: list[Any]):
    for layers in (1, 2):
        draw(write_run(tmp_path / str(layers), 9, layers=layers), tmp_path / "run.png")

    assert [sum(axes.get_ylabel() == "layer" for axes in figure.axes) for figure in figures] == [1, 2]


def test_small_models_are_counted_in_thousands():
    assert [_millions(n) for n in (0, 61_300, 4_502_208, 2_800_000_000)] == ["0", "61.3K", "4.5M", "2.8B"]


# Several runs


def test_long_names_keep_their_ends(tmp_path: Path, figures: list[Any]):
    folders = [write_run(tmp_path / f"a_long_name_of_a_sweep_lr0.001_bs64_seed{n}", 9) for n in (1, 2)]

    draw([*folders, folders[0]], tmp_path / "runs.png")

    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["a_long_name_of_….001_bs64_seed1", "a_long_name_of_….001_bs64_seed2"]


def test_runs_are_compared_by_tokens(tmp_path: Path, figures: list[Any]):
    folders = [write_run(tmp_path / "one", 30), write_run(tmp_path / "two", 60, eval_interval=None)]

    draw(folders, tmp_path / "runs.svg", by="tokens")

    (figure,) = figures
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert axes.get_xlabel() == "tokens"
    assert [line.get_xdata()[-1] for line in axes.lines[:3]] == [30 * 512, 30 * 512, 60 * 512]
    assert len({line.get_color() for line in axes.lines[:3]}) == 2


def test_other_vocabularies_are_not_comparable(tmp_path: Path, figures: list[Any]):
    draw([write_run(tmp_path / "a", 9), write_run(tmp_path / "b", 9, vocab_size=300)], tmp_path / "runs.png")

    assert "not comparable: vocabulary sizes differ" in figures[0].axes[0].get_title("left")


def test_runs_of_equal_name_are_named_by_path(tmp_path: Path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run", 2)

    table = summarize([tmp_path / "a/run", tmp_path / "b/run"])

    assert [line.split()[0] for line in table.splitlines()[1:]] == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]


def test_runs_are_summarized_in_a_table(tmp_path: Path):
    one, two = write_run(tmp_path / "one", 30), write_run(tmp_path / "two", 1000, eval_interval=None)

    head, first, second = (line.split() for line in summarize([one, two]).splitlines())

    assert head == ["run", "step", "tokens", "loss", "eval/loss", "lowest", "eval/loss", "tok/s"]
    assert first[:3] == ["one", "30", "15,360"]
    assert (float(first[4]), first[4]) == (pytest.approx(float(first[3]) + 0.04, abs=2e-4), first[5])
    assert second == ["two", "1,000", "512,000", second[3], "-", "-", "1,000"]


# The verb and the tracker


def test_plot_draws_and_prints_final_losses(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = write_run(tmp_path / "one", 12), write_run(tmp_path / "two", 12)

    codes = [run("plot", one), run("plot", one, two, "--by", "tokens"), run("plot", two / "metrics.jsonl")]
    codes.append(run("plot", two, "--out", "two.pdf"))

    out, _ = capsys.readouterr()
    assert codes == [0, 0, 0, 0]
    assert all(
        (tmp_path / name).stat().st_size > 5000 for name in ("one/plot.png", "plot.png", "two/plot.png", "two.pdf")
    )
    assert f"{summarize([one, two])}\nSaved plot: plot.png\n" in out


def test_plot_refuses_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("plot", write_run(tmp_path / "run", 2), "--out", tmp_path / "a.txt") == 2
    assert "suffix of out must be one of .png, .pdf, .svg, got '.txt'" in capsys.readouterr().err


def short_run(folder: Path) -> Recorder:
    with recorder(folder, ("jsonl", "plot")) as record:
        record.record(1, metrics(1), seconds=1.0, data_loading_seconds=0.0)
    return record


def test_a_run_draws_its_plot_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)

    short_run(tmp_path)

    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert f"Saved plot: {tmp_path / 'plot.png'}" in caplog.text


def test_a_run_without_matplotlib_has_no_plot(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    short_run(tmp_path)

    assert not (tmp_path / "plot.png").exists()
    assert not caplog.records


def test_a_plot_that_fails_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "plot.png").mkdir()

    short_run(tmp_path)

    assert "No plot: " in caplog.text
