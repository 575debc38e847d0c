"""The conditions under which every test runs: 8 simulated devices, strict JAX, annotations executed."""

import os

# Before jax starts. Two threads of each test process are enough: the suite runs one process a core.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where arrays are, shapes are checked; the other rooms check what users give them themselves, and are tested for it.
ROOMS_OF_ARRAYS = ("cache", "kernels", "layers", "model", "train")
jaxtyping.install_import_hook([f"dsmoe_jax.{room}" for room in ROOMS_OF_ARRAYS], "beartype.beartype")
