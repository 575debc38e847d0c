"""Where the records of a run go: console, metrics.jsonl, TensorBoard, W&B. `SINKS`, at the end, is the table."""

import json
import logging
import math
import mmap
import secrets
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

RECORDS: Final = "metrics.jsonl"
_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What a sink may want to know of the run as a whole."""

    folder: Path
    facts: dict[str, Any]  # that stand in the first record
    steps: int
    log_every: int
    resumed_from: int


class Sink(Protocol):
    """Takes the records of a run."""

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class JsonLines:
    """`metrics.jsonl`: a line a record, on its way to the disk before the next step; strict JSON."""

    def __init__(self, run: Run):
        self._path = run.folder / RECORDS
        # Unbuffered: a line that did not fit on the disk is not tried again at the end.
        self._file = self._path.open("ab", buffering=0)
        _mend(self._path)
        again = run.resumed_from > 0 or self._path.stat().st_size > 0
        self._head = {"run": run.facts, **({"resumed_from": run.resumed_from} if again else {})}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the record; what is not finite becomes null and is named."""
        bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        record = {**values, **dict.fromkeys(bad), **({"not_finite": bad} if bad else {}), **self._head}
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._head = {}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _mend(path: Path) -> None:
    """Take away the half line that a killed writer left."""
    with path.open("r+b") as file:
        if not (size := path.stat().st_size):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            whole = content.rfind(b"\n") + 1
        if whole < size:
            _log.info("%s: its last line was torn (%d bytes) and is taken away", path, size - whole)
            file.truncate(whole)


# fmt: off
# A piece of the console's line: the record's key and how it is said; a key that is not there is not said.
_LINE: Final[tuple[tuple[str, Callable[[Any], str]], ...]] = (
    ("loss",               "loss {:.4g}".format),
    ("cross_entropy",      "ce {:.4g}".format),
    ("balance_loss",       "aux {:.2g}".format),
    ("device_balance_loss", lambda x: f"device aux {x:.2g}" if x else ""),
    ("gradient_norm",      "norm {:.2g}".format),
    ("learning_rate",      "lr {:.1e}".format),
    ("tokens_per_second",  lambda x: f"{_short(x)} tok/s"),
    ("mfu",                "mfu {:.0%}".format),
    ("max_over_mean_load", "load {:.1f}×".format),
    ("unused_experts",     "unused {}".format),
    ("overflow_passes",       lambda x: f"overflow passes {x}" if x else ""),
    ("data_wait_share",    lambda x: f"data wait {x:.0%}" if x > 0.01 else ""),
    ("skipped_in_all",     lambda x: f"skipped {x}" if x else ""),
)
# fmt: on


class Console:
    """A line every `log_every` steps through logging; a bar instead where a person watches stderr."""

    def __init__(self, run: Run):
        self._run, self._since, self._bar = run, [], None
        if sys.stderr.isatty():
            self._bar = _Bar(run)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Say it, if it is its turn: speeds are the median since the last line."""
        if (loss := values.get("evaluation/loss")) is not None:
            _log.info("step %d/%d held-out loss %.4g", step, self._run.steps, loss)
            return
        self._since.append(values)
        if self._bar is None and step % self._run.log_every and step not in (1, self._run.steps):
            return
        middle = {
            key: statistics.median(one[key] for one in self._since)
            for key in ("tokens_per_second", "mfu", "data_wait_share")
            if key in values
        }
        said = {**values, **middle}
        text = " ".join(piece for key, say in _LINE if key in said and (piece := say(said[key])))
        if self._bar is None:
            _log.info("step %d/%d %s", step, self._run.steps, text)
        else:
            self._bar.show(step, text)
        self._since = [] if self._bar is None else self._since[-self._run.log_every :]

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """A bar on stderr over a line of figures; what is logged meanwhile appears above it."""

    def __init__(self, run: Run):
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        # The handlers of the log hold the stream of before; rich moves the bar only for what goes through its own.
        stream = sys.stderr
        self._shown = Progress(*columns, console=Terminal(stderr=True), redirect_stdout=False)
        self._task = self._shown.add_task("", total=run.steps, completed=run.resumed_from, figures="")
        self._shown.start()
        handlers = [one for one in logging.getLogger().handlers if isinstance(one, logging.StreamHandler)]
        self._moved = [(one, stream) for one in handlers if one.stream is stream]
        for handler, _ in self._moved:
            handler.setStream(sys.stderr)

    def show(self, step: int, figures: str) -> None:
        self._shown.update(self._task, completed=step, figures=figures)

    def close(self) -> None:
        self._shown.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)


def _short(value: float) -> str:
    """Three digits and a unit: 12.3k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class TensorBoard:
    """Every number under its key, in `tensorboard/`; nothing, and a line that says so, without tensorboardX."""

    def __init__(self, run: Run):
        try:
            from tensorboardX import SummaryWriter
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        except ImportError:
            _log.info("no TensorBoard records: pip install 'dsmoe_jax[tensorboard]'")
            self._writer = None
            return
        self._summary = Summary
        # What an earlier try wrote past the step this one goes on from is hidden. The suffix: a file is named after the
        # second, and a run that is resumed within it would write over the first one's.
        self._writer = SummaryWriter(
            logdir=str(run.folder / "tensorboard"),
            purge_step=run.resumed_from + 1,
            filename_suffix=f".{run.resumed_from}",
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A scalar a number, all in one event: `add_scalar` for each takes 20 ms a step with the 16B's layers."""
        if self._writer is not None and self._writer.file_writer is not None:
            scalars = [self._summary.Value(tag=key, simple_value=value) for key, value in _numbers(values).items()]
            self._writer.file_writer.add_summary(self._summary(value=scalars), step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Weights & Biases, for those who ask for it; a resumed run goes on in its own page."""

    def __init__(self, run: Run):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("the sink 'wandb' needs wandb: pip install 'dsmoe_jax[wandb]'") from None
        page = run.folder / "wandb_id.txt"
        if not page.exists():
            page.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project="dsmoe_jax",
            name=run.folder.name,
            id=page.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run.folder),
            config=run.facts,
        )
        # Steps as a value: W&B's own count never goes back, and a resumed run's does.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A record."""
        self._run.log(_numbers(values))

    def close(self) -> None:
        """Say that the run is over."""
        self._run.finish()


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    return {key: value for key, value in values.items() if not isinstance(value, list)}


SINKS: Final[dict[str, Callable[[Run], Sink]]] = {
    "console": Console,
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
