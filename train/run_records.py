"""The recorded curves of a run, for plots and tables: `RunRecords.read` and `summarize`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from dsmoe_jax.errors import DSMoEError

from .metrics import read_records
from .trackers import RECORDS

Records = list[dict[str, Any]]

_JUMP: Final = 0.05  # of the peak learning rate; schedules change less in one step


class Event(NamedTuple):
    """A resume or a jump of the learning rate, after `step`."""

    step: int
    label: str


class RunRecords(NamedTuple):
    """The records of a run.

    Attributes:
        name: Folder name.
        info: Sizes of model and batch, as recorded at the last start.
        steps: Records of training steps.
        evals: Records of evaluations.
        events: Resumes and jumps of the learning rate, in order.
    """

    name: str
    info: dict[str, Any]
    steps: Records
    evals: Records
    events: list[Event]

    @classmethod
    def read(cls, folder: str | Path) -> "RunRecords":
        """Read `metrics.jsonl`, of a run or itself; `DSMoEError` if it has no step."""
        folder = run_folder(folder)
        if not folder.exists():
            raise DSMoEError(f"{folder} does not exist")
        if not (folder / RECORDS).exists():
            raise DSMoEError(f"{folder} is not the output directory of a run: it has no {RECORDS}")
        records = read_records(folder)
        steps = [record for record in records if "loss" in record]
        if not steps:
            raise DSMoEError(f"{folder} has no recorded step")
        evals = [record for record in records if "eval/loss" in record]
        info: dict[str, Any] = next((record["run"] for record in reversed(records) if "run" in record), {})
        return cls(folder.resolve().name, info, steps, evals, _events(records, steps))

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the MoE layers."""
        return sorted({int(key.split("/")[1]) for key in self.steps[0] if key.startswith("moe/")})

    def scale(self, by: Literal["step", "tokens"]) -> float:
        """Return the length of a step on a horizontal axis of steps or of training tokens."""
        return 1.0 if by == "step" else self.steps[-1]["tokens"] / self.steps[-1]["step"]


def run_folder(path: str | Path) -> Path:
    """Return the folder of a run, given itself or its `metrics.jsonl`."""
    path = Path(path)
    return path.parent if path.name == RECORDS and path.is_file() else path


def column(records: Records, key: str) -> np.ndarray:
    """Return the values of a metric, NaN where it is missing or not finite."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], float)


def read_runs(folders: Sequence[str | Path]) -> list[RunRecords]:
    """Read several runs, each once; those of equal name are named by their path."""
    folders = list({run_folder(folder).resolve(): folder for folder in folders}.values())
    runs = list(map(RunRecords.read, folders))
    names = [run.name for run in runs]
    return [
        run._replace(name=str(folder)) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def summarize(runs: Sequence[str | Path]) -> str:
    """Return a table of final metrics, one line per run."""
    lines: list[tuple[str, ...]] = [("run", "step", "tokens", "loss", "eval/loss", "lowest eval/loss", "tok/s")]
    for run in read_runs(runs):
        evals = [record["eval/loss"] for record in run.evals if record["eval/loss"] is not None]
        last = run.evals[-1]["eval/loss"] if run.evals else None
        speeds = [record["tokens_per_second"] for record in run.steps if record.get("tokens_per_second")]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        counts = [f"{run.steps[-1][name]:,}" for name in ("step", "tokens")]
        losses = map(format_loss, (run.steps[-1]["loss"], last, min(evals, default=None)))
        lines.append((run.name, *counts, *losses, speed))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *row[1:]]) for line, row in zip(lines, rows, strict=True))


def format_loss(value: float | None) -> str:
    """Format a loss as the last line of `dsmoe pretrain` does; `-` if it is missing or not finite."""
    return "-" if value is None else f"{value:.4f}"


def _events(records: Records, steps: Records) -> list[Event]:
    resumed = {record["resumed_from"] for record in records if record.get("resumed_from")}
    changed = {steps[n]["step"]: _change(steps[n], steps[n + 1]) for n in _jumps(column(steps, "learning_rate"))}
    found = []
    for step in sorted(resumed | changed.keys()):
        labels = [*(["resumed"] if step in resumed else []), *([changed[step]] if step in changed else [])]
        found.append(Event(step, ", ".join(labels)))
    return found


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"lr {before['learning_rate']:.1e} → {after['learning_rate']:.1e}"


def _jumps(rate: np.ndarray) -> list[int]:
    """Return the indices before jumps: after warmup, much larger than the changes before and after them."""
    change = np.diff(rate)
    warmup = len(change) if (change > 0).all() else int(np.argmax(~(change > 0)))
    size = np.abs(np.pad(change, 1))
    sharp = (size[1:-1] > _JUMP * np.nanmax(rate)) & (np.maximum(size[:-2], size[2:]) < size[1:-1] / 2)
    return [int(n) for n in np.flatnonzero(sharp) if n >= warmup]
