"""What a training step holds and computes on a device of a mesh, from configs alone: `Workload`."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import base_config, make_plan
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.memory_plan import stored_bytes
from dsmoe_jax.info import part_of
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import ParamSpec, abstract, layers_of, short
from dsmoe_jax.quantize import kind_of
from dsmoe_jax.sharding import BATCH_AXES, TENSOR, abstract_mesh, check_count, shard_shape
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.defaults import with_learning_rate
from dsmoe_jax.train.optimizer import make_optimizer
from dsmoe_jax.train.shape import MAX_LENGTH, fit_batch_size
from dsmoe_jax.train.step import init_state

UNLIMITED: Final = 1 << 30  # sequences
_STEPS: Final = 100  # at least; memory and programs do not depend on them


class Weight(NamedTuple):
    """A parameter of equal layers."""

    name: str  # in one of the layers
    spec: ParamSpec
    count: int  # layers that have it

    @property
    def part(self) -> str:
        """The part of the model, as in `dsmoe info`."""
        return part_of(self.name)


class Leaf(NamedTuple):
    """An array of the training state, of equal layers."""

    kind: str  # parameters, optimizer state or other
    weight: Weight | None  # whose sharding it has; None: replicated
    bytes: int  # of all layers, unsharded


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a training step updates and reads, on any mesh.

    Attributes:
        model: The model, with a separate head if an adapter replaces a tied one.
        base: The parameters of the model.
        trained: Those that are trained, or those of the adapters.
        state: The arrays of the training state.
    """

    model: ModelConfig
    base: tuple[Weight, ...]
    trained: tuple[Weight, ...]
    state: tuple[Leaf, ...]

    @classmethod
    def of(cls, config: RunConfig, model: ModelConfig) -> "Parameters":
        """Return those of a run; raise `DSMoEError` for adapters that match no module."""
        adapter = _adapter(config)
        if adapter is None:
            base = trained = _weights(model, abstract(short(model))[1])
        else:
            some = model if _names_layers(adapter) else short(model)
            plan = make_plan(adapter, some)
            model, some = base_config(plan, model), base_config(plan, some)
            base, specs = _weights(model, abstract(short(model))[1]), lora.specs(plan, some)
            whole = tuple(Weight(name, spec, 1) for name, spec in specs.items())
            trained = whole if _names_layers(adapter) else _weights(model, specs)
        return cls(model, base, trained, tuple(_state(config, model, trained)))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step on a mesh.

    Attributes:
        config: The run; data and output are not read.
        parameters: The parameters and their state.
        mesh: The mesh, without devices.
        sequences: Sequences of the global batch.
        length: Tokens per sequence.
        dtype: Storage dtype of a frozen base.
    """

    config: RunConfig
    parameters: Parameters
    mesh: AbstractMesh
    sequences: int
    length: int
    dtype: Any = jnp.bfloat16

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: ModelConfig,
        devices: int,
        *,
        parameters: Parameters | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> "Workload":
        """Return the step of a run on this number of devices; `parameters` saves computing them again.

        Raises:
            DSMoEError: The mesh does not divide the devices, the model or the batch.
        """
        mesh = abstract_mesh(config.mesh, devices)
        check_count(model.num_attention_heads, "attention heads", "heads", mesh)
        check_count(model.num_kv_heads, "key-value heads", "kv_heads", mesh)
        length = config.data.sequence_length or min(MAX_LENGTH, model.context_length)
        parts = config.step.gradient_accumulation_steps
        multiple = parts * math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        sequences = config.data.batch_size or fit_batch_size(UNLIMITED, multiple)
        if sequences % multiple:
            why = f"{multiple // parts} data-parallel devices × {parts} gradient-accumulation steps"
            raise DSMoEError(f"data.batch_size must be a multiple of {multiple} ({why}), got {sequences}")
        found = cls(config, parameters or Parameters.of(config, model), mesh, sequences, length, dtype)
        if found.scheme and found.ways(TENSOR) > 1:
            raise DSMoEError(f"quantize {found.scheme} cannot be sharded over tensor={found.ways(TENSOR)}")
        found.elements()  # raises for axes that do not divide
        return found

    @property
    def model(self) -> ModelConfig:
        """The model."""
        return self.parameters.model

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
    def adapts(self) -> bool:
        """Whether adapters are trained over a frozen base."""
        return _adapter(self.config) is not None

    @property
    def scheme(self) -> str | None:
        """The quantization of the frozen base."""
        return getattr(self.config, "quantize", None)

    @functools.cached_property
    def moe_layers(self) -> int:
        """The number of MoE layers."""
        return sum(map(self.model.is_moe_layer, range(self.model.num_hidden_layers)))

    @functools.cached_property
    def _elements(self) -> dict[tuple[str, str], int]:
        return {}

    def elements_of(self, weight: Weight, gather: str = "") -> int:
        """Return the elements on a device, of all layers; with `gather`, as if not sharded over that mesh axis."""
        key = (weight.name, gather)
        if key not in self._elements:
            shape = shard_shape(weight.name, weight.spec.shape, weight.spec.axes, self.mesh, gather=gather)
            self._elements[key] = weight.count * math.prod(shape)
        return self._elements[key]

    def elements(self, *parts: str, gather: str = "") -> int:
        """Return the elements of parts of the model on a device; all parts by default."""
        chosen = [weight for weight in self.parameters.base if not parts or weight.part in parts]
        return sum(self.elements_of(weight, gather) for weight in chosen)

    def state_bytes(self) -> Mapping[str, int]:
        """Return the bytes of parameters, optimizer state and counters on a device."""
        held: collections.Counter[str] = collections.Counter()
        for kind, weight, size in self.parameters.state:
            whole = 1 if weight is None else weight.count * math.prod(weight.spec.shape)
            held[kind] += size if weight is None else size * self.elements_of(weight) // whole
        return held

    def frozen_bytes(self) -> int:
        """Return the bytes of the frozen base on a device."""
        if not self.adapts:
            return 0
        return sum(
            weight.count
            * stored_bytes(
                weight.name, weight.spec, self.mesh, self.dtype, self.scheme if kind_of(weight.name) else None
            )
            for weight in self.parameters.base
        )

    def batch_bytes(self) -> int:
        """Return the bytes of a batch on a device: token ids, labels, positions and segments."""
        return 4 * 4 * self.parts * self.tokens


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


def _adapter(config: RunConfig) -> LoraConfig | None:
    return getattr(config, "lora", None)


def optimizer_of(config: RunConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of a run and its learning-rate schedule; steps that depend on the data are not known."""
    return make_optimizer(with_learning_rate(config).optimizer, max(config.steps, _STEPS))


def _state(config: RunConfig, model: ModelConfig, trained: tuple[Weight, ...]) -> Iterator[Leaf]:
    """Yield the arrays of the training state: moments are sharded as their parameters if they have their shape."""
    named, optimizer = {weight.name: weight for weight in trained}, optimizer_of(config)[0]
    params = {name: jax.ShapeDtypeStruct(weight.spec.shape, jnp.float32) for name, weight in named.items()}
    state = jax.eval_shape(lambda params: init_state(model, params, optimizer, config.step), params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        weight, size = named.get(str(getattr(path[-1], "key", ""))), leaf.size * leaf.dtype.itemsize
        if weight is None:
            yield Leaf("other", None, size)
        else:
            kind = "parameters" if path[0].name == "params" else "optimizer state"
            yield Leaf(kind, weight if weight.spec.shape == leaf.shape else None, weight.count * size)
