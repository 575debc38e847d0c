"""The conditions under which every test runs: 8 simulated devices, strict JAX, annotations executed."""

import os

# Before jax starts. Two threads of each test process are enough: the suite runs one process a core.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("dsmoe_jax", "beartype.beartype")
