"""Tests on an NVIDIA GPU; elsewhere every test of this folder is skipped with the reason.

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu

Results are compared with the CPU and with golden data, so both platforms are needed. `DSMOE_GPU_TESTS_ON=cpu` runs the
tests without a GPU, to check the tests themselves.

Matmuls are in fp32 ("highest", see `tests/conftest.py`) with fp32 tolerances; NVIDIA's default is TF32, with 10 bits of
mantissa, which `test_golden.py` measures.
"""

import functools
import os
from pathlib import Path
from typing import Any, Final

import jax
import pytest

from dsmoe_jax.kernels import tuning
from dsmoe_jax.kernels.expert_ffn import BACKENDS, VARIABLE
from tests.gpu.backends import GROUPED, backend_of

PLATFORM: Final = os.environ.get("DSMOE_GPU_TESTS_ON", "gpu")
# Since jax 0.11, whenever one of the pallas kernels is lowered; see `dsmoe_jax/kernels/pallas_matmul.py`.
_DEPRECATED: Final = "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings(_DEPRECATED))


def pytest_runtest_setup() -> None:
    """Skip here rather than by marks: one line in pytest's summary."""
    if reason := _why_not():
        pytest.skip(reason)


@functools.cache
def _why_not() -> str | None:
    if jax.default_backend() != PLATFORM:
        return f"needs a {PLATFORM.upper()}, jax computes on {jax.default_backend()} (JAX_PLATFORMS=cuda,cpu on a GPU)"
    try:
        jax.devices("cpu")
    except RuntimeError:
        return "needs the CPU platform too: JAX_PLATFORMS=cuda,cpu"
    return None


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add `grouped` per kernel; ignore the environment and tuning."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "legs", lambda *place: {})
    for name, legs in GROUPED.items():
        monkeypatch.setitem(BACKENDS, name, backend_of(legs))


@pytest.fixture(autouse=True)
def in_fp32():
    """All tests of this folder depend on it."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def cpu() -> Any:
    return jax.devices("cpu")[0]
