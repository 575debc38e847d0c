"""Trackers, which write metrics: `TRACKERS`, at the end, lists them."""

import contextlib
import importlib.util
import logging
import math
import secrets
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import log_level
from dsmoe_jax.storage.json_lines import JsonLinesFile

RECORDS: Final = "metrics.jsonl"
PLOT: Final = "plot.png"
_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Properties of the run for trackers."""

    folder: Path  # output directory
    info: dict[str, Any]  # sizes of model, batch and devices, for the first record
    steps: int  # in total
    log_interval: int  # steps between console lines
    resumed_from: int  # step of the checkpoint; 0 for a new run


class Tracker(Protocol):
    """Writes the records of a run."""

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class JsonLines:
    """Writes `metrics.jsonl`: one line of strict JSON per record, unbuffered."""

    def __init__(self, run: Run):
        self._file = JsonLinesFile(run.folder / RECORDS)
        appending = run.resumed_from > 0 or not self._file.is_new
        self._head = {"run": run.info, **({"resumed_from": run.resumed_from} if appending else {})}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the record; non-finite values become null."""
        bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        self._file.append({**values, **dict.fromkeys(bad), **({"not_finite": bad} if bad else {}), **self._head})
        self._head = {}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# fmt: off
# The console line: metrics and their format; missing metrics and empty texts are left out.
_LINE: Final[tuple[tuple[str, Callable[[Any], str]], ...]] = (
    ("loss",               "loss {:.4g}".format),
    ("cross_entropy",      "ce {:.4g}".format),
    ("balance_loss",       "aux {:.2g}".format),
    ("device_balance_loss", lambda x: f"device aux {x:.2g}" if x else ""),
    ("grad_norm",          "norm {:.2g}".format),
    ("learning_rate",      "lr {:.1e}".format),
    ("tokens_per_second",  lambda x: f"{_short(x)} tok/s"),
    ("mfu",                "mfu {:.0%}".format),
    ("load_imbalance",     "load {:.1f}×".format),
    ("unused_experts",     "unused {}".format),
    ("overflow_passes",    lambda x: f"overflow passes {x}" if x else ""),
    ("data_loading_share", lambda x: f"data loading {x:.0%}" if x > 0.01 else ""),
    ("total_skips",        lambda x: f"skipped {x}" if x else ""),
)
# fmt: on


_SPEEDS: Final = ("tokens_per_second", "mfu", "data_loading_share")


@contextlib.contextmanager
def console_log(trackers: Collection[str]) -> Iterator[None]:
    """Log to stderr for the tracker `console`, unless the program has configured logging.

    A plain handler for warnings does not count: absl adds one as orbax is imported.
    """
    root, ours = logging.getLogger(), logging.getLogger("dsmoe_jax")
    plain = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    if "console" not in trackers or ours.isEnabledFor(logging.INFO) or len(plain) < len(root.handlers):
        yield
        return
    console, root.handlers = logging.StreamHandler(), []
    root.addHandler(console)
    try:
        with log_level(ours.name, logging.INFO):
            yield
    finally:
        root.removeHandler(console)
        root.handlers += plain


