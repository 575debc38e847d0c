"""Low-rank adapters (LoRA, arXiv 2106.09685) on any projection, routed experts included.

Start at `attach`. An adapter is a flat dict of arrays: the factors `NAME.lora_a` and `NAME.lora_b` of each adapted
parameter NAME, and full tensors that replace parameters of the base. Its `Plan` lists both; `convert.peft_matching`
creates plans from Hugging Face's module names.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from dsmoe_jax.axes import Array, PRNGKeyArray
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.config_aliases import show_value
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.operand import LowRank, Operand, Quantized
from dsmoe_jax.layers.weights import Initializer
from dsmoe_jax.model import ParamSpec, abstract, key_of
from dsmoe_jax.sharding import sharding

LORA_A, LORA_B = ".lora_a", ".lora_b"
_LARGEST: Final = 1e30  # fits float32, with room for a product
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Configuration of an adapter; fields and module matching are those of the peft library.

    Attributes:
        r: Rank of the adapters.
        lora_alpha: α of the scale α / r that multiplies every adapter.
        target_modules: Suffixes of module paths to adapt, or a regex over full paths.
        lora_dropout: Dropout rate of the input of A in training, in [0, 1).
        use_rslora: Scale by α / √r instead of α / r (arXiv 2312.03732).
        rank_pattern: `r` by regex over module paths. Default: `r` everywhere.
        alpha_pattern: `lora_alpha` by regex over module paths. Default: `lora_alpha` everywhere.
        modules_to_save: Suffixes of paths of modules to train in full. Default: none.
        layers_to_transform: Indices of the layers to adapt. Default: all.
        layers_pattern: Name of the list of layers in module paths, with `layers_to_transform`. Default: any name.

    Raises:
        DSMoEError: A field is out of range, or fields contradict each other.
    """

    r: int = 8
    lora_alpha: float = 32
    target_modules: tuple[str, ...] | str = PROJECTIONS
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | None = None

    def __post_init__(self) -> None:
        """Validate all fields."""
        ranks = ((f"rank_pattern {key!r:.80}", r) for key, r in self.rank_pattern.items())
        for name, value in (("r", self.r), *ranks):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _LARGEST:
                raise DSMoEError(f"{name} must be an integer of at least 1, got {show_value(value)}")
        alphas = ((f"alpha_pattern {key!r:.80}", alpha) for key, alpha in self.alpha_pattern.items())
        for name, value in (("lora_alpha", self.lora_alpha), *alphas):
            if not abs(value) <= _LARGEST:  # also rejects NaN
                raise DSMoEError(f"{name} must be a finite number, at most {_LARGEST:g}, got {show_value(value)}")
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise DSMoEError("layers_to_transform needs a list of target_modules, not a regex")
        if self.layers_pattern and not self.layers_to_transform:
            raise DSMoEError("layers_pattern needs layers_to_transform")
        if not 0 <= self.lora_dropout < 1:
            raise DSMoEError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")


class Target(NamedTuple):
    """An adapted parameter: one matrix, or one per expert."""

    ranks: tuple[int, ...]  # of each matrix; 0: not adapted
    scales: tuple[float, ...]  # of each matrix

    @property
    def width(self) -> int:
        """The rank of the stored factors; lower ranks are zero-padded, and the padding stays zero."""
        return max(self.ranks)


class Plan(NamedTuple):
    """The parameters of an adapter."""

    targets: Mapping[str, Target]  # the adapted parameters of the base, by name
    saved: tuple[str, ...] = ()  # the parameters replaced in full
    dropout: float = 0.0


def specs(plan: Plan, config: ModelConfig) -> dict[str, ParamSpec]:
    """Declare every array of an adapter: A is drawn from U(-1/√in, 1/√in), B is zero, as in peft."""
    base, found = abstract(config)[1], {}
    for name, target in plan.targets.items():
        *experts, out, into = base[name].shape
        *expert_axis, out_axis, in_axis = base[name].axes
        draw, zero = Initializer("uniform", into**-0.5), Initializer("constant", 0)
        found[name + LORA_A] = ParamSpec((*experts, target.width, into), (*expert_axis, None, in_axis), draw)
        found[name + LORA_B] = ParamSpec((*experts, out, target.width), (*expert_axis, out_axis, None), zero)
    return found | {name: base[name] for name in plan.saved}


