"""Options of XLA and malloc, which the user's environment overrides, and a filter for false XLA warnings."""

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # the command line starts without jax
    from jax.sharding import Mesh

TUNABLES: Final = "GLIBC_TUNABLES"
HUGE_PAGES: Final = "glibc.malloc.hugetlb"  # "=1": large arrays in huge pages; read once, when a process starts
_COMBINED: Final = 128 * 2**20  # bytes

# Compiled for 8 H100s, three layers of the 16B's train step have 15 all-gathers instead of 35 and 6 reduce-scatters
# instead of 9 with these; the speedup has not been measured.
ON_SEVERAL_GPUS: Final[dict[str, bool | int]] = {
    # Overlaps the all-gather of the next layer's weights with this layer.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Combines the weights of attention, router and shared experts: small messages do not saturate a link. Routed
    # experts are larger and stay separate.
    "xla_gpu_all_gather_combine_threshold_bytes": _COMBINED,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": _COMBINED,
    "xla_gpu_all_reduce_combine_threshold_bytes": _COMBINED,
}


def compiler_options(mesh: "Mesh | None") -> dict[str, Any] | None:
    """Return the `jax.jit` compiler options for a program on this mesh; None for XLA's defaults."""
    if mesh is None or mesh.size == 1 or mesh.devices.flat[0].platform != "gpu":
        return None
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in ON_SEVERAL_GPUS.items() if name not in flags}


MEMORY_FRACTION: Final = 0.92  # of a GPU's memory, for jax


def set_environment() -> None:
    """Let jax use 92% of a GPU's memory (default 75%), unless set; call before jax initializes devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))


# On CPUs with AVX-512, XLA compiles with two tuning preferences and warns that the machine lacks them when it loads the
# program (openxla/xla#44565, jax 0.10; fixed in 0.12).
_HARMLESS: Final = re.compile(rb"cpu_aot_loader\.cc:\d+\] .*Target machine feature \+prefer-no-(gather|scatter) ")
_STDERR_LOCK: Final = threading.Lock()


@contextlib.contextmanager
def quiet_cache_reads() -> Iterator[None]:
    """Filter false XLA warnings about cached CPU programs; `TF_CPP_MIN_LOG_LEVEL` would hide errors as well."""
    import jax

    if jax.__version_info__ >= (0, 12):
        yield
        return
    from jax._src import compilation_cache

    read = compilation_cache.get_executable_and_time

    def quiet_read(*arguments: Any, **options: Any) -> Any:
        with _filtered_stderr(_HARMLESS):
            return read(*arguments, **options)

    compilation_cache.get_executable_and_time = quiet_read
    try:
        yield
    finally:
        compilation_cache.get_executable_and_time = read


@contextlib.contextmanager
def _filtered_stderr(pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Drop matching lines written to stderr, by C++ code too; print the others on exit."""
    with _STDERR_LOCK, contextlib.ExitStack() as stack:
        try:
            written = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
        except OSError:  # stderr is closed or the disk is full: do not filter
            yield
            return
        stack.callback(os.close, stderr)
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            written.seek(0)
            with contextlib.suppress(OSError):
                os.write(2, b"".join(line for line in written if not pattern.search(line)))
