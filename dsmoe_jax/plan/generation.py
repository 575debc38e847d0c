"""The plan of generation: memory, and the time of prefill and decode. Start at `GenerationPlan`."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsmoe_jax.checkpoint.native import DTYPES
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.loading import default_prefill_chunk
from dsmoe_jax.generate.memory_plan import MemoryPlan, weight_bytes
from dsmoe_jax.info import count_parameters, part_of
from dsmoe_jax.plan.cards import Card
from dsmoe_jax.plan.collectives import Traffic
from dsmoe_jax.plan.roofline import RANGE, split_by_network
from dsmoe_jax.progress import byte_size
from dsmoe_jax.sharding import DATA, EXPERT, FSDP, TENSOR, MeshConfig, abstract_mesh, check_count


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
        traffic: The communication of a decode step.
        bounds: What takes longest in a decode step: memory, compute, links or network; slow, then fast.
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
    traffic: tuple[Traffic, ...]
    bounds: tuple[str, ...]

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
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
            if value < least:
                raise DSMoEError(f"{name} must be at least {least}, got {value}")
        axes, on_cpu = abstract_mesh(mesh, devices), card.platform == "cpu"
        if quantize and axes.shape[TENSOR] > 1:
            raise DSMoEError(f"quantize {quantize} cannot be sharded over tensor={axes.shape[TENSOR]}")
        check_count(model.num_attention_heads, "attention heads", "heads", axes)
        check_count(model.num_kv_heads, "key-value heads", "kv_heads", axes)
        _check_experts(model, axes)
        chunk = min(default_prefill_chunk(card.platform), max_length)
        cached: Any = jnp.dtype(cache_dtype or (jnp.float32 if on_cpu else DTYPES[dtype]))
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "quantize": quantize, "upcast": on_cpu}
        shape = {"batch_size": batch_size, "max_length": max_length, "prefill_chunk": chunk, "cache_dtype": cached}
        memory = MemoryPlan.of(model, mesh=axes, **shape, **options)
        longest = max(0, int((card.usable - (memory.total - memory.cache)) * batch_size / max(memory.cache, 1)))

        held = weight_bytes(model, axes, **options)
        experts = sum(size for name, size in held.items() if part_of(name) == "routed experts")
        # Experts that a batch reads, of those of a device: each is chosen with probability K / E per token.
        E, K = model.n_routed_experts or 1, model.num_experts_per_tok or 1
        read = memory.weights - experts * (1 - K / E) ** batch_size
        traffic = (*_gathered(model, axes, held, options), *_activations(model, axes, batch_size, card))
        node, network = split_by_network(axes, card, traffic)
        counts = count_parameters(model)
        flops = 2 * (counts.activated - counts.parts["embedding"]) / axes.size
        slow, fast = (
            {
                # The cache is full, or half full on average.
                "memory": (read + memory.cache * full) / (card.bandwidth * one.bandwidth),
                "compute": batch_size * flops / (card.flops * one.experts),
                "links": node / (card.link * one.link),
                "network": network / (card.network * one.link),
            }
            for one, full in zip(RANGE, (1.0, 0.5), strict=True)
        )
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
            (_rate(batch_size, slow), _rate(batch_size, fast)),
            (card.flops * RANGE[0].experts / flops, card.flops * RANGE[1].experts / flops),
            traffic,
            tuple(dict.fromkeys(max(times, key=lambda name: times[name]) for times in (slow, fast))),
        )

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.card.usable

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.memory} of {byte_size(self.card.usable)} per device"


def _check_experts(model: ModelConfig, mesh: AbstractMesh) -> None:
    """Raise for experts that do not divide over the mesh, with the nearest mesh over which they do."""
    experts, ways = model.n_routed_experts or mesh.shape[EXPERT], mesh.shape[EXPERT]
    if (most := math.gcd(experts, ways)) != ways:
        instead = f"data={mesh.shape[DATA] * ways // most},expert={most}"
        raise DSMoEError(f"{experts} routed experts do not divide over expert={ways}; they do with --mesh {instead}")


def _rate(batch_size: int, times: Mapping[str, float]) -> float:
    """Return tokens per second: reading overlaps with computing, communication with neither."""
    return batch_size / (max(times["memory"], times["compute"]) + times["links"] + times["network"])


def _gathered(
    model: ModelConfig, mesh: AbstractMesh, held: Mapping[str, int], options: Mapping[str, Any]
) -> Iterator[Traffic]:
    """All-gathers of weights over fsdp; quantized ones are replicated."""
    if mesh.shape[FSDP] == 1:
        return
    sizes = dict(mesh.shape) | {FSDP: 1, DATA: mesh.shape[DATA] * mesh.shape[FSDP]}
    whole = weight_bytes(model, abstract_mesh(MeshConfig(**sizes), mesh.size), **options)
    size = sum(size for name, size in whole.items() if size != held[name])
    yield Traffic("all-gather", (FSDP,), size, "weights")


def _activations(model: ModelConfig, mesh: AbstractMesh, batch_size: int, card: Card) -> Iterator[Traffic]:
    """Tokens to experts and back, and sums over the tensor axis."""
    L, D, K = model.num_hidden_layers, model.hidden_size, model.num_experts_per_tok or 0
    size, moe = 4 if card.platform == "cpu" else 2, sum(map(model.is_moe_layer, range(L)))
    tokens = -(-batch_size // (mesh.shape[DATA] * mesh.shape[FSDP]))
    if mesh.shape[EXPERT] > 1:
        yield Traffic("all-gather", (EXPERT,), moe * tokens * (D * size + K * (4 + 4)), "tokens")
        yield Traffic("reduce-scatter", (EXPERT,), moe * tokens * D * 4, "sums of experts")
    if mesh.shape[TENSOR] > 1:
        own = -(-tokens // mesh.shape[EXPERT])
        sums = 2 * L + moe * bool(model.n_shared_experts) + 1
        yield Traffic("all-reduce", (TENSOR,), sums * own * D * size, "activations")
