"""GPUs that are not present, to compile for: `devices`.

Needs jax's CUDA plugin (`pip install -e '.[gpu]'`), but no GPU and no driver. Shows memory, kernels and whether they
compile, but no timings: matmuls are not autotuned, and cuDNN plans are not built.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import jax
from jax.experimental import topologies

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.plan.cards import CARDS

_GPUS_A_HOST: Final = 8


class Description(NamedTuple):
    """Properties of a card, from OpenXLA's specs (xla/backends/gpu/target_config/specs)."""

    name: str
    l2: int  # bytes
    capability: int
    cores: int
    fpus: int  # per SM
    shared: int  # bytes of shared memory per SM
    shared_optin: int  # bytes of shared memory per block
    clock: float  # GHz


_A100: Final = {"capability": 8, "cores": 108, "fpus": 64, "shared": 167936, "shared_optin": 166912, "clock": 1.41}
_HOPPER: Final = {"capability": 9, "cores": 132, "fpus": 128, "shared": 233472, "shared_optin": 232448, "clock": 1.98}
# By the names of `cards.CARDS`, which have memory and bandwidth.
DESCRIPTIONS: Final[dict[str, Description]] = {
    "a100_40gb": Description("NVIDIA A100-SXM4-40GB", 41_943_040, **_A100),
    "a100_80gb": Description("NVIDIA A100-SXM4-80GB", 41_943_040, **_A100),
    "h100": Description("NVIDIA H100 80GB HBM3", 52_428_800, **_HOPPER),
    "h200": Description("NVIDIA H200 141GB HBM3e", 52_428_800, **_HOPPER),
}


def devices(card: str, count: int = 1) -> list[Any]:
    """Return `count` abstract GPUs, 8 per host; raise if jax's CUDA plugin is not installed."""
    check_choice("device to compile for", card, DESCRIPTIONS)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to query
    hosts = -(-count // _GPUS_A_HOST)
    shape = f"1x{hosts}x{count // hosts}"
    try:
        found = topologies.get_topology_desc(
            DESCRIPTIONS[card].name, platform="cuda", target_config=_config(card), topology=shape
        )
    except (RuntimeError, NotImplementedError) as error:
        raise DSMoEError(
            f"jax cannot compile for {card}: {str(error).splitlines()[0]} (pip install -e '.[gpu]')"
        ) from error
    return list(found.devices)


@contextlib.contextmanager
def chosen_as_on_gpu() -> Iterator[None]:
    """Report "gpu" as the default backend, by which kernels and layouts are chosen."""
    kept = jax.default_backend
    jax.default_backend = lambda: "gpu"
    try:
        yield
    finally:
        jax.default_backend = kept


def _config(name: str) -> str:
    """Return XLA's `GpuTargetConfigProto` as text."""
    card, figures = DESCRIPTIONS[name], CARDS[name]
    extension = "ACCELERATED_FEATURES" if card.capability >= 9 else "NONE"
    return f"""
        platform_name: "CUDA"
        device_description_str: "{card.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {card.capability} feature_extension: {extension} }}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_core: {card.shared}
          shared_memory_per_block_optin: {card.shared_optin}
          core_count: {card.cores} fpus_per_core: {card.fpus} clock_rate_ghz: {card.clock} l2_cache_size: {card.l2}
          device_memory_size: {figures.memory} memory_bandwidth: {int(figures.bandwidth)}
        }}"""
