"""How the harness and its libraries are imported and run: `check_installed`, `quiet`, `allow_code`."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Final
from unittest import mock

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import log_level

_LOGGERS: Final = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "evaluate", "fsspec", "urllib3")
_ENVIRONMENT: Final = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_MULTIPROC": "1",  # the harness's bootstrap forks, which deadlocks under XLA's threads
}


def set_environment() -> None:
    """Turn off progress bars and forks of the libraries, before they are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check_installed() -> None:
    """Raise `DSMoEError` if `lm_eval` is not installed."""
    set_environment()
    try:
        import lm_eval.tasks  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DSMoEError(f"evaluation needs lm_eval ({error}): pip install 'dsmoe_jax[eval]'") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop log lines of the libraries below errors within the context."""
    with contextlib.ExitStack() as stack:
        for name in _LOGGERS:
            stack.enter_context(log_level(name, logging.ERROR))
        yield


@contextlib.contextmanager
def allow_code(allowed: bool) -> Iterator[None]:
    """Allow the metric that runs generated code within the context."""
    with mock.patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"} if allowed else {}):
        yield
