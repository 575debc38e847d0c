"""The expert backends tested on a GPU; `grouped` once per kernel.

Start at `EVERY`. Tests call `skip_without` first, which skips a kernel that cannot run here with its reason.
"""

import functools
import warnings
from typing import Final

import pytest

from dsmoe_jax.kernels import grouped_matmul, plain
from dsmoe_jax.kernels.expert_ffn import Backend, differentiated
from dsmoe_jax.kernels.tuning import Legs

KERNELS: Final = ("pallas", "tokamax")
GROUPED: Final = {f"grouped {kernel}": Legs(kernel, kernel, kernel) for kernel in KERNELS}
SERVING: Final = ("batched", *GROUPED)  # the default on GPUs, and what tuning may choose
EVERY: Final = (*SERVING, "block_loop", "ragged", "dense")

with warnings.catch_warnings():
    # Warnings are errors in this suite and would look like failed imports.
    warnings.simplefilter("ignore")
    WHY_NOT: Final = {name: grouped_matmul.available(name) for name in KERNELS}


def backend_of(legs: Legs) -> Backend:
    """`grouped` with these kernels."""
    return differentiated(functools.partial(plain.forward_by_groups, lambda: legs))


def skip_without(backend: str) -> None:
    """Skip the test if a kernel of one of the legs cannot run here."""
    for leg in backend.split(","):
        kernel = leg.removeprefix("grouped ")
        if leg in GROUPED and WHY_NOT[kernel]:
            pytest.skip(f"{kernel}: {WHY_NOT[kernel]}")