class Console:
    """Logs a line every `log_interval` steps; a progress bar on a terminal."""

    def __init__(self, run: Run):
        self._run, self._recent = run, []
        self._bar = _Bar(run) if sys.stderr.isatty() else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the record if it is due; speeds are medians since the last line."""
        if evaluated := {name: value for name, value in values.items() if name.startswith("eval/")}:
            text = " ".join(f"{name} {value:.4g}" for name, value in evaluated.items() if name != "eval/tokens")
            _log.info("step %d/%d %s", step, self._run.steps, text)
            return
        if step == self._run.resumed_from + 1:  # its time includes compilation
            values = {name: value for name, value in values.items() if name not in _SPEEDS}
        self._recent.append(values)
        if self._bar is None and step % self._run.log_interval and step not in (1, self._run.steps):
            return
        medians = {
            key: statistics.median(measured)
            for key in _SPEEDS
            if (measured := [one[key] for one in self._recent if key in one])
        }
        shown = {**values, **medians}
        text = " ".join(piece for key, form in _LINE if key in shown and (piece := form(shown[key])))
        if self._bar is None:
            _log.info("step %d/%d %s", step, self._run.steps, text)
        else:
            self._bar.show(step, text)
        self._recent = [] if self._bar is None else self._recent[-self._run.log_interval :]

    def close(self) -> None:
        """Stop the progress bar."""
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """A progress bar on stderr with metrics; log lines appear above it."""

    def __init__(self, run: Run):
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"))
        # Log handlers hold the original stderr; only writes to rich's appear above the bar.
        stream = sys.stderr
        self._progress = Progress(*columns, console=Terminal(stderr=True), redirect_stdout=False)
        self._task = self._progress.add_task("", total=run.steps, completed=run.resumed_from, metrics="")
        self._progress.start()
        handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        self._moved = [(handler, stream) for handler in handlers if handler.stream is stream]
        for handler, _ in self._moved:
            handler.setStream(sys.stderr)

    def show(self, step: int, metrics: str) -> None:
        self._progress.update(self._task, completed=step, metrics=metrics)

    def close(self) -> None:
        self._progress.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)


def _short(value: float) -> str:
    """Format with three digits and a unit: 12.3k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class TensorBoard:
    """Writes every number to `tensorboard/`, if tensorboardX is installed."""

    def __init__(self, run: Run):
        try:
            from tensorboardX import SummaryWriter
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            _log.info("Skipping TensorBoard: pip install 'dsmoe_jax[tensorboard]'")
            self._writer = None
            return
        self._summary = Summary
        # purge_step hides records past the step resumed from. Files are named after the second, in which a run may be
        # resumed: the suffix makes names unique.
        folder, step = run.folder / "tensorboard", run.resumed_from
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=f".{step}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write all scalars in one event."""
        # `add_scalar` for each takes 20 ms per step with the 16B's layers.
        if self._writer is not None and self._writer.file_writer is not None:
            scalars = [self._summary.Value(tag=key, simple_value=value) for key, value in _numbers(values).items()]
            self._writer.file_writer.add_summary(self._summary(value=scalars), step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Writes to Weights & Biases; a resumed run continues its W&B run."""

    def __init__(self, run: Run):
        wandb = _import_wandb()
        id_file = run.folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        run_id, options = id_file.read_text(encoding="utf-8"), {"dir": str(run.folder), "config": run.info}
        self._run = wandb.init(project="dsmoe_jax", name=run.folder.name, id=run_id, resume="allow", **options)
        # A metric, because W&B's built-in step cannot decrease when a run is resumed.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the record."""
        self._run.log(_numbers(values))

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise DSMoEError("tracker 'wandb' requires wandb: pip install 'dsmoe_jax[wandb]'") from None


def check_installed(trackers: Collection[str]) -> None:
    """Raise `DSMoEError` for a tracker whose package is missing."""
    if "wandb" in trackers:
        _import_wandb()


class Plot:
    """Plots the records of `metrics.jsonl` at the end of the run, if matplotlib is installed."""

    def __init__(self, run: Run):
        self._folder, self._steps = run.folder, 0

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Count the records."""
        self._steps += 1

    def close(self) -> None:
        """Save the plot; failing to do so does not fail the run."""
        if not self._steps or importlib.util.find_spec("matplotlib") is None:
            return
        from .plotting import draw

        try:
            draw(self._folder, self._folder / PLOT)
        except (DSMoEError, OSError) as error:
            _log.warning("No plot: %s", error)
        else:
            _log.info("Saved plot: %s", self._folder / PLOT)


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in values.items() if not isinstance(value, list)}


TRACKERS: Final[dict[str, Callable[[Run], Tracker]]] = {
    "console": Console,
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "plot": Plot,
}
