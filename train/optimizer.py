"""AdamW and its learning-rate schedules. Start at `make_optimizer`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import optax

from dsmoe_jax.axes import Array
from dsmoe_jax.errors import DSMoEError

from .checks import check_choices, check_minimum

_PAPER_DECAY: Final = 0.316  # arXiv 2401.06066, section 4.1.3: at 80 % and again at 90 % of the steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with the settings of the paper's 2B (arXiv 2401.06066, 4.1.3)."""

    learning_rate: float = 1.08e-3
    """Peak learning rate, reached after warmup."""

    schedule: Literal["paper", "cosine", "constant"] = "paper"
    """Learning rate after warmup: `paper` multiplies it by 0.316 at 80% and at 90% of the steps."""

    warmup_steps: int = 2000
    """Steps of linear warmup to the peak learning rate."""

    min_lr_ratio: float = 0.1
    """Final learning rate of the cosine schedule, as a fraction of the peak, in [0, 1]."""

    b1: float = 0.9
    """Decay rate of the first moment, in [0, 1)."""

    b2: float = 0.95
    """Decay rate of the second moment, in [0, 1)."""

    eps: float = 1e-8
    """Added to the denominator of the update for numerical stability."""

    weight_decay: float = 0.1
    """Decoupled weight decay, scaled by the learning rate."""

    weight_decay_mask: Literal["matrices", "all"] = "matrices"
    """Parameters that decay: `matrices` excludes norms and biases."""

    max_grad_norm: float | None = 1.0
    """Clip gradients to this global norm; None disables clipping."""

    moments: Literal["float32", "bfloat16", "factored"] = "float32"
    """Optimizer moments: `bfloat16` stores the first in bf16; `factored` uses Adafactor's second and no first."""

    def __post_init__(self) -> None:
        """Raise `DSMoEError` for invalid values."""
        check_choices(self, "optimizer.")
        check_minimum(self, dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "eps"), 0), "optimizer.")
        for name in ("learning_rate", "weight_decay", "eps"):
            if math.isinf(getattr(self, name) or 0):
                raise DSMoEError(f"optimizer.{name} must be finite, got inf")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise DSMoEError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise DSMoEError(f"optimizer.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise DSMoEError(f"optimizer.max_grad_norm must be positive or None, got {self.max_grad_norm}")


def make_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimizer and its learning-rate schedule, a function of the update count."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, steps)
    schedule = body = _SCHEDULES[config.schedule](config, steps)
    if warmup:
        # The first update has 1/warmup of the peak: a learning rate of 0 would waste it.
        ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        schedule = optax.join_schedules([ramp, lambda count: body(count + warmup)], [warmup])
    optimizer = optax.chain(
        _MOMENTS[config.moments](config),
        optax.add_decayed_weights(config.weight_decay, mask=_DECAY_MASKS[config.weight_decay_mask]),
        optax.scale_by_learning_rate(schedule),
    )
    return optimizer, schedule


def clip_by_global_norm(grads: Mapping[str, Array], max_norm: float | None) -> tuple[dict[str, Array], Array]:
    """Clip gradients to a global norm; also return the norm before clipping."""
    # Per row, because XLA:CPU sums an array on one core.
    rows = [jnp.einsum("...i,...i->...", grad, grad, precision="highest") for grad in grads.values()]
    norm = jnp.sqrt(sum((row.sum() for row in rows), jnp.zeros((), jnp.float32)))
    if max_norm is None:
        return dict(grads), norm
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))  # PyTorch's clip_grad_norm_
    return jax.tree.map(lambda grad: grad * scale, dict(grads)), norm


def _paper(config: OptimizerConfig, steps: int) -> optax.Schedule:
    milestones = {int(0.8 * steps): _PAPER_DECAY, int(0.9 * steps): _PAPER_DECAY}
    return optax.piecewise_constant_schedule(config.learning_rate, milestones)


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup = min(config.warmup_steps, steps)
    decay = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup), alpha=config.min_lr_ratio)
    return lambda count: decay(count - warmup)


# Functions of the update count, warmup included.
_SCHEDULES: Final[dict[str, Callable[[OptimizerConfig, int], optax.Schedule]]] = {
    "paper": _paper,
    "cosine": _cosine,
    "constant": lambda config, steps: optax.constant_schedule(config.learning_rate),
}
_DECAY_MASKS: Final[dict[str, Callable[[Any], Any] | None]] = {
    "matrices": lambda params: {name: value.ndim > 1 for name, value in params.items()},
    "all": None,
}
_MOMENTS: Final[dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]]] = {
    "float32": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "bfloat16": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.bfloat16),
    "factored": lambda c: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
}
