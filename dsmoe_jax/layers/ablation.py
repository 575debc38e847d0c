"""`Ablation`: another selection of experts at inference, without changing weights (arXiv 2401.06066, section 4.5)."""

import contextlib
import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.layers.router import Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """Experts that a model does not use; each token then selects among the remaining ones, with their own scores.

    Attributes:
        disable_top: Number of routed experts of the highest scores that a token does not use (fig. 4).
        active: Routed experts per token (fig. 5). Default: `num_experts_per_tok`, and one more if `shared` is False.
        shared: Whether the shared experts are used.
        disabled: Routed experts that no token uses, by layer, or a sequence for every MoE layer.
    """

    disable_top: int = 0
    active: int | None = None
    shared: bool = True
    disabled: Mapping[int, Sequence[int]] | Sequence[int] = dataclasses.field(default=(), hash=False)

    def __post_init__(self):
        """Check the types.

        Raises:
            DSMoEError: A number is too small, or a value of another type.
        """
        object.__setattr__(self, "disable_top", _integer("disable_top", self.disable_top, 0))
        if self.active is not None:
            object.__setattr__(self, "active", _integer("active", self.active, 1))
        if type(self.shared) is not bool:
            raise DSMoEError(f"ablation.shared must be True or False, got {self.shared!r}")
        disabled = self.disabled
        if isinstance(disabled, Mapping):
            disabled = {_integer("disabled", layer, 0): _ids(ids) for layer, ids in disabled.items()}
        else:
            disabled = _ids(disabled)
        object.__setattr__(self, "disabled", disabled)

    def apply(self, config: ModelConfig, layers: Mapping[int, Any]) -> None:
        """Set the selection of MoE layers in place.

        Args:
            config: Config of the model.
            layers: MoE layers by index.

        Raises:
            DSMoEError: The model does not have what is disabled, or too few experts are left.
        """
        experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        if not layers or experts is None or top_k is None:
            raise DSMoEError("ablation needs a model with routed experts")
        if config.hash_routing and self != Ablation():
            raise DSMoEError("ablation needs a router; with topk_method 'hash' tokens have one expert")
        if not self.shared and config.n_shared_experts is None:
            raise DSMoEError("ablation.shared is False, but the model has no shared experts")
        active = top_k + (not self.shared) if self.active is None else self.active
        by_layer = self.disabled if isinstance(self.disabled, Mapping) else dict.fromkeys(layers, self.disabled)
        for layer, disabled in by_layer.items():
            if layer not in layers:
                raise DSMoEError(f"ablation.disabled names layer {layer}; MoE layers are {_ranges(layers)}")
            for expert in disabled:
                if expert >= experts:
                    raise DSMoEError(f"ablation.disabled: layer {layer} has experts 0 to {experts - 1}, got {expert}")
        for layer, moe in layers.items():
            disabled = tuple(by_layer.get(layer, ()))
            left = experts - len(disabled) - self.disable_top
            if active > left:
                raise DSMoEError(f"{active} experts are active, but layer {layer} has {max(left, 0)} of {experts} left")
            moe.router.selection = Selection(active, self.disable_top, disabled)
            moe.use_shared = self.shared


def _integer(name: str, value: Any, least: int) -> int:
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    raise DSMoEError(f"ablation.{name} must be an integer of at least {least}, got {value!r}")


def _ids(value: Any) -> tuple[int, ...]:
    """Return expert ids, ascending, each once."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise DSMoEError(f"ablation.disabled must be ids of experts, or ids by layer, got {value!r}")
    return tuple(sorted({_integer("disabled", expert, 0) for expert in value}))


def _ranges(layers: Mapping[int, Any]) -> str:
    """Format ascending indices: "1 to 27"."""
    first, last = min(layers), max(layers)
    return f"{first} to {last}" if len(layers) == last - first + 1 else ", ".join(map(str, layers))
