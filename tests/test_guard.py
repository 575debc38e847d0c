"""The guard, which skips updates, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.train.guard import Guard


def slow_guard(values: list[tuple[float, float]]) -> list[bool]:
    """Reference of the guard in plain Python: whether each step is skipped."""
    window: list[tuple[float, float]] = []
    skipped = []
    for loss, norm in values:
        good = bool(np.isfinite(loss) and np.isfinite(norm))
        if len(window) >= 64:
            last = np.array(window[-128:])
            good = good and all((loss, norm) <= last.mean(0) + 6 * last.std(0))
        skipped.append(not good)
        if np.isfinite(loss) and np.isfinite(norm):
            window.append((loss, norm))
    return skipped


def test_the_guard_is_its_slow_twin():
    rng = np.random.default_rng(0)
    values = [(float(3 + 0.1 * rng.standard_normal()), float(1 + 0.1 * rng.standard_normal())) for _ in range(300)]
    for at, bad in ((10, (50.0, 1.0)), (70, (5.0, 1.0)), (90, (3.0, 40.0)), (200, (np.nan, 1.0)), (201, (3.0, np.inf))):
        values[at] = bad
    values[250:280] = [(6.0, 1.0)] * 30

    guard, skipped = Guard.empty(), []
    judge = jax.jit(
        lambda guard, loss, norm: (good := guard.accepts(loss, norm), guard.updated(loss, norm, good)),
    )
    for loss, norm in values:
        good, guard = judge(guard, jnp.float32(loss), jnp.float32(norm))
        skipped.append(not bool(good))

    assert skipped == slow_guard(values)
    assert skipped[200]
    assert skipped[250]
    assert int(guard.total_skips) == sum(skipped)
