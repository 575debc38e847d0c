"""The plan of generation: memory, and the time of prefill and decode. Start at `GenerationPlan`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate.memory_plan import MemoryPlan, weight_bytes
from dsmoe_jax.info import count_parameters, part_of
from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.roofline import RANGE
from dsmoe_jax.sharding import FSDP, MeshConfig, abstract_mesh, check_count

_PREFILL_CHUNK = {"gpu": 2048, "cpu": 512}  # tokens, as `generate.loading.default_prefill_chunk`


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """What generation needs of every device.

    Attributes:
        model: The model.
        mesh: The mesh, without devices.
        card: The device.
        batch_size: Outputs generated at once.
        max_length: Tokens of each, prompt included.
        memory: Bytes on a device.
        longest: Outputs at once for which the memory suffices.
        decode: Tokens per second of all devices, slow and fast.
        prefill: Prompt tokens per second, slow and fast.
        gathered: Bytes of weights that a step gathers over fsdp.
    """

    model: ModelConfig
    mesh: AbstractMesh
    card: Card
    batch_size: int
    max_length: int
    memory: MemoryPlan
    longest: int
    decode: tuple[float, float]
    prefill: tuple[float, float]
    gathered: int

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        mesh: MeshConfig,
        devices: int,
        card: Card,
        *,
        batch_size: int = 64,
        max_length: int = 4096,
        dtype: str = "bfloat16",
        cache_dtype: str | None = None,
        quantize: str | None = None,
    ) -> "GenerationPlan":
        """Plan generation.

        Args:
            model: The model.
            mesh: The axis sizes.
            devices: Number of devices.
            card: The device.
            batch_size: Outputs generated at once.
            max_length: Tokens of each, prompt included.
            dtype: Of the weights.
            cache_dtype: Of the KV cache; default: that of the weights.
            quantize: Quantization of the weights.

        Returns:
            The plan; it may not fit.

        Raises:
            DSMoEError: The mesh does not divide the devices or the model.
        """
        axes = abstract_mesh(mesh, devices)
        check_count(model.num_attention_heads, "attention heads", "heads", axes)
        check_count(model.num_kv_heads, "key-value heads", "kv_heads", axes)
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "quantize": quantize, "mesh": axes, "max_length": max_length}
        options |= {"cache_dtype": None if cache_dtype is None else jnp.dtype(cache_dtype)}
        options |= {"prefill_chunk": _PREFILL_CHUNK[card.platform], "upcast": card.platform == "cpu"}
        plan = MemoryPlan.of(model, batch_size=batch_size, **options)
        rest = card.usable - (plan.total - plan.cache)
        longest = max(0, int(rest * batch_size / max(plan.cache, 1)))
        weights = weight_bytes(model, axes, DTYPES[dtype], quantize, upcast=card.platform == "cpu")
        experts = sum(size for name, size in weights.items() if part_of(name) == "routed experts")
        gathered = (plan.weights - experts) * (axes.shape[FSDP] - 1)
        gathered += 0 if quantize else experts * (axes.shape[FSDP] - 1)
        # Experts that a batch reads, of those of a device: each is chosen with probability K / E per token.
        E, K = model.n_routed_experts or 1, model.num_experts_per_tok or 1
        hit = 1 - (1 - K / E) ** batch_size
        read = plan.weights - experts + experts * hit
        decode = tuple(
            batch_size
            / ((read + plan.cache * full) / (card.bandwidth * one.bandwidth) + gathered / (card.link * one.link))
            for one, full in zip(RANGE, (1.0, 0.5), strict=True)  # the cache is full, or half full on average
        )
        counts = count_parameters(model)
        per_token = 2 * (counts.activated - counts.parts["embedding"])
        prefill = tuple(card.flops * one.experts * axes.size / per_token for one in RANGE)
        return cls(model, axes, card, batch_size, max_length, plan, longest, decode, prefill, gathered)  # type: ignore[arg-type]

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.card.usable

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.memory.total / 1e9:.3g} of {self.card.usable / 1e9:.3g} GB per device ({self.memory})"
