"""Metrics recorded by training runs, and compiled steps that equal runs of one process share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.train import loop, step
from dsmoe_jax.train.metrics import read_records
from dsmoe_jax.train.optimizer import make_optimizer as _make_optimizer
from dsmoe_jax.train.step import Trainable

_steps: dict[Any, Callable[..., Any]] = {}
make_optimizer = functools.lru_cache(_make_optimizer)


def losses(run: Path, name: str = "loss") -> dict[int, float]:
    """A metric by step; `loss` by default."""
    return {record["step"]: record[name] for record in read_records(run) if name in record}


def share_steps(patch: pytest.MonkeyPatch) -> None:
    """Let equal runs compile their training and evaluation steps once."""
    for function in (make_optimizer, make_step, make_eval_step):
        patch.setattr(loop, function.__name__, function)


def make_step(*arguments: Any, trainable: Trainable, **options: Any) -> Callable[..., Any]:
    """Return `step.make_step` of these arguments, the same object for equal ones."""
    key = ("train", arguments, tuple(options.items()), _key(trainable))
    return _steps.get(key) or _steps.setdefault(key, step.make_step(*arguments, trainable=trainable, **options))


def make_eval_step(*arguments: Any) -> Callable[..., Any]:
    """Return `step.make_eval_step` of these arguments, the same object for equal ones."""
    *others, trainable = arguments
    key = ("eval", *others, _key(trainable))
    return _steps.get(key) or _steps.setdefault(key, step.make_eval_step(*arguments))


def _key(trainable: Trainable) -> tuple[Any, ...]:
    # A function of each run: what it computes is in its code and the values it closes over.
    merge = inspect.unwrap(trainable.merge_params)
    return merge.__code__, repr(inspect.getclosurevars(merge).nonlocals), repr((trainable.specs, trainable.dropout))
