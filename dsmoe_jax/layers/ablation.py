"""`Ablation`: another selection of experts at inference, without changing weights (arXiv 2401.06066, section 4.5)."""

import dataclasses
from collections.abc import Mapping, Sequence
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
    disabled: Mapping[int, Sequence[int]] | Sequence[int] = ()

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
        for name, value, low in (("disable_top", self.disable_top, 0), ("active", active, 1)):
            if type(value) is not int or value < low:
                raise DSMoEError(f"ablation.{name} must be an integer of at least {low}, got {value!r}")
        by_layer = self.disabled if isinstance(self.disabled, Mapping) else dict.fromkeys(layers, self.disabled)
        for layer, disabled in by_layer.items():
            if layer not in layers:
                raise DSMoEError(f"ablation.disabled names layer {layer}; MoE layers are {_ranges(layers)}")
            for expert in disabled:
                if not 0 <= expert < experts:
                    raise DSMoEError(f"ablation.disabled: layer {layer} has experts 0 to {experts - 1}, got {expert}")
        for layer, moe in layers.items():
            disabled = tuple(sorted(set(by_layer.get(layer, ()))))
            left = experts - len(disabled) - self.disable_top
            if active > left:
                raise DSMoEError(f"layer {layer} has {max(left, 0)} experts left of {experts}; {active} are active")
            moe.router.selection = Selection(active, self.disable_top, disabled)
            moe.use_shared = self.shared


def _ranges(layers: Mapping[int, Any]) -> str:
    """Format ascending indices: "1 to 27"."""
    first, last = min(layers), max(layers)
    return f"{first} to {last}" if len(layers) == last - first + 1 else ", ".join(map(str, layers))
