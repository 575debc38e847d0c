"""The optimizer and its schedules, from optax. Start at `make_optimizer`; `SCHEDULES` are the learning rates."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from dsmoe_jax.axes import Array
from dsmoe_jax.errors import DSMoEError

_PAPER_DECAY: Final = 0.316  # arXiv 2401.06066, section 4.1.3: at 80 % and again at 90 % of the steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the paper runs it (arXiv 2401.06066, section 4.1.3); the learning rate is that of its 2B model."""

    learning_rate: float = 1.08e-3
    schedule: str = "paper"  # a key of SCHEDULES
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1  # of the learning rate, where a cosine ends
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = "matrices"  # or "all": norms and biases too
    max_grad_norm: float | None = 1.0  # of all gradients together
    moments: str = "float32"  # or "bfloat16" (the first one), or "factored" (as in Adafactor: no first one)

    def __post_init__(self) -> None:
        """`ValueError` for a value that means nothing."""
        for name, table in (("schedule", SCHEDULES), ("decay", _DECAYED), ("moments", _MOMENTS)):
            if (value := getattr(self, name)) not in table:
                raise DSMoEError(f"{name} {value!r} is not one of {', '.join(table)}")
        for name, low in (("learning_rate", 0), ("warmup_steps", 0), ("weight_decay", 0), ("eps", 0)):
            if not getattr(self, name) >= low:
                raise DSMoEError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise DSMoEError(f"max_grad_norm must be positive or None, not {self.max_grad_norm}")


def make_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The transformation of clipped gradients for a run of `steps` updates, and its learning rate by update."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    body = SCHEDULES[config.schedule](config, steps)
    schedule = body
    if warmup:
        # The first update has 1/warmup of the peak already: one of size 0 would teach nothing.
        ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        schedule = optax.join_schedules([ramp, lambda count: body(count + warmup)], [warmup])
    optimizer = optax.chain(
        _MOMENTS[config.moments](config),
        optax.add_decayed_weights(config.weight_decay, mask=_DECAYED[config.decay]),
        optax.scale_by_learning_rate(schedule),
    )
    return optimizer, schedule


def clip(grads: Mapping[str, Array], limit: float | None) -> tuple[dict[str, Array], Array]:
    """The gradients with a norm of at most `limit` all together, and the norm they had."""
    # Row by row: on CPU a sum over a whole array runs on one core.
    rows = [jnp.einsum("...i,...i->...", grad, grad, precision="highest") for grad in grads.values()]
    norm = jnp.sqrt(sum((row.sum() for row in rows), jnp.zeros((), jnp.float32)))
    if limit is None:
        return dict(grads), norm
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))  # PyTorch's clip_grad_norm_
    return jax.tree.map(lambda grad: grad * scale, dict(grads)), norm


def _paper(config: OptimizerConfig, steps: int) -> optax.Schedule:
    milestones = {int(0.8 * steps): _PAPER_DECAY, int(0.9 * steps): _PAPER_DECAY}
    return optax.piecewise_constant_schedule(config.learning_rate, milestones)


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup = min(config.warmup_steps, steps)
    decay = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup), alpha=config.min_lr_ratio)
    return lambda count: decay(count - warmup)


def _constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


# Each from the update's number, the warm-up counted in.
SCHEDULES: Final[dict[str, Callable[[OptimizerConfig, int], optax.Schedule]]] = {
    "paper": _paper,
    "cosine": _cosine,
    "constant": _constant,
}

_DECAYED: Final[dict[str, Callable[[Any], Any] | None]] = {
    "matrices": lambda params: {name: value.ndim > 1 for name, value in params.items()},
    "all": None,
}

_MOMENTS: Final[dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]]] = {
    "float32": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "bfloat16": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.bfloat16),
    "factored": lambda c: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
}
