"""Operands of a linear map: dense, quantized, or a base plus a low-rank adapter.

Start at `linear`. An operand has the weights of E experts, each [out, in] as in PyTorch. Every leaf has a leading
expert axis, so that indexing or `vmap` gives one expert's operand; backends rely on nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int, Shaped
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS
from dsmoe_jax.kernels.matvec import consecutive, fits, is_row, matvec, packed_matvec

_STATIC: Final = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """codebook[code] · scale (+ offset), in tiles of `tile` values, row-major over an expert's [out, in]."""

    # Int[E, O, I], or [E, n] for quantized scales. Without a codebook, int8 values; with one of 16, two codes per byte,
    # [E, O, I / 2], the first in the upper half (as in bitsandbytes).
    codes: Any
    scales: Any  # ⌈O·I / tile⌉ per expert; Quantized for double quantization (arXiv 2305.14314, §3)
    offset: Any = None  # Float[E]: the mean of quantized scales
    tile: int = dataclasses.field(default=64, metadata=_STATIC)
    codebook: tuple[float, ...] | None = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def packed(self) -> bool:
        """Whether each byte has two codes."""
        return self.codebook is not None and len(self.codebook) == 16

    @property
    def by_output(self) -> bool:
        """Whether there is one plain scale per output."""
        unnested = self.codebook is None and self.offset is None and not isinstance(self.scales, Quantized)
        return unnested and self.tile == self.codes.shape[-1]

    @property
    def by_row(self) -> bool:
        """Whether `multiply_row` takes it."""
        return self.by_output or (self.packed and self.tile % 2 == 0 and self.offset is None)

    def dequantize(self) -> Float[Array, "..."]:
        """Return the fp32 values of one expert's operand (without the expert axis)."""
        codes = self.codes
        if self.packed:
            codes = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], -1)
        values = codes.astype(jnp.float32) if self.codebook is None else self._decode(codes)
        scales = self.scales_fp32()
        short = scales.size * self.tile - values.size
        tiles = jnp.pad(values.reshape(-1), (0, short)).reshape(-1, self.tile) * scales.reshape(-1, 1)
        values = tiles.reshape(-1)[: values.size].reshape(values.shape)
        return values if self.offset is None else values + self.offset

    def dequantize_halves(self) -> tuple[Float[Array, "O half"], Float[Array, "O half"]]:
        """Return the even and odd columns of one expert's packed values, for an even tile.

        2 to 3× as fast as `dequantize` on CPU, where interleaving the two halves of a byte dominates.
        """
        scales = self.scales_fp32().reshape(-1, 1)
        scales = jnp.broadcast_to(scales, (len(scales), self.tile // 2)).reshape(-1)
        scales = scales[: self.codes.size].reshape(self.codes.shape)
        return self._decode(self.codes >> 4) * scales, self._decode(self.codes & 15) * scales

    def scales_fp32(self) -> Float[Array, "..."]:
        """Return the scales of one expert's operand."""
        return self.scales.dequantize() if isinstance(self.scales, Quantized) else self.scales.astype(jnp.float32)

    def _decode(self, codes: Array) -> Float[Array, "..."]:
        assert self.codebook is not None
        if consecutive(self.codebook):
            return codes.astype(jnp.float32) + self.codebook[0]
        codebook = jnp.asarray(self.codebook, jnp.float32)
        return codebook.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + b a, never materialized: (x aᵀ) bᵀ costs r·(O + I) per row, b a r·O·I per expert."""

    base: Any  # Float[E, O, I] or Quantized
    a: Any  # Float[E, r, I]
    b: Any  # Float[E, O, r], multiplied by the adapter's scale


Operand: TypeAlias = Array | Quantized | LowRank  # [E, O, I]; under JAX transformations leaves may not be arrays


class Experts(NamedTuple):
    """The operands of E SwiGLUs."""

    gate: Operand  # [E, F, D]
    up: Operand  # [E, F, D]
    down: Operand  # [E, D, F]


class Inputs(NamedTuple):
    """The differentiable inputs of a backend."""

    rows: Float[Array, "R D"]
    weights: Float[Array, "R"] | None  # of each row; None: 1
    experts: Experts

    def by_row(self) -> list[bool]:
        """Return whether each leaf is per row rather than per expert."""
        rows = len(jax.tree.leaves(self[:2]))
        return [n < rows for n in range(len(jax.tree.leaves(self)))]

    def map_rows(self, function: Callable[[Array], Array]) -> "Inputs":
        """Apply `function` to the per-row leaves."""
        rows, weights = jax.tree.map(function, (self.rows, self.weights))
        return Inputs(rows, weights, self.experts)


def shape(operand: Operand) -> tuple[int, int]:
    """Return (out, in) of each expert; raise if the parts of an operand do not agree."""
    match operand:
        case LowRank(base, a, b):
            out, into = shape(base)
            if (b.shape[1], a.shape[2]) != (out, into) or a.shape[1] != b.shape[2]:
                raise DSMoEError(f"a [r, in] = {a.shape[1:]}, b [out, r] = {b.shape[1:]} do not fit {out, into}")
            return out, into
        case Quantized(codes, scales, tile=tile):
            out, into = codes.shape[1], codes.shape[2] * (2 if operand.packed else 1)
            tiles = math.prod((scales.codes if isinstance(scales, Quantized) else scales).shape[1:])
            if tiles != -(-out * into // tile):
                raise DSMoEError(f"{out} x {into} codes in tiles of {tile} do not fit {tiles} scales")
            return out, into
        case _:
            return operand.shape[1], operand.shape[2]


@jax.custom_vjp
def multiply_row(x: Float[Array, "I"], operand: Quantized) -> Float[Array, "O"]:
    """Multiply one row with one expert's operand; the gradient is that of the exact product."""
    if operand.by_output:
        return matvec(x, operand.codes) * operand.scales.reshape(-1)
    assert operand.codebook is not None
    if fits(len(x), operand.tile, operand.codebook):
        return packed_matvec(x, operand.codes, operand.scales_fp32().reshape(len(operand.codes), -1), operand.codebook)
    upper, lower = operand.dequantize_halves()
    return matvec(x[::2], upper) + matvec(x[1::2], lower)


def _row_backward(saved: tuple[Array, Quantized], grad: Array) -> tuple[Array, Quantized]:
    exact = lambda x, operand: dot(x[None], operand.dequantize().astype(x.dtype))[0]  # noqa: E731
    return jax.vjp(exact, *saved)[1](grad)


multiply_row.defvjp(lambda x, operand: (multiply_row(x, operand), (x, operand)), _row_backward)


Dot: TypeAlias = Callable[[Array, Array], Array]


def dot(x: Float[Array, "R I"], weight: Shaped[Array, "O I"]) -> Float[Array, "R O"]:
    """Compute x Wᵀ with fp32 accumulation; int8 codes are cast to x's dtype."""
    return _dot(x, weight.astype(x.dtype))


@jax.custom_vjp
def _dot(x: Array, weight: Array) -> Array:
    """Multiply; the custom VJP casts gradients to x's dtype, else bf16 operands would be multiplied in fp32."""
    return contract(x, weight, 1, 1)


def contract(x: Array, y: Array, x_dim: int, y_dim: int) -> Array:
    """Contract one dimension of each of two matrices with fp32 accumulation."""
    dimensions = (((x_dim,), (y_dim,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _dot_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, weight = saved
    grad = grad.astype(x.dtype)
    return contract(grad, weight, 1, 0).astype(x.dtype), contract(grad, x, 0, 0).astype(weight.dtype)


_dot.defvjp(lambda x, weight: (_dot(x, weight), (x, weight)), _dot_backward)


def as_sum(x: Float[Array, "R I"], weight: Shaped[Array, "O I"]) -> Float[Array, "R O"]:
    """Compute `dot` as products and sums, which XLA fuses with the gather of the weight."""
    return (x.astype(jnp.float32)[:, None, :] * weight.astype(jnp.float32)[None]).sum(axis=-1)


def linear(x: Float[Array, "*rows I"], operand: Operand, dot: Dot = dot) -> Float[Array, "*rows O"]:
    """Apply one expert's operand to rows, in fp32, or all experts' operands to sorted rows with a grouped `dot`."""
    match operand:
        case LowRank():
            narrow = linear(x, operand.a, dot).astype(x.dtype)
            return linear(x, operand.base, dot) + linear(narrow, operand.b, dot)
        case Quantized() if is_row(x) and operand.codes.ndim == 2 and operand.by_row:
            return multiply_row(x.reshape(-1), operand).reshape(*x.shape[:-1], -1)
        case Quantized() if operand.packed and operand.tile % 2 == 0 and operand.offset is None:
            upper, lower = (half.astype(x.dtype) for half in operand.dequantize_halves())
            return dot(x[..., ::2], upper) + dot(x[..., 1::2], lower)
        case Quantized(codes, scales) if operand.by_output:
            # Scale the output: the matmul then reads int8 codes, which are exact in any dtype.
            y = dot(x, codes)
            return y * scales.reshape((1,) * (y.ndim - 1) + (-1,))
        case Quantized():
            return dot(x, operand.dequantize().astype(x.dtype))
        case _:
            return dot(x, operand.astype(x.dtype))


def swiglu(inputs: Inputs, activation: str, dot: Dot = dot) -> Float[Array, "R D"]:
    """Compute weight · down(act(gate x) · up x), in fp32."""
    x, weights, experts = inputs
    hidden = ACTIVATION_FUNCTIONS[activation](linear(x, experts.gate, dot)) * linear(x, experts.up, dot)
    if weights is not None:  # scales the hidden row: the gradient then does not need the output
        hidden = hidden * weights.astype(jnp.float32)[:, None]
    return linear(hidden.astype(x.dtype), experts.down, dot)


def expert_of_rows(group_sizes: Int[Array, "E"], rows: int) -> tuple[Int[Array, "R"], Bool[Array, "R"]]:
    """Return the expert of each sorted row, and whether it has one."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)
    return range_of(row, ends).clip(max=len(ends) - 1), row < ends[-1]


def range_of(values: Int[Array, "*n"], ends: Int[Array, "E"]) -> Int[Array, "*n"]:
    """Return the first range that ends above each value, or the number of ranges."""
    # On a GPU the loop of a binary search is slower than comparing with all ends.
    method = "scan" if jax.default_backend() == "cpu" else "compare_all"
    return jnp.searchsorted(ends, values, side="right", method=method)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def dequantized_in_place(inputs: Inputs) -> Inputs:
    """Keep XLA from dequantizing experts before the loop over micro-batches, which would hold those of all layers."""
    quantized = any(map(_is_quantized, jax.tree.leaves(inputs.experts, is_leaf=_is_quantized)))
    return jax.lax.optimization_barrier(inputs) if quantized else inputs


def dequantize_all(inputs: Inputs) -> Inputs:
    """Dequantize every quantized operand, for backends that take dense [E, O, I] arrays."""
    return jax.tree.map(
        lambda leaf: jax.vmap(Quantized.dequantize)(leaf) if _is_quantized(leaf) else leaf,
        dequantized_in_place(inputs),
        is_leaf=_is_quantized,
    )


class Blocks(NamedTuple):
    """Blocks of consecutive rows of one expert each."""

    expert: Int[Array, "n"]
    start: Int[Array, "n"]  # first row
    end: Int[Array, "n"]  # one past the expert's last row, possibly beyond the block
    count: Int[Array, ""]  # blocks in use

    @classmethod
    def split(cls, group_sizes: Int[Array, "E"], size: int, n: int) -> "Blocks":
        """Split each group into blocks of `size` rows; `n` bounds their number."""
        per_expert = (group_sizes + size - 1) // size
        last = jnp.cumsum(per_expert)
        i = jnp.arange(n, dtype=jnp.int32)
        # compare_all: one fused comparison instead of a loop of kernel launches.
        expert = jnp.searchsorted(last, i, side="right", method="compare_all").astype(jnp.int32)
        expert = expert.clip(max=len(group_sizes) - 1)
        ends = jnp.cumsum(group_sizes)
        start = (ends - group_sizes)[expert] + (i - (last - per_expert)[expert]) * size
        return cls(expert, start.astype(jnp.int32), ends[expert].astype(jnp.int32), last[-1])


@jax.tree_util.register_static
class GradMask(tuple[bool, ...]):
    """Which leaves need a gradient; a backward pass treats the others as constants."""

    def select(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves that need a gradient."""
        return [leaf for leaf, needed in zip(leaves, self, strict=True) if needed]

    def fill(self, values: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        """Replace the leaves that need a gradient by `values`."""
        new = iter(values)
        return [next(new) if needed else leaf for leaf, needed in zip(leaves, self, strict=True)]

    def vjp(self, function: Callable[[Any], Array], operands: Any, grad: Array) -> list[Array]:
        """Return the gradients of the selected leaves of `operands`, from that of `function(operands)`."""
        leaves, tree = jax.tree.flatten(operands)
        of_selected = lambda values: function(jax.tree.unflatten(tree, self.fill(values, leaves)))  # noqa: E731
        return jax.vjp(of_selected, self.select(leaves))[1](grad)[0]


# The logical axes of dense operands, in the order of `Experts`.
EXPERT_AXES: Final = (
    ("experts", "expert_ffn", "embed"),
    ("experts", "expert_ffn", "embed"),
    ("experts", "embed", "expert_ffn"),
)


def leaf_axes(operand: Operand, axes: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
    """Return the logical axes of each leaf; tiles may span rows, so quantized leaves are sharded over experts alone."""
    experts, out, into = axes
    match operand:
        case LowRank():
            return [*leaf_axes(operand.base, axes), (experts, None, into), (experts, out, None)]
        case Quantized():
            return [(experts, *(None,) * (leaf.ndim - 1)) for leaf in jax.tree.leaves(operand)]
        case _:
            return [axes]
