"""The routed experts on few tokens (decode), unsorted and sorted. Start at `cases`.

The threshold of `dsmoe_jax.kernels.few_tokens` should come from these.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array
from dsmoe_jax.kernels import few_tokens
from dsmoe_jax.kernels.operand import Experts
from dsmoe_jax.layers.token_dispatcher import DispatchConfig, routed_experts
from tests.benchmarks.gpu import timing, work
from tests.benchmarks.gpu.cases import Case
from tests.benchmarks.gpu.sizes import Sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    """Each form near its most tokens, against sorting; forward only."""
    for tokens, form in ((8, few_tokens.by_choice), (32, few_tokens.by_expert)):
        for name, function in ((form.__name__, form), ("sorted", _sorted)):
            yield Case(
                f"experts.few.{tokens}.{name}",
                f"{tokens} tokens, forward, {name}",
                lambda function=function, tokens=tokens: row(sizes, tokens, function),
            )


def row(sizes: Sizes, tokens: int, function: few_tokens.Form) -> dict[str, Any]:
    """The floor reads each expert hit once."""
    config, dtype = sizes.model, jnp.dtype(sizes.dtype)
    D, F, E, A = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok
    assert E is not None
    assert A is not None
    x = timing.noise(timing.shape(dtype, tokens, D))
    gate, up = timing.noise([timing.shape(dtype, E, F, D)] * 2, scale=D**-0.5, seed=1)
    down = timing.noise(timing.shape(dtype, E, D, F), scale=F**-0.5, seed=2)
    _, ids = jax.lax.top_k(jax.random.uniform(jax.random.key(0), (tokens, E)), A)
    hit = len(jnp.unique(ids))
    figures = timing.timed(
        lambda x, ids, weights, experts: function(x, ids, weights, experts, "silu"),
        *(x, ids, jnp.full((tokens, A), 1 / A), Experts(gate, up, down)),
        seconds=sizes.turn_seconds,
        flops=work.expert_flops(tokens * A, D, F),
        bytes=hit * timing.nbytes([gate, up, down]) // E,
        tokens=tokens,
    )
    return figures | {"note": f"{hit} of {E} experts hit"}


def _sorted(x: Array, ids: Array, weights: Array, experts: Experts, activation: str) -> Array:
    return routed_experts(x, ids, weights, experts, activation=activation, config=DispatchConfig(backend="batched"))[0]
