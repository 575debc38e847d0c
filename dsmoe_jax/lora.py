"""Low-rank adapters (LoRA, arXiv 2106.09685) on any projection, those of every routed expert included.

Start at `attach`. An adapter is a flat dict of arrays beside the model's own: for each adapted parameter NAME its
factors `NAME.lora_a` and `NAME.lora_b`, and whole tensors under their own names that take the place of the base's. The
plan says which parameters those are; from Hugging Face's module names it is made in `convert.peft_matching`.
"""

import dataclasses
import math
import zlib
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
from dsmoe_jax.model import ParamSpec, abstract
from dsmoe_jax.sharding import sharding

LORA_A, LORA_B = ".lora_a", ".lora_b"
_LARGEST: Final = 1e30  # fits float32, with room for a product
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is adapted, and how; the fields, and what they match, are those of the peft library."""

    r: int = 8
    lora_alpha: float = 32
    target_modules: tuple[str, ...] | str = PROJECTIONS  # ends of module paths; a string: a regex over whole paths
    lora_dropout: float = 0.0
    use_rslora: bool = False  # scale α / √r (arXiv 2312.03732), not α / r
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # regex over paths -> r
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)  # regex over paths -> lora_alpha
    modules_to_save: tuple[str, ...] = ()  # ends of module paths: trained whole
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | None = None

    def __post_init__(self) -> None:
        """`ValueError` for a value that means nothing."""
        ranks = ((f"rank_pattern {key!r:.80}", r) for key, r in self.rank_pattern.items())
        for name, value in (("r", self.r), *ranks):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _LARGEST:
                raise DSMoEError(f"{name} must be a whole number of at least 1, not {show_value(value)}")
        alphas = ((f"alpha_pattern {key!r:.80}", alpha) for key, alpha in self.alpha_pattern.items())
        for name, value in (("lora_alpha", self.lora_alpha), *alphas):
            if not abs(value) <= _LARGEST:  # NaN is not, either
                raise DSMoEError(f"{name} must be a finite number, at most {_LARGEST:g}, not {show_value(value)}")
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise DSMoEError("layers_to_transform goes with a list of target_modules, not with a regular expression")
        if self.layers_pattern and not self.layers_to_transform:
            raise DSMoEError("layers_pattern goes with layers_to_transform")
        if not 0 <= self.lora_dropout < 1:
            raise DSMoEError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout}")


class Target(NamedTuple):
    """An adapted parameter: rank and scale of each of its matrices, one or as many as there are experts."""

    ranks: tuple[int, ...]  # 0: this expert is not adapted
    scales: tuple[float, ...]

    @property
    def width(self) -> int:
        """The rank of the stored factors; those of lower rank are filled up with zeros, which stay zeros."""
        return max(self.ranks)


class Plan(NamedTuple):
    """What an adapter holds: the adapted parameters, and those that it replaces."""

    targets: Mapping[str, Target]
    saved: tuple[str, ...] = ()
    dropout: float = 0.0


def specs(plan: Plan, config: ModelConfig) -> dict[str, ParamSpec]:
    """Shape, logical axes and initialiser of every array of an adapter.

    A is drawn from U(-1/√in, 1/√in) and B is zero, as in peft; what is saved whole is as in the model.
    """
    base, found = abstract(config)[1], {}
    for name, target in plan.targets.items():
        *experts, out, into = base[name].shape
        *expert_axis, out_axis, in_axis = base[name].axes
        draw, zero = Initializer("uniform", into**-0.5), Initializer("constant", 0)
        found[name + LORA_A] = ParamSpec((*experts, target.width, into), (*expert_axis, None, in_axis), draw)
        found[name + LORA_B] = ParamSpec((*experts, out, target.width), (*expert_axis, out_axis, None), zero)
    return found | {name: base[name] for name in plan.saved}


def init(plan: Plan, config: ModelConfig, base: Mapping[str, Operand], key: PRNGKeyArray) -> dict[str, Array]:
    """A fresh adapter, fp32, that changes nothing yet; traceable. What is saved whole is a copy of the base's."""
    found = {}
    for name, spec in specs(plan, config).items():
        if name in base:
            found[name] = _dense(base[name]).astype(jnp.float32)
        else:
            found[name] = spec.initializer.draw(_key_of(name, key), spec.shape, jnp.float32)
    for name, target in plan.targets.items():
        found[name + LORA_A] *= _rows_in_use(target, found[name + LORA_A].ndim)
    return found


