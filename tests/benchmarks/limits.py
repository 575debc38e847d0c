"""Memory bandwidth and matmul rate of this machine. Start at `actions`; `Reader` is the floor of a decode step.

Interleaved with the contenders: on a shared machine bandwidth varies by 2× within minutes.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array
from tests.benchmarks.children import Actions
from tests.benchmarks.timing import seconds, spread

_FLOATS = 64 * 2**20  # 256 MiB: larger than any cache
_SIDE = 2048  # of the square matrices: large enough for the full rate
_REPEATS = 5


def actions(task: str, folder: Path) -> Actions:
    """Measure bytes and operations per second; independent of the task."""
    array, matrix = jnp.ones(_FLOATS, jnp.float32), jnp.ones((_SIDE, _SIDE), jnp.float32)
    whole, product = Reader([np.asarray(array)]), jax.jit(jnp.matmul)
    source, target = (np.ones(_FLOATS // 2, np.float32) for _ in range(2))
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "read": (whole.bytes, whole.read),
        "copy": (2 * source.nbytes, lambda: _copy(source, target)),  # each byte is read and written
        "matmul": (2 * _SIDE**3, lambda: product(matrix, matrix).block_until_ready()),
    }

    def run() -> dict[str, float]:
        return {
            name: amount / spread([seconds(do) for _ in range(_REPEATS)]).median for name, (amount, do) in work.items()
        }

    return {"run": run}


class Reader:
    """Reads arrays once at memory bandwidth, on all cores, without copies."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.bytes = sum(array.nbytes for array in arrays)
        # Aliases. A loop of dynamic slices over the stacked experts would read on one core only.
        self._arrays = [jax.device_put(array) for array in arrays]
        self._sum = jax.jit(_total)

    def read(self) -> Array:
        """Return the sum of all arrays, synchronously."""
        return self._sum(self._arrays).block_until_ready()


def _total(arrays: Sequence[Array]) -> Array:
    return jnp.stack([array.sum() for array in arrays]).sum()


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy with two threads: one does not saturate the memory bandwidth."""
    halves = zip(np.split(target, 2), np.split(source, 2), strict=True)
    threads = [threading.Thread(target=np.copyto, args=pair) for pair in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
