"""What XLA is asked for on GPUs, each with its reason. What the user's environment says goes before it."""

import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # the command line starts without jax
    from jax.sharding import Mesh

_COMBINED: Final = 128 * 2**20  # bytes

# For programs that several GPUs run together. Compiled for 8 H100s, three layers of the 16B's train step then gather in
# 15 operations instead of 35 and scatter gradients in 6 instead of 9; what that saves was not timed yet.
ON_SEVERAL_GPUS: Final[dict[str, bool | int]] = {
    # The gathers of the next layer's weights run while this layer computes.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # The weights of attention, router and shared experts travel together: small messages do not fill a link. Those of
    # the routed experts are larger than this each and go alone.
    "xla_gpu_all_gather_combine_threshold_bytes": _COMBINED,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": _COMBINED,
    "xla_gpu_all_reduce_combine_threshold_bytes": _COMBINED,
}
# Read when jax starts its GPU. Its default leaves a quarter of the memory to others; here nobody else is on the card.
_ENVIRONMENT: Final = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def compiler_options(mesh: "Mesh | None") -> dict[str, Any] | None:
    """What `jax.jit` is given for a program on this mesh; None: nothing beyond XLA's own defaults."""
    if mesh is None or mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return None
    named = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in ON_SEVERAL_GPUS.items() if name not in named}


def set_environment() -> None:
    """Before jax starts its devices: what it reads from the environment, where nothing is said there yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
