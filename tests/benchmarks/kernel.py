"""The routed experts alone, forward and backward, by backend: time and XLA's temporary memory. Start at `actions`."""

from pathlib import Path

import jax
import numpy as np

from dsmoe_jax.axes import Array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kernels.expert_ffn import expert_ffn
from tests.benchmarks import plan
from tests.benchmarks.children import Actions
from tests.benchmarks.timing import seconds


def actions(task: str, folder: Path, backend: str) -> Actions:
    """Compile the value and the gradients of rows and weights."""
    operands, group_sizes = _operands(ModelConfig.preset(plan.PRESET))

    def loss(rows: Array, gate: Array, up: Array, down: Array) -> Array:
        return (expert_ffn(rows, gate, up, down, group_sizes, backend=backend) ** 2).sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*operands).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "run": lambda: seconds(lambda: jax.block_until_ready(compiled(*operands))),
        "temp bytes": lambda: memory.temp_size_in_bytes,
    }


def _operands(config: ModelConfig) -> tuple[list[Array], Array]:
    """Return rows sorted by expert, with random routing."""
    assert config.n_routed_experts is not None
    assert config.num_experts_per_tok is not None
    E, A = config.n_routed_experts, config.num_experts_per_tok
    D, F = config.hidden_size, config.moe_intermediate_size
    rng = np.random.default_rng(plan.SEED)
    chosen = rng.random((plan.KERNEL_TOKENS, E)).argsort(axis=1)[:, :A]
    shapes = ((plan.KERNEL_TOKENS * A, D), (E, F, D), (E, F, D), (E, D, F))
    scales = (1.0, D**-0.5, D**-0.5, F**-0.5)
    draws = [scale * rng.standard_normal(shape, np.float32) for scale, shape in zip(scales, shapes, strict=True)]
    return jax.device_put(draws), jax.device_put(np.bincount(chosen.ravel(), minlength=E).astype(np.int32))
