"""A trace of some steps by JAX's profiler: `Tracer`."""

import logging
import re
from pathlib import Path
from typing import Any, Final

import jax

from dsmoe_jax.errors import DSMoEError

PROFILE: Final = "profile"  # in the output directory
_log = logging.getLogger(__name__)


def parse_steps(text: str) -> tuple[int, int]:
    """Return the first and the last step of `FIRST:LAST`.

    Args:
        text: The setting `profile`.

    Raises:
        DSMoEError: It has another form, or the steps do not ascend from 1.
    """
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise DSMoEError(f"profile must be FIRST:LAST with 1 <= FIRST <= LAST, got {text!r}")
    return first, last


class Tracer:
    """Traces the steps of a run in process 0; leaving it ends a trace."""

    def __init__(self, steps: str | None, output_dir: Path, done: int):
        """Trace `steps`, as `parse_steps`, of which `done` are done."""
        self._first, self._last = (0, 0) if steps is None or jax.process_index() else parse_steps(steps)
        self._folder, self._tracing = output_dir / PROFILE, False
        if steps is not None and 0 < self._first <= done:
            _log.warning("profile %s has no effect: resuming from step %d", steps, done)

    def before(self, step: int) -> None:
        """Start before the first traced step."""
        if step == self._first:
            self._folder.mkdir(exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a hundred times as many events
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """Stop when the last traced step has run; `results` are those of the step."""
        if self._tracing and step == self._last:
            jax.block_until_ready(results)
            self._stop(step)

    def _stop(self, step: int | None) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        steps = f"steps {self._first} to {step}" if step else "some steps"
        _log.info("Saved trace of %s: %s", steps, self._folder)

    def __enter__(self) -> "Tracer":
        """Trace nothing yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop a trace that the run did not complete."""
        if self._tracing:
            self._stop(None)
