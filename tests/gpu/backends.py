"""The backends of the routed experts that a GPU is asked for; `grouped` once for each of its kernels.

Start at `EVERY`. A test asks `skip_without` first: a kernel that cannot run here skips with its reason.
"""

import functools
import warnings
from typing import Final

import pytest

from dsmoe_jax.kernels import grouped_matmul, plain
from dsmoe_jax.kernels.expert_ffn import Backend
from dsmoe_jax.kernels.plain import MatmulLegs

KERNELS: Final = ("pallas", "tokamax")
GROUPED: Final = {f"grouped {kernel}": MatmulLegs(kernel, kernel, kernel) for kernel in KERNELS}
SERVING: Final = ("batched", "slots", *GROUPED)  # those that the table gives GPUs, or may
EVERY: Final = (*SERVING, "block_loop", "ragged", "dense")

with warnings.catch_warnings():
    # Else a warning of theirs, an error in this suite, would read as a kernel that cannot be imported.
    warnings.simplefilter("ignore")
    WHY_NOT: Final = {name: grouped_matmul.available(name) for name in KERNELS}


def backend_of(legs: MatmulLegs) -> Backend:
    """`grouped` with these kernels, whatever it would choose itself."""
    forward = functools.partial(plain.forward_by_groups, lambda: legs)
    return Backend(forward, plain.backward_of(forward))


def skip_without(backend: str) -> None:
    """Skip the test if a kernel that one of the legs needs cannot run here."""
    for leg in backend.split(","):
        kernel = leg.removeprefix("grouped ")
        if leg in GROUPED and WHY_NOT[kernel]:
            pytest.skip(f"{kernel}: {WHY_NOT[kernel]}")
