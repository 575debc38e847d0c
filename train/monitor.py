"""Records each step's metrics while the next step runs: `Monitor`."""

import time
from typing import Final

import jax

from dsmoe_jax.errors import DSMoEError

from .config import RunConfig
from .failures import intact
from .metrics import Recorder
from .step import Metrics

_ZERO_LOSS: Final = 1e-7  # nats: the resolution of an fp32 softmax


class Monitor:
    """Reads metrics without blocking the devices, and stops runs that cannot recover."""

    def __init__(self, recorder: Recorder | None, config: RunConfig):
        self._recorder, self._config = recorder, config
        self._pending: tuple[int, Metrics, float] | None = None
        self._zero_losses = 0  # in a row
        self._start = time.perf_counter()

    def add(self, step: int, metrics: Metrics, data_loading_seconds: float) -> None:
        """Queue the metrics of a dispatched step, and record those of the previous one."""
        self.flush()
        self._pending = (step, metrics, data_loading_seconds)

    def restart_timer(self) -> None:
        """Exclude evaluation and saving from the next step's time."""
        self._start = time.perf_counter()

    def flush(self) -> None:
        """Record the pending metrics; raise if the run cannot recover."""
        if self._pending is None:
            return
        (step, unread, loading), self._pending = self._pending, None
        metrics = Metrics(*jax.device_get(unread))
        now = time.perf_counter()
        if self._recorder is not None:
            self._recorder.record(step, metrics, seconds=now - self._start, data_loading_seconds=loading)
        self._start = now
        if (skips := int(metrics.consecutive_skips)) > self._config.max_consecutive_skips:
            values = f"loss {float(metrics.loss):.4g}, gradient norm {float(metrics.grad_norm):.4g}"
            kept = intact(self._config.output_dir)
            raise DSMoEError(f"{skips} consecutive updates skipped at step {step}: {values}{kept}")
        self._zero_losses = self._zero_losses + 1 if metrics.cross_entropy < _ZERO_LOSS else 0
        if self._zero_losses > self._config.max_consecutive_skips:
            raise DSMoEError(
                f"loss 0 for {self._zero_losses} steps at step {step}: label leakage or memorization"
                + intact(self._config.output_dir, "are from before")
            )