def shardings(plan: Plan, config: ModelConfig, mesh: Mesh | None) -> dict[str, Sharding]:
    """Where every array of an adapter lies: split as the weight it stands beside, but for its rank."""
    return {name: sharding(name, spec.shape, spec.axes, mesh) for name, spec in specs(plan, config).items()}


def place(
    plan: Plan, config: ModelConfig, adapter: Mapping[str, np.ndarray], base: Mapping[str, Operand]
) -> dict[str, Array]:
    """The arrays of an adapter on the devices that the base lies on."""
    beside = jax.tree.leaves(dict(base))[0].sharding
    places = shardings(plan, config, getattr(beside, "mesh", None))
    return {name: jax.device_put(value, places[name]) for name, value in adapter.items()}


def attach(
    plan: Plan, base: Mapping[str, Operand], adapter: Mapping[str, Array], dropout_key: PRNGKeyArray | None = None
) -> dict[str, Any]:
    """The model's parameters with the adapter on them, nothing multiplied out; traceable.

    With a key, inputs of the factors are dropped: here by column, the same ones for all tokens of the call, so that
    every kernel, device and recomputation drops the same. peft draws for each token by itself; the mean is equal.
    """
    params: dict[str, Any] = dict(base)
    for name, target in plan.targets.items():
        a, b = adapter[name + LORA_A], adapter[name + LORA_B]
        if dropout_key is not None and plan.dropout:
            columns = (*a.shape[:-2], 1, a.shape[-1])
            kept = jax.random.bernoulli(_key_of(name, dropout_key), 1 - plan.dropout, columns)
            a = jnp.where(kept, a / (1 - plan.dropout), 0)
        params[name] = LowRank(base[name], a, b * _beside(target.scales, b.ndim))
    return params | {name: adapter[name] for name in plan.saved}


def merge(plan: Plan, base: Mapping[str, Operand], adapter: Mapping[str, Array]) -> dict[str, Array]:
    """The model's parameters with the adapter multiplied into them, W + (B A) · s, each in the dtype it had.

    Quantised ones become fp32. Summed in fp32, as peft does it.
    """
    params = {name: _dense(value) for name, value in base.items()}
    for name, target in plan.targets.items():
        a, b = adapter[name + LORA_A], adapter[name + LORA_B]
        delta = jnp.matmul(b, a, precision="highest") * _beside(target.scales, b.ndim)
        params[name] = (params[name].astype(jnp.float32) + delta).astype(params[name].dtype)
    return params | {name: adapter[name].astype(params[name].dtype) for name in plan.saved}


def count(plan: Plan, config: ModelConfig) -> int:
    """How many values are trained; what fills up lower ranks is not counted."""
    base = abstract(config)[1]
    factors = sum(sum(base[name].shape[-2:]) * sum(target.ranks) for name, target in plan.targets.items())
    return factors + sum(math.prod(base[name].shape) for name in plan.saved)


def _rows_in_use(target: Target, ndim: int) -> np.ndarray:
    """One for each row of A that belongs to the rank of its matrix, zero for those that fill it up."""
    return (np.arange(target.width, dtype=np.float32)[:, None] < _beside(target.ranks, ndim)).astype(np.float32)


def _beside(values: Sequence[float], ndim: int) -> np.ndarray:
    """In a shape that multiplies a stack [E, …, …] by each expert's value, or one matrix."""
    return np.asarray(values, np.float32).reshape(*(-1,) * (ndim - 2), 1, 1)


def _dense(operand: Operand) -> Array:
    if not isinstance(operand, Quantized):
        return operand  # type: ignore[return-value]
    one = Quantized.dequantize
    return (jax.vmap(one) if operand.codes.ndim == 3 else one)(operand)


def _key_of(name: str, key: PRNGKeyArray) -> PRNGKeyArray:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
