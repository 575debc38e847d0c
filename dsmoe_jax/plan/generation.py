"""The plan of generation: memory, and the time of prefill and decode. Start at `GenerationPlan`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.memory_plan import MemoryPlan, weight_bytes
from dsmoe_jax.info import count_parameters, part_of
from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.roofline import RANGE
from dsmoe_jax.progress import byte_size
from dsmoe_jax.sharding import DATA, FSDP, TENSOR, MeshConfig, abstract_mesh, check_count

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
        prefill_chunk: Tokens of a prompt per call of the model.
        dtype: Of the weights.
        cache_dtype: Of the KV cache.
        quantize: Quantization of the weights.
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
    prefill_chunk: int
    dtype: str
    cache_dtype: Any
    quantize: str | None
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
            DSMoEError: A number is too small, or the mesh does not divide the devices or the model.
        """
        for name, value, least in (("max_batch_size", batch_size, 1), ("context_length", max_length, 2)):
            if value < least:
                raise DSMoEError(f"{name} must be at least {least}, got {value}")
        axes, on_cpu = abstract_mesh(mesh, devices), card.platform == "cpu"
        if quantize and axes.shape[TENSOR] > 1:
            raise DSMoEError(f"quantize {quantize} cannot be sharded over tensor={axes.shape[TENSOR]}")
        check_count(model.num_attention_heads, "attention heads", "heads", axes)
        check_count(model.num_kv_heads, "key-value heads", "kv_heads", axes)
        chunk = min(_PREFILL_CHUNK[card.platform], max_length)
        cached: Any = jnp.dtype(cache_dtype or (jnp.float32 if on_cpu else DTYPES[dtype]))
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "quantize": quantize, "upcast": on_cpu}
        shape = {"batch_size": batch_size, "max_length": max_length, "prefill_chunk": chunk, "cache_dtype": cached}
        memory = MemoryPlan.of(model, mesh=axes, **shape, **options)
        longest = max(0, int((card.usable - (memory.total - memory.cache)) * batch_size / max(memory.cache, 1)))

        held = weight_bytes(model, axes, **options)
        experts = sum(size for name, size in held.items() if part_of(name) == "routed experts")
        gathered = 0
        if axes.shape[FSDP] > 1:
            sizes = dict(axes.shape) | {FSDP: 1, DATA: axes.shape[DATA] * axes.shape[FSDP]}
            whole = weight_bytes(model, abstract_mesh(MeshConfig(**sizes), axes.size), **options)
            gathered = sum(size - held[name] for name, size in whole.items())
        # Experts that a batch reads, of those of a device: each is chosen with probability K / E per token.
        E, K = model.n_routed_experts or 1, model.num_experts_per_tok or 1
        read = memory.weights - experts * (1 - K / E) ** batch_size
        slow, fast = (
            batch_size
            / ((read + memory.cache * full) / (card.bandwidth * one.bandwidth) + gathered / (card.link * one.link))
            for one, full in zip(RANGE, (1.0, 0.5), strict=True)  # the cache is full, or half full on average
        )
        counts = count_parameters(model)
        flops = 2 * (counts.activated - counts.parts["embedding"])
        prefill = (card.flops * RANGE[0].experts * axes.size / flops, card.flops * RANGE[1].experts * axes.size / flops)
        return cls(
            model,
            axes,
            card,
            batch_size,
            max_length,
            chunk,
            dtype,
            cached,
            quantize,
            memory,
            longest,
            (slow, fast),
            prefill,
            gathered,
        )

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.card.usable

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.memory} of {byte_size(self.card.usable)} per device"
