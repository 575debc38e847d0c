"""The conditions under which every test runs: 8 simulated devices, strict JAX, annotations executed."""

import os

# Before jax starts. Two threads of each test process are enough: the suite runs one process a core.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from collections.abc import Iterator

import jax
import jaxtyping
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where arrays are, shapes are checked; the other rooms check what users give them themselves, and are tested for it.
ROOMS_OF_ARRAYS = ("cache", "kernels", "layers", "model", "train")
jaxtyping.install_import_hook([f"dsmoe_jax.{room}" for room in ROOMS_OF_ARRAYS], "beartype.beartype")

# These compile dozens of small programs once each, and most of their time is XLA's optimiser. Golden cases, kernels,
# generation and the rest run what users run.
LIGHTLY_OPTIMISED = ("tests.test_layers", "tests.test_model")


@pytest.fixture(autouse=True)
def optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spare XLA's optimiser where only the formula is under test."""
    jax.config.update("jax_disable_most_optimizations", request.module.__name__ in LIGHTLY_OPTIMISED)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
