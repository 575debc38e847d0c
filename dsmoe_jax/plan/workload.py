"""What a training step holds and computes on a device of a mesh, from configs alone: `Workload`."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import base_config, make_plan
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.info import part_of
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import ParamSpec, abstract, layers_of, short
from dsmoe_jax.quantize import kind_of, quantized_spec
from dsmoe_jax.sharding import BATCH_AXES, EXPERT, abstract_mesh, check_count, shard_shape
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.optimizer import make_optimizer
from dsmoe_jax.train.shape import MAX_LENGTH, fit_batch_size
from dsmoe_jax.train.step import TrainState, init_state

_UNLIMITED: Final = 1 << 30  # sequences


class Weight(NamedTuple):
    """A parameter of equal layers."""

    name: str  # in one of the layers
    spec: ParamSpec
    count: int  # layers that have it

    def elements(self, mesh: AbstractMesh, *, gather: str = "") -> int:
        """Return the elements on a device, of all layers; with `gather`, as if not sharded over that mesh axis."""
        return self.count * math.prod(shard_shape(self.name, self.spec.shape, self.spec.axes, mesh, gather=gather))

    @property
    def part(self) -> str:
        """The part of the model, as in `dsmoe info`."""
        return part_of(self.name)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step on a mesh.

    Attributes:
        config: The run; data and output are not read.
        model: The model, with a separate head if an adapter replaces a tied one.
        mesh: The mesh, without devices.
        sequences: Sequences of the global batch.
        length: Tokens per sequence.
        dtype: Storage dtype of a frozen base.
    """

    config: RunConfig
    model: ModelConfig
    mesh: AbstractMesh
    sequences: int
    length: int
    dtype: Any = jnp.bfloat16

    @classmethod
    def of(cls, config: RunConfig, model: ModelConfig, devices: int, *, dtype: Any = jnp.bfloat16) -> "Workload":
        """Return the step of a run on this number of devices.

        Raises:
            DSMoEError: The mesh does not divide the devices, the model or the batch.
        """
        mesh = abstract_mesh(config.mesh, devices)
        check_count(model.num_attention_heads, "attention heads", "heads", mesh)
        check_count(model.num_kv_heads, "key-value heads", "kv_heads", mesh)
        if (adapter := getattr(config, "lora", None)) is not None:
            model = base_config(make_plan(adapter, short(model)), model)
        length = config.data.sequence_length or min(MAX_LENGTH, model.context_length)
        parts = config.step.gradient_accumulation_steps
        multiple = parts * math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        sequences = config.data.batch_size or fit_batch_size(_UNLIMITED, multiple)
        if sequences % multiple:
            why = f"{multiple // parts} data-parallel devices × {parts} gradient-accumulation steps"
            raise DSMoEError(f"data.batch_size must be a multiple of {multiple} ({why}), got {sequences}")
        found = cls(config, model, mesh, sequences, length, dtype)
        for weight in found.base:
            weight.elements(mesh)  # raises for axes that do not divide
        return found

    def ways(self, *axes: str) -> int:
        """Return the devices along mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def parts(self) -> int:
        """Micro-batches per step."""
        return self.config.step.gradient_accumulation_steps

    @property
    def rows(self) -> int:
        """Sequences of a device in a micro-batch."""
        return self.sequences // self.parts // self.ways(*BATCH_AXES)

    @property
    def tokens(self) -> int:
        """Tokens of a device in a micro-batch."""
        return self.rows * self.length

    @property
    def adapter(self) -> LoraConfig | None:
        """The low-rank adapters, None if all parameters are trained."""
        return getattr(self.config, "lora", None)

    @property
    def scheme(self) -> str | None:
        """The quantization of the frozen base."""
        return getattr(self.config, "quantize", None)

    @functools.cached_property
    def moe_layers(self) -> int:
        """The number of MoE layers."""
        return sum(map(self.model.is_moe_layer, range(self.model.num_hidden_layers)))

    @functools.cached_property
    def base(self) -> tuple[Weight, ...]:
        """The parameters of the model."""
        return _weights(self.model, abstract(short(self.model))[1])

    @functools.cached_property
    def trained(self) -> tuple[Weight, ...]:
        """The parameters that are trained: those of the model or of the adapters."""
        if self.adapter is None:
            return self.base
        model = self.model if _names_layers(self.adapter) else short(self.model)
        plan = make_plan(self.adapter, model)
        specs = lora.specs(plan, base_config(plan, model))
        if model is self.model:
            return tuple(Weight(name, spec, 1) for name, spec in specs.items())
        return _weights(self.model, specs)

    def state_bytes(self) -> Mapping[str, int]:
        """Return the bytes of parameters, optimizer state and counters on a device."""
        held: collections.Counter[str] = collections.Counter()
        named = {weight.name: weight for weight in self.trained}
        params = {name: jax.ShapeDtypeStruct(weight.spec.shape, jnp.float32) for name, weight in named.items()}
        leaves = jax.tree_util.tree_flatten_with_path(_state(self.model, params, self.config))[0]
        for path, leaf in leaves:
            weight = named.get(str(getattr(path[-1], "key", "")))
            kind = "parameters" if path[0].name == "params" else "optimizer"
            if weight is None:
                held["other"] += leaf.size * leaf.dtype.itemsize
            elif weight.spec.shape == leaf.shape:
                held[kind] += weight.elements(self.mesh) * leaf.dtype.itemsize
            else:  # factored moments are replicated
                held[kind] += weight.count * leaf.size * leaf.dtype.itemsize
        return held

    def frozen_bytes(self) -> int:
        """Return the bytes of the frozen base on a device."""
        if self.adapter is None:
            return 0
        return sum(self._stored_bytes(weight) for weight in self.base)

    def _stored_bytes(self, weight: Weight) -> int:
        if self.scheme is None or not kind_of(weight.name):
            return weight.elements(self.mesh) * jnp.dtype(self.dtype).itemsize
        leaves = jax.tree.leaves(_quantized(weight.spec.shape, self.scheme))
        ways = self.ways(EXPERT) if len(weight.spec.shape) == 3 else 1  # tiles span rows: sharded over experts alone
        return weight.count * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // ways

    def argument_bytes(self) -> int:
        """Return the bytes of the arguments of the step on a device: state, batch and frozen base."""
        batch = 4 * 4 * self.sequences * self.length // self.ways(*BATCH_AXES)
        return sum(self.state_bytes().values()) + batch + self.frozen_bytes()

    def elements(self, *parts: str, gather: str = "") -> int:
        """Return the elements of parts of the model on a device; all parts by default."""
        chosen = [weight for weight in self.base if not parts or weight.part in parts]
        return sum(weight.elements(self.mesh, gather=gather) for weight in chosen)


def _weights(config: ModelConfig, specs: Mapping[str, ParamSpec]) -> tuple[Weight, ...]:
    """Return the parameters of a model from those of its short form."""
    counted = (Weight(name, spec, layers_of(config, name)) for name, spec in specs.items())
    return tuple(weight for weight in counted if weight.count)


def _names_layers(adapter: LoraConfig) -> bool:
    """Whether layers of an adapter may differ."""
    targets = adapter.target_modules
    names = [targets] if isinstance(targets, str) else targets
    patterns = (*names, *adapter.rank_pattern, *adapter.alpha_pattern, *adapter.modules_to_save)
    return bool(adapter.layers_to_transform) or any(re.search(r"\d", pattern) for pattern in patterns)


def _state(config: ModelConfig, params: Mapping[str, Any], run: RunConfig) -> TrainState:
    """Return the shapes of the training state."""
    optimizer, _ = make_optimizer(run.optimizer, max(run.steps, 1))
    return jax.eval_shape(lambda params: init_state(config, params, optimizer, run.step), dict(params))


@functools.lru_cache(maxsize=256)
def _quantized(shape: tuple[int, ...], scheme: str) -> Any:
    return quantized_spec(shape, scheme)
