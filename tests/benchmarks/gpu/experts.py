"""The routed expert MLP alone, per leg and backend. Start at `main_size`.

`both` is the forward pass and all gradients, 18·R·D·F FLOPs.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array
from dsmoe_jax.kernels import expert_ffn as ffn
from dsmoe_jax.kernels import grouped_matmul, plain
from dsmoe_jax.kernels.tuning import Legs
from tests.benchmarks.gpu import few, timing, work
from tests.benchmarks.gpu.cases import Case, UnableError
from tests.benchmarks.gpu.sizes import Sizes

DEFAULT: Final = "default"  # the package's table
CANDIDATES: Final = ("batched", "grouped", "ragged")


class Operands(NamedTuple):
    """The operands of one call, and a gradient of its result."""

    rows: Array  # [R, D]
    weights: Array  # [R]
    gate: Array
    up: Array
    down: Array
    group_sizes: Array
    grad: Array  # [R, D]


Function = Callable[..., Any]


def functions(backend: str | None) -> dict[str, tuple[Function, int]]:
    """By name, a function of `Operands` and its number of legs."""

    def call(*inputs: Any) -> Any:
        rows, weights, gate, up, down, group_sizes = inputs
        return ffn.expert_ffn(rows, gate, up, down, group_sizes, weights=weights, backend=backend)

    def fwd(*operands: Any) -> Any:
        return call(*operands[:-1])

    def dgrad(*operands: Any) -> Any:
        """The leg alone: XLA removes the unused forward pass."""
        x, weights, *rest, grad = operands
        return jax.vjp(lambda x, weights: call(x, weights, *rest), x, weights)[1](grad)

    def wgrad(*operands: Any) -> Any:
        x, weights, gate, up, down, group_sizes, grad = operands
        return jax.vjp(lambda *experts: call(x, weights, *experts, group_sizes), gate, up, down)[1](grad)

    def both(*operands: Any) -> Any:
        *inputs, group_sizes, grad = operands
        y, back = jax.vjp(lambda *inputs: call(*inputs, group_sizes), *inputs)
        return y, back(grad)

    return {"both": (both, 3), "fwd": (fwd, 1), "dgrad": (dgrad, 1), "wgrad": (wgrad, 1)}


def operands(sizes: Sizes, tokens: int, *, skewed: bool = False, dtype: Any = None) -> Operands:
    """Rows of unit scale, weights that preserve it."""
    config, dtype = sizes.model, jnp.dtype(dtype or sizes.dtype)
    assert config.n_routed_experts is not None
    assert config.num_experts_per_tok is not None
    E, D, F, A = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    R = tokens * A
    rows, grad = timing.noise([timing.shape(dtype, R, D)] * 2)
    gate, up = timing.noise([timing.shape(dtype, E, F, D)] * 2, scale=D**-0.5, seed=1)
    down = timing.noise(timing.shape(dtype, E, D, F), scale=F**-0.5, seed=2)
    counts = work.group_sizes(tokens, E, A, skewed=skewed)
    return Operands(rows, jnp.full(R, 1 / A, jnp.float32), gate, up, down, jax.device_put(counts), grad)


def resolved(rows: int, experts: int, dtype: Any, backend: str | None) -> Legs:
    """The legs of a call; `UnableError` if `grouped` has no kernel here."""
    if backend == "grouped":
        try:
            plain.grouped_legs()
        except ValueError as error:
            raise UnableError(f"no kernel for `grouped` here: {error}") from None
    return ffn.choose_legs(jax.default_backend(), dtype, rows, experts, backend)


def case(sizes: Sizes, tokens: int, name: str, backend: str | None, *, skewed: bool = False, dtype: Any = None) -> Case:
    """One function of `functions`, by one backend, at one size."""
    routing, label = "skewed" if skewed else "balanced", backend or DEFAULT
    title = {"both": "forward and backward"}

    def run() -> dict[str, Any]:
        given = operands(sizes, tokens, skewed=skewed, dtype=dtype)
        (R, D), F = given.rows.shape, given.gate.shape[1]
        legs = resolved(R, len(given.gate), given.rows.dtype, backend)
        function, count = functions(backend)[name]
        figures = timing.timed(
            function, *given, seconds=sizes.turn_seconds, flops=work.expert_flops(R, D, F, count), tokens=tokens
        )
        note = "legs " + ",".join(dict.fromkeys(legs)) if backend is None else ""
        if skewed:
            fullest = float(given.group_sizes.max() * len(given.group_sizes) / R)
            note = f"{note}, fullest expert {fullest:.1f} times the mean".removeprefix(", ")
        return figures | {"note": note}

    return Case(
        f"experts.{tokens}.{routing}.{label}.{name}",
        f"{tokens} tokens, {routing}, {label}, {title.get(name, name)}",
        run,
    )


def main_size(sizes: Sizes) -> Iterator[Case]:
    """All legs together first, then few tokens, then each leg."""
    tokens = sizes.expert_tokens[0]
    yield from (case(sizes, tokens, "both", backend) for backend in (None, *CANDIDATES))
    yield from few.cases(sizes)
    for backend in CANDIDATES:
        yield from (case(sizes, tokens, leg, backend) for leg in Legs._fields)


def more_sizes(sizes: Sizes) -> Iterator[Case]:
    """Skewed routing and other sizes; without `ragged`, a masked dense matmul where it is not fused."""
    first, *others = sizes.expert_tokens
    for backend in (None, *CANDIDATES[:2]):
        yield case(sizes, first, "both", backend, skewed=True)
    for tokens in others:
        for backend in (None, *CANDIDATES[:2]):
            for skewed in (False, True):
                yield case(sizes, tokens, "both", backend, skewed=skewed)


def matmuls(sizes: Sizes) -> Iterator[Case]:
    """One grouped matmul, [R, D] by [E, F, D], and its gradients, per implementation."""
    tokens = sizes.expert_tokens[0]
    for implementation in grouped_matmul.IMPLEMENTATIONS:
        for leg in ("gmm", "gmm_transposed", "tgmm"):

            def run(implementation: str = implementation, leg: str = leg) -> dict[str, Any]:
                if reason := grouped_matmul.available(implementation):
                    raise UnableError(reason)
                given = operands(sizes, tokens)
                (R, D), (_, F, _) = given.rows.shape, given.gate.shape
                hidden = timing.noise(timing.shape(given.rows.dtype, R, F))
                call = getattr(grouped_matmul, leg)
                inputs = {
                    "gmm": (given.rows, given.gate),
                    "gmm_transposed": (hidden, given.gate),
                    "tgmm": (hidden, given.rows),
                }
                return timing.timed(
                    lambda a, b, counts: call(a, b, counts, implementation=implementation),
                    *inputs[leg],
                    given.group_sizes,
                    seconds=sizes.turn_seconds,
                    flops=2 * R * D * F,
                )

            yield Case(f"matmuls.{implementation}.{leg}", f"{leg}, {implementation}, {tokens} tokens", run)


def ragged(sizes: Sizes) -> Iterator[Case]:
    """`ragged_dot` and its compiled form; the XLA flag is in this process's environment."""
    tokens = sizes.expert_tokens[0]
    for name in ("fwd", "both"):

        def run(name: str = name) -> dict[str, Any]:
            given = operands(sizes, tokens)
            function, _ = functions("ragged")[name]
            text = jax.jit(function).lower(*given).compile().as_text() or ""
            return case(sizes, tokens, name, "ragged").run() | {"note": describe(text)}

        yield Case(f"ragged.{name}", f"{tokens} tokens, ragged_dot, {name}", run)


_SIGNS: Final[Mapping[str, str]] = {
    "cuDNN fusions": "__cudnn$",
    "ragged-dot": "ragged-dot(",
    "cuBLAS calls": "__cublas$",
    "Triton fusions": "__triton",
    "dots": " dot(",
}


def describe(hlo: str) -> str:
    """Count each kind of matmul in a compiled program."""
    found = [f"{hlo.count(sign)} {name}" for name, sign in _SIGNS.items() if sign in hlo]
    return "compiled to " + (", ".join(found) or "nothing that looks like a matmul")
