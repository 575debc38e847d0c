"""Huge pages for training on CPU, where they take a fifth off a step: `use_huge_pages`. No jax: it runs first."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dsmoe_jax.xla_options import HUGE_PAGES, TUNABLES

VARIABLE: Final = "DSMOE_HUGE_PAGES"  # 0: leave the allocator as it is
_VERBS: Final = ("demo", "finetune", "pretrain")
_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS: Final = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def use_huge_pages(argv: Sequence[str]) -> None:
    """Restart this process, once, with huge pages if it is to train on CPU and the system has them.

    The table at the start of a run says so.
    """
    if not argv or argv[0] not in _VERBS or {"-h", "--help"} & set(argv) or os.environ.get(VARIABLE) == "0":
        return
    before = os.environ.get(TUNABLES, "")
    if HUGE_PAGES in before or not _supported() or not _on_cpu():
        return
    tunables = ":".join([*([before] if before else []), f"{HUGE_PAGES}=1"])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {TUNABLES: tunables})


def _supported() -> bool:
    """Return whether glibc has the tunable (2.35 or newer) and the kernel allows huge pages."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        major, minor = map(int, version.split(".")[:2])
        return name == "glibc" and (major, minor) >= (2, 35) and "[never]" not in _SETTING.read_text()
    except (AttributeError, OSError, ValueError):
        return False


def _on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)
