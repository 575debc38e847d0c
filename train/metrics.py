"""Training metrics, one flat dict per step: `Recorder` and `read_records`."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.info import count_parameters

from .goodput import Goodput
from .old_names import new_metric
from .step import Metrics
from .trackers import RECORDS, TRACKERS, Run, Tracker

# fmt: off
# Dense bf16 FLOP/s by a part of jax's `device_kind`; the first match counts. From NVIDIA's data sheets
# (half of the figures "with sparsity") and cloud.google.com/tpu/docs.
PEAK_FLOPS: Final[dict[str, float | None]] = {
    "MIG":         None,  # a slice of a card
    "GB200":       2.5e15,
    "B200":        2.25e15,
    "H200 NVL":    835e12,
    "H200":        989e12,
    "H100 PCIe":   756e12,
    "H100 NVL":    835e12,
    "H100":        989e12,
    "H800":        989e12,
    "A100":        312e12,
    "A800":        312e12,
    "TPU v4":      275e12,
    "TPU v5 lite": 197e12,
    "TPU v5":      459e12,  # v5p
    "TPU v6 lite": 918e12,
}
# fmt: on
_LOSSES: Final = ("loss", "cross_entropy", "z_loss", "balance_loss", "device_balance_loss")  # summed over layers


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Compute model FLOPs per token: 6 · N + 12 · L · heads · head_dim · (T + 1) / 2.

    N counts the activated parameters without embedding lookup and norms. As in PaLM (arXiv 2204.02311, appendix B), but
    with (T + 1) / 2 keys per causal query instead of T; T would give 75.9 TFLOP per 4K tokens for the 16B and 586 for
    the 145B, where the paper has 74.4 and 585.6 (arXiv 2401.06066, tables 3 and 6).
    """
    counts = count_parameters(config)
    looked_up = 0 if config.tie_word_embeddings else counts.parts["embedding"]
    multiplied = counts.activated - looked_up - counts.parts["norms"]
    width = config.num_attention_heads * config.head_dim
    return 6 * multiplied + 12 * config.num_hidden_layers * width * (sequence_length + 1) / 2


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Return the devices' total peak bf16 FLOP/s; None if one is unknown."""
    total = 0.0
    for device in devices:
        peak = next((peak for kind, peak in PEAK_FLOPS.items() if kind in device.device_kind), None)
        if peak is None:
            return None
        total += peak
    return total or None


