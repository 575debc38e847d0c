"""What a run says of itself: one flat dict a step, to the console, to metrics.jsonl, to TensorBoard, to W&B.

Start at `Recorder`; sinks.py is where its dicts go, `read_records` reads them back.
"""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.info import count_parameters

from .sinks import RECORDS, SINKS, Run, Sink
from .step import Metrics

# fmt: off
# Dense bf16 FLOP/s by a part of jax's `device_kind`; the first row that fits holds. From NVIDIA's data sheets of each
# card, which give twice as much from Hopper on, "with sparsity", and from cloud.google.com/tpu/docs.
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


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of forward and backward, a token: 6 · N + 12 · L · heads · head_dim · (T + 1) / 2.

    N are the activated parameters that are multiplied with: the head but not the embedding's look-up, no norms. This is
    PaLM's count (arXiv 2204.02311, appendix B), but that a causal query meets (T + 1) / 2 keys on average, not T; what
    remat computes again does not count. With T keys it gives 75.9 TFLOP per 4K tokens for the 16B and 586 for the
    145B, where the paper has 74.4 and 585.6 (arXiv 2401.06066, tables 3 and 6).
    """
    counts = count_parameters(config)
    looked_up = 0 if config.tie_word_embeddings else counts.parts["embedding"]
    multiplied = counts.activated - looked_up - counts.parts["norms"]
    width = config.num_attention_heads * config.head_dim
    return 6 * multiplied + 12 * config.num_hidden_layers * width * (sequence_length + 1) / 2


def peak_flops(devices: Sequence[Any]) -> float | None:
    """What all devices can do together, in bf16 FLOP/s; None if one of them is not in the table."""
    peaks = [
        next((peak for kind, peak in PEAK_FLOPS.items() if kind in device.device_kind), None) for device in devices
    ]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


class Recorder:
    """Writes what a run says of itself into `folder` and to the other `sinks`; in one process only.

    `devices` are those of the whole mesh (default: all there are). The load of every expert is recorded at the first
    and the last step and every `heat_every` steps. A run that goes on from a checkpoint says from which step:
    lines of its past beyond that step stay in the file, and `read_records` leaves them out.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: ModelConfig,
        tokens_per_step: int,
        sequence_length: int,
        steps: int,
        sinks: Sequence[str] = ("console", "jsonl", "tensorboard"),
        devices: Sequence[Any] | None = None,
        log_every: int = 10,
        heat_every: int = 50,
        resumed_from: int = 0,
        name: str = "",
    ):
        """Open the sinks; `ValueError` for a name that is none."""
        if unknown := [sink for sink in sinks if sink not in SINKS]:
            raise ValueError(f"sink {unknown[0]!r} is not one of {', '.join(SINKS)}")
        if min(log_every, heat_every) < 1:
            raise ValueError(f"log_every {log_every} and heat_every {heat_every} must be at least 1")
        self._devices = jax.devices() if devices is None else devices
        self._layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
        self._tokens, self._steps, self._heat_every = tokens_per_step, steps, heat_every
        self._flops, self._peak = flops_per_token(config, sequence_length), peak_flops(self._devices)
        self._first = True
        counts = count_parameters(config)
        facts = {
            "name": name,
            "steps": steps,
            "tokens_per_step": tokens_per_step,
            "sequence_length": sequence_length,
            "parameters": counts.total,
            "activated": counts.activated,
            "vocab_size": config.vocab_size,
            "devices": f"{len(self._devices)} × {self._devices[0].device_kind}",
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:  # closes the others if one does not open
            run = Run(folder, facts, steps, log_every, resumed_from)
            self._sinks: list[Sink] = [opening.enter_context(contextlib.closing(SINKS[sink](run))) for sink in sinks]
            self._open = opening.pop_all()

    def record(self, step: int, metrics: Metrics, *, seconds: float, data_wait: float) -> None:
        """Note step number `step`, from 1; `metrics` on the host, `seconds` the whole time that it took."""
        rate = self._tokens / seconds if seconds > 0 else math.nan
        values: dict[str, Any] = {
            "step": step,
            "tokens": step * self._tokens,
            **{name: float(getattr(metrics, name)) for name in ("loss", "cross_entropy", "z_loss")},
            "balance_loss": float(np.sum(metrics.balance)),
            "device_balance_loss": float(np.sum(metrics.device_balance)),
            **{name: float(getattr(metrics, name)) for name in ("gradient_norm", "learning_rate")},
            **{name: int(getattr(metrics, name)) for name in ("skipped", "skipped_in_all", "skipped_in_a_row")},
            "seconds": seconds,
            "tokens_per_second": rate,
            **({} if self._peak is None else {"mfu": rate * self._flops / self._peak}),
            "data_wait_seconds": data_wait,
            "data_wait_share": data_wait / seconds if seconds > 0 else math.nan,
            **_memory(self._devices),
            **_routing(self._layers, metrics, heat=self._first or step % self._heat_every == 0 or step == self._steps),
        }
        self._write(step, values)
        self._first = False

    def evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Note the mean loss of `tokens` held-out tokens after `step` steps."""
        self._write(step, {"step": step, "evaluation/loss": float(loss), "evaluation/tokens": int(tokens)})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        """Let go of everything; harmless twice."""
        self._open.close()

    def __enter__(self) -> "Recorder":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def read_records(folder: str | Path, *, superseded: bool = False) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` in order; what was not finite is None, and named under `not_finite`.

    Steps that a resumed run did again count once, as it did them; `superseded=True` keeps every line. A last line that
    is still being written is left out. `ValueError` for any other line that is no record.
    """
    file, records = Path(folder) / RECORDS, []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                resumed = record.get("resumed_from")
            except (ValueError, AttributeError):
                raise ValueError(f"{file} line {number} is not a record") from None
            if resumed is not None and not superseded:
                records = [one for one in records if one["step"] <= resumed]
            records.append(record)
    return records


# --- what is derived ---


def _routing(layers: Sequence[int], metrics: Metrics, *, heat: bool) -> dict[str, Any]:
    """What the routers did, in all and layer by layer."""
    load = np.asarray(metrics.load)
    if not layers:
        return {}
    imbalance = load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)
    columns = {
        "balance_loss": np.asarray(metrics.balance, float),
        "device_balance_loss": np.asarray(metrics.device_balance, float),
        "max_over_mean_load": imbalance.astype(float),
        "entropy": np.asarray(metrics.entropy, float),  # nats
        "unused_experts": (load == 0).sum(axis=1),
        "overflow_passes": np.asarray(metrics.overflow_passes).astype(int),
        **({"load": load.astype(int)} if heat else {}),  # tokens, by expert
    }
    totals = {
        "max_over_mean_load": float(imbalance.max()),  # of the worst layer
        "unused_experts": int(columns["unused_experts"].sum()),
        "overflow_passes": int(columns["overflow_passes"].sum()),
    }
    by_layer = {
        f"moe/{layer}/{name}": column[n].tolist() for n, layer in enumerate(layers) for name, column in columns.items()
    }
    return totals | by_layer


def _memory(devices: Sequence[Any]) -> dict[str, int]:
    """The most bytes that were ever in use: on the fullest device of this process, else by this process."""
    ours = [device for device in devices if device.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for device in ours if (stats := device.memory_stats())]
    if peaks:
        return {"device_memory_bytes": max(peaks)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
