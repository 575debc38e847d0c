"""Detection of bad updates from the last losses and gradient norms: `Guard`."""

from typing import Final, NamedTuple

import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int

WINDOW: Final = 128  # steps whose statistics a new one is compared with (as OLMo-core's SkipStepOptimizer)
_MIN_STEPS: Final = 64  # fewer are too few to detect outliers: only non-finite steps are skipped
_SIGMAS: Final = 6.0


class Guard(NamedTuple):
    """Loss and gradient norm of the last steps, to detect outliers."""

    losses: Float[Array, "window"]  # of the last finite steps, a ring buffer
    grad_norms: Float[Array, "window"]  # of the same steps
    finite_steps: Int[Array, ""]
    total_skips: Int[Array, ""]
    consecutive_skips: Int[Array, ""]  # updates skipped since the last one applied

    @classmethod
    def empty(cls) -> "Guard":
        """Return the guard before the first step."""
        window = [jnp.zeros(WINDOW, jnp.float32) for _ in range(2)]
        return cls(*window, *(jnp.zeros((), jnp.int32) for _ in range(3)))

    def accepts(self, loss: Array, norm: Array) -> Bool[Array, ""]:
        """Return whether loss and gradient norm are finite and not outliers."""
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        filled = jnp.minimum(self.finite_steps, WINDOW)
        known = jnp.arange(WINDOW) < filled
        for value, window in ((loss, self.losses), (norm, self.grad_norms)):
            mean = jnp.where(known, window, 0).sum() / jnp.maximum(filled, 1)
            deviation = jnp.sqrt(jnp.where(known, jnp.square(window - mean), 0).sum() / jnp.maximum(filled, 1))
            good &= (self.finite_steps < _MIN_STEPS) | (value <= mean + _SIGMAS * deviation)
        return good

    def updated(self, loss: Array, norm: Array, good: Array) -> "Guard":
        """Return the guard after this step."""
        # Finite outliers enter the window: otherwise a new level would be skipped forever.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        here = (jnp.arange(WINDOW) == self.finite_steps % WINDOW) & finite
        skipped = (~good).astype(jnp.int32)
        return Guard(
            jnp.where(here, loss, self.losses),
            jnp.where(here, norm, self.grad_norms),
            self.finite_steps + finite.astype(jnp.int32),
            self.total_skips + skipped,
            (self.consecutive_skips + 1) * skipped,
        )
