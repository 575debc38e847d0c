"""Failures of a running training: memory (`memory_errors`) and values that are not finite (`check_finite`)."""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array
from dsmoe_jax.errors import DSMoEError

from .resume import CHECKPOINTS

_WAYS_OUT: Final = (
    "decrease --data.batch-size or --data.sequence-length, increase --step.gradient-accumulation-steps, or set "
    "--step.remat full"
)
_SIZE: Final = re.compile(r"allocat(?:e|ing) (\d[\d.]* ?(?:bytes|[KMGT]i?B))\b")


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `DSMoEError` with the bytes and the settings that need less, if a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = _SIZE.search(str(error))
        allocation = f" allocating {size[1]}" if size else ""
        raise DSMoEError(f"out of memory{allocation}: {_WAYS_OUT}") from None


@jax.jit
def _all_finite(params: Mapping[str, Array]) -> Array:
    return jnp.stack([jnp.isfinite(value).all() for value in params.values()]).all()


def check_finite(step: int, params: Mapping[str, Array], output_dir: str | Path, **losses: float | None) -> None:
    """Raise `DSMoEError` if the trained parameters or one of the losses are not finite; collective."""
    problems = [f"{name.replace('_', ' ')} {value}" for name, value in losses.items() if not math.isfinite(value or 0)]
    if not bool(_all_finite(dict(params))):
        problems.append("parameters with NaN or infinity")
    if problems:
        remedy = "decrease --optimizer.learning-rate"
        raise DSMoEError(f"training diverged at step {step}: {', '.join(problems)}{intact(output_dir)}; {remedy}")


def intact(output_dir: str | Path, note: str = "are intact") -> str:
    """Return a note on the checkpoints for the message of an error; empty if there are none."""
    folder = Path(output_dir) / CHECKPOINTS
    return f"; the checkpoints in {folder} {note}" if any(folder.glob("step-*")) else ""
