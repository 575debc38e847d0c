"""What XLA is asked for on GPUs, each with its reason. What the user's environment says goes before it.

And what it is not to say: `quiet_cache_reads`.
"""

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


# XLA compiles for CPUs with AVX-512 under two tuning preferences, and when it loads the program it does not find them
# among the features of the machine (openxla/xla#44565, jax 0.10; gone in 0.12). Both are harmless.
_HARMLESS: Final = re.compile(rb"cpu_aot_loader\.cc:\d+\] .*Target machine feature \+prefer-no-(gather|scatter) ")
_ONE_AT_A_TIME: Final = threading.Lock()


@contextlib.contextmanager
def quiet_cache_reads() -> Iterator[None]:
    """Remove from stderr what XLA wrongly reports of every program that it loads from the compilation cache on CPU.

    `TF_CPP_MIN_LOG_LEVEL` is no way to do it: it is read when jaxlib is imported, and hides every other error of XLA.
    """
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
def _filtered_stderr(unwanted: re.Pattern[bytes]) -> Iterator[None]:
    """Drop the lines that C++ code writes to stderr meanwhile and that match; all others come at the end."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        try:
            written = stack.enter_context(tempfile.TemporaryFile())
            stderr = os.dup(2)
        except OSError:  # stderr is closed, or there is no room for a temporary file: then it is not filtered
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
                os.write(2, b"".join(line for line in written if not unwanted.search(line)))
