"""Peak rates of this GPU: copy, read, bf16 matmul. The floors of the report derive from them."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from tests.benchmarks.gpu import timing
from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.gpu.sizes import Sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    """Yield the three rates."""
    count, side = sizes.copied_bytes // 4, sizes.matmul_side

    def copy() -> dict:
        array = timing.noise(timing.shape(jnp.float32, count))
        # Negate, as a program that returns its operand copies nothing.
        return timing.timed(lambda x: -x, array, seconds=sizes.turn_seconds, bytes=2 * array.nbytes)

    def read() -> dict:
        array = timing.noise(timing.shape(jnp.float32, count))
        return timing.timed(lambda x: x.sum(), array, seconds=sizes.turn_seconds, bytes=array.nbytes)

    def matmul() -> dict:
        a, b = timing.noise([timing.shape(jnp.bfloat16, side, side)] * 2)
        return timing.timed(jax.lax.dot, a, b, seconds=sizes.turn_seconds, flops=2 * side**3)

    yield Case("ceilings.copy", f"copy {sizes.copied_bytes / 2**20:.0f} MiB, read and written", copy)
    yield Case("ceilings.read", f"read {sizes.copied_bytes / 2**20:.0f} MiB", read)
    yield Case("ceilings.matmul", f"bf16 matmul of {side} x {side} matrices", matmul)
