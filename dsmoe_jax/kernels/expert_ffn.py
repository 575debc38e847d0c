"""The routed experts on sorted rows: SwiGLU of every expert on its own rows, as one operation.

Start at `expert_ffn`; `BACKENDS` holds the formulations, all of one signature and one conformance suite.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS
from dsmoe_jax.kernels.batched import batched
from dsmoe_jax.kernels.block_loop import block_loop


@jax.named_scope("expert_ffn")
def expert_ffn(
    rows: Float[Array, "R D"],
    gate: Float[Array, "E F D"],
    up: Float[Array, "E F D"],
    down: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Float[Array, "R D"]:
    """down_e(act(gate_e x) · up_e x) for each row x, where the first `group_sizes[0]` rows are expert 0's, and so on.

    Weights lie as PyTorch keeps them, [out, in]. Rows beyond the sum of `group_sizes` give zeros. Differentiable
    in rows and weights. `backend` is one of `BACKENDS`, by default what `default_backend` says for this device.
    Raises `ValueError` for a backend that does not exist.
    """
    backend = backend or default_backend(jax.default_backend(), rows.shape[0], gate.shape[0])
    if backend not in BACKENDS:
        raise ValueError(f"expert_ffn backend {backend!r} does not exist, only {', '.join(BACKENDS)}")
    return BACKENDS[backend](*_equally_varying(rows, gate, up, down, group_sizes), activation)


def _equally_varying(*operands: Array) -> tuple[Array, ...]:
    """Inside a shard_map, every operand varies over all axes that one does.

    A loop's carry must not change its type, and what turns a weight that all devices share into one that varies is
    what sums its gradient over them.
    """
    varying = [jax.typeof(operand).mat.varying for operand in operands]
    axes = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(operand, tuple(axes - own), to="varying") if axes - own else operand
        for operand, own in zip(operands, varying, strict=True)
    )


def default_backend(platform: str, rows: int, experts: int) -> str:
    """The backend for a kind of device: "cpu", "gpu" or "tpu".

    On GPU the block loop asks the host at every turn, batched matmuls read every expert: the first costs less while
    there are fewer rows than experts. (Reasoned, not measured on a GPU yet.)
    """
    few = rows < experts
    return {"cpu": "block_loop", "gpu": "block_loop" if few else "batched", "tpu": "ragged"}.get(platform, "dense")


def ragged(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str) -> Array:
    """`jax.lax.ragged_dot`: fast on TPU, a masked dense matmul (E× the work) on CPU and NVIDIA."""
    act = ACTIVATION_FUNCTIONS[activation]

    def matmul(x: Array, weight: Array) -> Array:
        return jax.lax.ragged_dot(x, weight.swapaxes(1, 2), group_sizes)

    return matmul(act(matmul(rows, gate)) * matmul(rows, up), down)


def dense(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array, activation: str) -> Array:
    """Every expert on every row, then the right one kept: the oracle."""
    act = ACTIVATION_FUNCTIONS[activation]
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows.shape[0])
    mine = (row[:, None] >= (ends - group_sizes)[None, :]) & (row[:, None] < ends[None, :])
    hidden = act(jnp.einsum("rd,efd->ref", rows, gate)) * jnp.einsum("rd,efd->ref", rows, up)
    return jnp.einsum("ref,edf,re->rd", hidden, down, mine.astype(rows.dtype))


BACKENDS: Final[dict[str, Callable[..., Array]]] = {
    "block_loop": block_loop,
    "batched": batched,
    "ragged": ragged,
    "dense": dense,
}
