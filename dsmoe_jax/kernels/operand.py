"""What the weights of a linear map may be: dense, quantised, or a base plus a low-rank adapter.

Start at `linear`. An operand holds the weights of all E experts, [out, in] each as PyTorch keeps them, and every leaf
of it begins with the expert axis: indexing or mapping all leaves gives one expert's operand. A backend needs to know
no more than that, so what works for dense weights works for all three.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from dsmoe_jax.axes import Array, Bool, Float, Int, Shaped
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS

_STATIC: Final = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """codebook[code] · scale (+ offset), in tiles of `tile` values running row-major over an expert's [out, in].

    Without a codebook the codes are int8 and stand for themselves; with one of 16 values, two codes share a byte, the
    first in its upper half (the order of bitsandbytes); with a longer one, each code has its byte. The scales may be
    quantised in turn, with what was taken from them first as `offset` (double quantisation, arXiv 2305.14314, §3).
    """

    codes: Any  # Int[E, O, I], packed [E, O, I / 2]; those of scales [E, n]
    scales: Any  # Float[E, …] or Quantized: ⌈O·I / tile⌉ per expert, the last tile may be short
    offset: Any = None  # Float[E]
    tile: int = dataclasses.field(default=64, metadata=_STATIC)
    codebook: tuple[float, ...] | None = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.codebook is not None and len(self.codebook) == 16

    @property
    def by_output(self) -> bool:
        """Whether each output of one expert's map has one scale and nothing else."""
        plain = self.codebook is None and self.offset is None and not isinstance(self.scales, Quantized)
        return plain and self.tile == self.codes.shape[-1]

    def dequantize(self) -> Float[Array, "..."]:
        """The values in fp32; of one expert, so of a `Quantized` without the expert axis."""
        codes = self.codes
        if self.packed:
            codes = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], -1)
        values = codes.astype(jnp.float32) if self.codebook is None else self._look_up(codes)
        scales = self._scales()
        short = scales.size * self.tile - values.size
        tiles = jnp.pad(values.reshape(-1), (0, short)).reshape(-1, self.tile) * scales.reshape(-1, 1)
        values = tiles.reshape(-1)[: values.size].reshape(values.shape)
        return values if self.offset is None else values + self.offset

    def dequantize_halves(self) -> tuple[Float[Array, "O half"], Float[Array, "O half"]]:
        """The even and the odd columns of one expert's packed values, in tiles that split no pair.

        Laying the two halves of a byte side by side takes most of the time of `dequantize` on CPU: this is 2 to 3
        times as fast.
        """
        scales = self._scales().reshape(-1, 1)
        scales = jnp.broadcast_to(scales, (len(scales), self.tile // 2)).reshape(-1)
        scales = scales[: self.codes.size].reshape(self.codes.shape)
        return self._look_up(self.codes >> 4) * scales, self._look_up(self.codes & 15) * scales

    def _scales(self) -> Float[Array, "..."]:
        return self.scales.dequantize() if isinstance(self.scales, Quantized) else self.scales.astype(jnp.float32)

    def _look_up(self, codes: Array) -> Float[Array, "..."]:
        codebook = jnp.asarray(self.codebook, jnp.float32)
        return codebook.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + b a, never multiplied out: (x aᵀ) bᵀ costs r·(O + I) a row, where b a costs r·O·I an expert.

    The scale of an adapter (α / r, say) is multiplied into b by whoever makes the operand: it may be each expert's own.
    """

    base: Any  # Float[E, O, I] or Quantized
    a: Any  # Float[E, r, I]
    b: Any  # Float[E, O, r]


Operand: TypeAlias = Array | Quantized | LowRank  # [E, O, I]; within JAX's transformations leaves may be no arrays


class Experts(NamedTuple):
    """The operands of E SwiGLUs."""

    gate: Operand  # [E, F, D]
    up: Operand  # [E, F, D]
    down: Operand  # [E, D, F]


class Inputs(NamedTuple):
    """What a backend works on, and what it can be asked for the gradient of."""

    rows: Float[Array, "R D"]
    weights: Float[Array, "R"] | None  # each row's factor; None: one
    experts: Experts

    def by_row(self) -> list[bool]:
        """For each leaf, whether it belongs to rows (and not to experts)."""
        rows = len(jax.tree.leaves(self[:2]))
        return [n < rows for n in range(len(jax.tree.leaves(self)))]

    def map_rows(self, function: Callable[[Array], Array]) -> "Inputs":
        """The same experts, and `function` of what belongs to rows."""
        rows, weights = jax.tree.map(function, (self.rows, self.weights))
        return Inputs(rows, weights, self.experts)


def shape(operand: Operand) -> tuple[int, int]:
    """(out, in) of each expert's map. Raises `ValueError` where the parts of an operand do not fit together."""
    match operand:
        case LowRank(base, a, b):
            out, into = shape(base)
            if (b.shape[1], a.shape[2]) != (out, into) or a.shape[1] != b.shape[2]:
                raise ValueError(f"a [r, in] = {a.shape[1:]}, b [out, r] = {b.shape[1:]} do not fit {out, into}")
            return out, into
        case Quantized(codes, scales, tile=tile):
            out, into = codes.shape[1], codes.shape[2] * (2 if operand.packed else 1)
            tiles = math.prod((scales.codes if isinstance(scales, Quantized) else scales).shape[1:])
            if tiles != -(-out * into // tile):
                raise ValueError(f"{out} x {into} codes in tiles of {tile} do not fit {tiles} scales")
            return out, into
        case _:
            return operand.shape[1], operand.shape[2]


Dot: TypeAlias = Callable[[Array, Array], Array]


def dot(x: Float[Array, "R I"], weight: Shaped[Array, "O I"]) -> Float[Array, "R O"]:
    """X Wᵀ, summed in fp32; codes of int8 are cast to x's dtype."""
    return _dot(x, weight.astype(x.dtype))


@jax.custom_vjp
def _dot(x: Array, weight: Array) -> Array:
    """Gradients are rounded to x's dtype first: else bf16 would be multiplied as fp32."""
    return contract(x, weight, 1, 1)


def contract(x: Array, y: Array, x_dim: int, y_dim: int) -> Array:
    """The product of two matrices over one dimension of each, summed in fp32."""
    dimensions = (((x_dim,), (y_dim,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _dot_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, weight = saved
    grad = grad.astype(x.dtype)
    return contract(grad, weight, 1, 0).astype(x.dtype), contract(grad, x, 0, 0).astype(weight.dtype)


_dot.defvjp(lambda x, weight: (_dot(x, weight), (x, weight)), _dot_backward)


def as_sum(x: Float[Array, "R I"], weight: Shaped[Array, "O I"]) -> Float[Array, "R O"]:
    """`dot` as products and sums, which XLA fuses with whatever fetches the weight."""
    return (x.astype(jnp.float32)[:, None, :] * weight.astype(jnp.float32)[None]).sum(axis=-1)


def linear(x: Float[Array, "*rows I"], operand: Operand, dot: Dot = dot) -> Float[Array, "*rows O"]:
    """The operand of one expert applied to rows, in fp32; with another `dot`, those of all experts to sorted rows."""
    match operand:
        case LowRank():
            narrow = linear(x, operand.a, dot).astype(x.dtype)
            return linear(x, operand.base, dot) + linear(narrow, operand.b, dot)
        case Quantized() if operand.packed and operand.tile % 2 == 0 and operand.offset is None:
            upper, lower = (half.astype(x.dtype) for half in operand.dequantize_halves())
            return dot(x[..., ::2], upper) + dot(x[..., 1::2], lower)
        case Quantized(codes, scales) if operand.by_output:
            # The scale falls on the result: what is multiplied are the codes, exact in any dtype, read as int8.
            y = dot(x, codes)
            return y * scales.reshape((1,) * (y.ndim - 1) + (-1,))
        case Quantized():
            return dot(x, operand.dequantize().astype(x.dtype))
        case _:
            return dot(x, operand.astype(x.dtype))


def swiglu(inputs: Inputs, activation: str, dot: Dot = dot) -> Float[Array, "R D"]:
    """Weight · down(act(gate x) · up x), in fp32.

    The factor falls on the hidden row, where it costs least: its gradient then needs no output.
    """
    x, weights, experts = inputs
    hidden = ACTIVATION_FUNCTIONS[activation](linear(x, experts.gate, dot)) * linear(x, experts.up, dot)
    if weights is not None:
        hidden = hidden * weights.astype(jnp.float32)[:, None]
    return linear(hidden.astype(x.dtype), experts.down, dot)


def expert_of_rows(group_sizes: Int[Array, "E"], rows: int) -> tuple[Int[Array, "R"], Bool[Array, "R"]]:
    """Each sorted row's expert, and whether it has one."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)
    return range_of(row, ends).clip(max=len(ends) - 1), row < ends[-1]


def range_of(values: Int[Array, "*n"], ends: Int[Array, "E"]) -> Int[Array, "*n"]:
    """The first range that ends above each value; the number of ranges where none does."""
    # A binary search is a loop of small steps, which on a GPU cost more than comparing with all ends at once.
    method = "scan" if jax.default_backend() == "cpu" else "compare_all"
    return jnp.searchsorted(ends, values, side="right", method=method)


def dequantize_all(experts: Experts) -> Experts:
    """The same operands with every quantised part dense, for backends that take whole [E, O, I] arrays."""
    is_quantized = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    return jax.tree.map(
        lambda leaf: jax.vmap(Quantized.dequantize)(leaf) if is_quantized(leaf) else leaf, experts, is_leaf=is_quantized
    )


@jax.tree_util.register_static
class Wanted(tuple[bool, ...]):
    """Which leaves somebody differentiates by: a backward pass computes their gradients and keeps the others fixed."""

    def of(self, leaves: Sequence[Any]) -> list[Any]:
        """The wanted ones among all leaves."""
        return [leaf for leaf, want in zip(leaves, self, strict=True) if want]

    def put(self, values: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        """All leaves, with `values` in place of the wanted ones."""
        new = iter(values)
        return [next(new) if want else leaf for leaf, want in zip(leaves, self, strict=True)]

    def gradients(self, function: Callable[[Any], Array], operands: Any, grad: Array) -> list[Array]:
        """Those of the wanted leaves of `operands`, from the gradient of what `function` makes of these."""
        leaves, tree = jax.tree.flatten(operands)
        of_wanted = lambda values: function(jax.tree.unflatten(tree, self.put(values, leaves)))  # noqa: E731
        return jax.vjp(of_wanted, self.of(leaves))[1](grad)[0]


# The logical axes of a dense operand, by the order of `Experts`.
EXPERT_AXES: Final = (
    ("experts", "expert_ffn", "embed"),
    ("experts", "expert_ffn", "embed"),
    ("experts", "embed", "expert_ffn"),
)


def leaf_axes(operand: Operand, axes: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
    """The logical axes of each of the operand's leaves, where a dense one has `axes`.

    Tiles of quantised values may run across rows, so these are split over experts alone.
    """
    experts, out, into = axes
    match operand:
        case LowRank():
            return [*leaf_axes(operand.base, axes), (experts, None, into), (experts, out, None)]
        case Quantized():
            return [(experts, *(None,) * (leaf.ndim - 1)) for leaf in jax.tree.leaves(operand)]
        case _:
            return [axes]