class Recorder(contextlib.AbstractContextManager):
    """Writes the metrics of a run to its trackers, in one process only; `read_records` reads them."""

    def __init__(
        self,
        folder: str | Path,
        *,
        config: ModelConfig,
        tokens_per_step: int,
        sequence_length: int,
        steps: int,
        trackers: Sequence[str] = ("console", "jsonl", "tensorboard"),
        devices: Sequence[Any] | None = None,
        log_interval: int = 10,
        expert_load_interval: int = 50,
        resumed_from: int = 0,
        name: str = "",
        goodput: Goodput | None = None,
        epochs: Callable[[int], Mapping[str, float]] = lambda step: {},
    ):
        """Open the trackers."""
        self._epochs = epochs
        self.goodput = goodput or Goodput(time.time())
        if unknown := [tracker for tracker in trackers if tracker not in TRACKERS]:
            raise DSMoEError(f"trackers must be of {', '.join(TRACKERS)}, got {unknown[0]!r}")
        self._devices = jax.devices() if devices is None else devices
        self._layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        self._tokens, self._steps, self._load_interval = tokens_per_step, steps, expert_load_interval
        self._flops, self._peak = flops_per_token(config, sequence_length), peak_flops(self._devices)
        self._first = True
        counts = count_parameters(config)
        info = {"name": name, "steps": steps, "tokens_per_step": tokens_per_step, "sequence_length": sequence_length}
        info |= {"parameters": counts.total, "activated": counts.activated, "vocab_size": config.vocab_size}
        info |= {"started": self.goodput.started}
        info |= {"devices": f"{len(self._devices)} × {self._devices[0].device_kind}"}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:  # closes the others if one does not open
            run = Run(folder, info, steps, log_interval, resumed_from)
            self._trackers: list[Tracker] = [
                opening.enter_context(contextlib.closing(TRACKERS[tracker](run))) for tracker in trackers
            ]
            self._open = opening.pop_all()

    def record(self, step: int, metrics: Metrics, *, seconds: float, data_loading_seconds: float) -> None:
        """Record a training step."""
        rate = self._tokens / seconds if seconds > 0 else math.nan
        waits = self.goodput.take()
        self.goodput.add_step(seconds, data_loading_seconds, waits.get("compile_seconds", 0.0))
        with_load = self._first or step % self._load_interval == 0 or step == self._steps
        floats = {name: float(np.sum(getattr(metrics, name))) for name in (*_LOSSES, "grad_norm", "learning_rate")}
        values: dict[str, Any] = {
            "step": step,
            "tokens": step * self._tokens,
            **_epochs(self._epochs(step)),
            **floats,
            **{name: int(getattr(metrics, name)) for name in ("skipped", "total_skips", "consecutive_skips")},
            "step_time_seconds": seconds,
            "tokens_per_second": rate,
            **({} if self._peak is None else {"mfu": rate * self._flops / self._peak}),
            "data_loading_seconds": data_loading_seconds,
            "data_loading_share": data_loading_seconds / seconds if seconds > 0 else math.nan,
            **waits,
            **_memory(self._devices),
            **_routing(self._layers, metrics, with_load=with_load),
        }
        self._write(step, values)
        self._first = False

    def record_eval(self, step: int, loss: float, tokens: int, by_source: Mapping[str, float] = {}) -> None:
        """Record the mean validation loss over `tokens` tokens after `step` steps, and that of each source."""
        values = {"eval/loss": float(loss), "eval/tokens": int(tokens)}
        values |= {f"eval/{name}/loss": value for name, value in by_source.items()}
        self._write(step, {"step": step, **values, **self.goodput.fractions()})

    def record_tasks(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of tasks after `step` steps, as `eval/TASK/METRIC`."""
        self._write(step, {"step": step, **{f"eval/{name}": score for name, score in scores.items()}})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        """Close the trackers; idempotent."""
        self._open.close()

    def __exit__(self, *error: object) -> None:
        """Close the trackers."""
        self.close()


def read_records(folder: str | Path, *, superseded: bool = False) -> list[dict[str, Any]]:
    """Read the complete lines of `metrics.jsonl`, with today's names for metrics of earlier versions.

    Records that a resumed run repeated are omitted unless `superseded`; non-finite values are None and in `not_finite`.
    """
    file, records = Path(folder) / RECORDS, []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = {new_metric(name): value for name, value in json.loads(line).items()}
                if "not_finite" in record:
                    record["not_finite"] = [new_metric(name) for name in record["not_finite"]]
                resumed = record.get("resumed_from")
            except (ValueError, AttributeError):
                raise DSMoEError(f"{file}: line {number} is not a record") from None
            if resumed is not None and not superseded:
                records = [one for one in records if one["step"] <= resumed]
            records.append(record)
    return records


# --- derived metrics ---


def _epochs(read: Mapping[str, float]) -> dict[str, float]:
    """Return the epochs read of each source as `epoch/NAME`, of one source as `epoch`."""
    return {f"epoch/{name}" if len(read) > 1 else "epoch": epochs for name, epochs in read.items()}


def _routing(layers: Sequence[int], metrics: Metrics, *, with_load: bool) -> dict[str, Any]:
    """Return routing metrics, in total and per layer."""
    load = np.asarray(metrics.expert_load)
    if not layers:
        return {}
    imbalance = load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)
    columns = {
        "balance_loss": np.asarray(metrics.balance_loss, float),
        "device_balance_loss": np.asarray(metrics.device_balance_loss, float),
        "load_imbalance": imbalance.astype(float),
        "entropy": np.asarray(metrics.entropy, float),  # nats
        "unused_experts": (load == 0).sum(axis=1),
        "overflow_passes": np.asarray(metrics.overflow_passes).astype(int),
        **({"expert_load": load.astype(int)} if with_load else {}),  # tokens per expert
    }
    totals = {
        "load_imbalance": float(imbalance.max()),  # of the worst layer
        "unused_experts": int(columns["unused_experts"].sum()),
        "overflow_passes": int(columns["overflow_passes"].sum()),
    }
    by_layer = {
        f"moe/{layer}/{name}": column[n].tolist() for n, layer in enumerate(layers) for name, column in columns.items()
    }
    return totals | by_layer


def _memory(devices: Sequence[Any]) -> dict[str, int]:
    """Return peak memory of the fullest local device, else of this process."""
    ours = [device for device in devices if device.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for device in ours if (stats := device.memory_stats())]
    if peaks:
        return {"device_memory_bytes": max(peaks)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