def init(plan: Plan, config: ModelConfig, base: Mapping[str, Operand], key: PRNGKeyArray) -> dict[str, Array]:
    """Initialize an adapter in fp32 that leaves the model unchanged; traceable."""
    found = {}
    for name, spec in specs(plan, config).items():
        if name in base:
            found[name] = _dense(base[name]).astype(jnp.float32)
        else:
            found[name] = spec.initializer.draw(key_of(name, key), spec.shape, jnp.float32)
    for name, target in plan.targets.items():
        found[name + LORA_A] *= _rank_mask(target, found[name + LORA_A].ndim)
    return found


def shardings(plan: Plan, config: ModelConfig, mesh: Mesh | None) -> dict[str, Sharding]:
    """Return the sharding of every array of an adapter: that of its weight, replicated along the rank."""
    return {name: sharding(name, spec.shape, spec.axes, mesh) for name, spec in specs(plan, config).items()}


def place(
    plan: Plan, config: ModelConfig, adapter: Mapping[str, np.ndarray], base: Mapping[str, Operand]
) -> dict[str, Array]:
    """Move the arrays of an adapter to the devices of the base."""
    mesh = getattr(jax.tree.leaves(dict(base))[0].sharding, "mesh", None)
    places = shardings(plan, config, mesh)
    return {name: jax.device_put(value, places[name]) for name, value in adapter.items()}


def attach(
    plan: Plan, base: Mapping[str, Operand], adapter: Mapping[str, Array], dropout_key: PRNGKeyArray | None = None
) -> dict[str, Any]:
    """Add an adapter to the parameters of a model without merging; traceable.

    With a key, dropout drops columns of A for all tokens of the call, so that all kernels, devices and recomputations
    agree; peft draws per token, with the same mean.
    """
    params: dict[str, Any] = dict(base)
    for name, target in plan.targets.items():
        a, b = adapter[name + LORA_A], adapter[name + LORA_B]
        if dropout_key is not None and plan.dropout:
            columns = (*a.shape[:-2], 1, a.shape[-1])
            keep = jax.random.bernoulli(key_of(name, dropout_key), 1 - plan.dropout, columns)
            a = jnp.where(keep, a / (1 - plan.dropout), 0)
        params[name] = LowRank(base[name], a, b * _per_matrix(target.scales, b.ndim))
    return params | {name: adapter[name] for name in plan.saved}


def merge(plan: Plan, base: Mapping[str, Operand], adapter: Mapping[str, Array]) -> dict[str, Array]:
    """Merge an adapter: W + (B A) · s, summed in fp32 as in peft, in the dtype of W (fp32 if quantized)."""
    params = {name: _dense(value) for name, value in base.items()}
    for name, target in plan.targets.items():
        a, b = adapter[name + LORA_A], adapter[name + LORA_B]
        delta = jnp.matmul(b, a, precision="highest") * _per_matrix(target.scales, b.ndim)
        params[name] = (params[name].astype(jnp.float32) + delta).astype(params[name].dtype)
    return params | {name: adapter[name].astype(params[name].dtype) for name in plan.saved}


def count(plan: Plan, config: ModelConfig) -> int:
    """Count the trainable parameters, without the padding of lower ranks."""
    base = abstract(config)[1]
    factors = sum(sum(base[name].shape[-2:]) * sum(target.ranks) for name, target in plan.targets.items())
    return factors + sum(math.prod(base[name].shape) for name in plan.saved)


def _rank_mask(target: Target, ndim: int) -> np.ndarray:
    """Return 1 for the rows of A within the rank of their matrix, 0 for padding."""
    return (np.arange(target.width, dtype=np.float32)[:, None] < _per_matrix(target.ranks, ndim)).astype(np.float32)


def _per_matrix(values: Sequence[float], ndim: int) -> np.ndarray:
    """Reshape one value per matrix to broadcast over [E, …, …] or […, …]."""
    return np.asarray(values, np.float32).reshape(*(-1,) * (ndim - 2), 1, 1)


def _dense(operand: Operand) -> Array:
    if not isinstance(operand, Quantized):
        return operand  # type: ignore[return-value]
    one = Quantized.dequantize
    return (jax.vmap(one) if operand.codes.ndim == 3 else one)(operand)
