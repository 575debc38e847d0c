"""DeepSeekMoE: embedding, unrolled decoder blocks, final norm, head.

Start at `DeepSeekMoE.hidden`. At jit boundaries a model is split into a static, hashable graph and a flat dict of
parameters by dotted path, such as `layers.1.moe.experts.gate`.
"""

import dataclasses
import functools
import logging
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh, Sharding

from dsmoe_jax.axes import Array, Float, Int, PRNGKeyArray
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.attention import CausalMask
from dsmoe_jax.kernels.matmul import matmul
from dsmoe_jax.kernels.operand import Quantized
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.layers import stack
from dsmoe_jax.layers.ablation import Ablation
from dsmoe_jax.layers.block import Block
from dsmoe_jax.layers.norm import RMSNorm
from dsmoe_jax.layers.rope import rotation
from dsmoe_jax.layers.router import Routing, hash_experts
from dsmoe_jax.layers.token_dispatcher import DispatchConfig
from dsmoe_jax.layers.weights import Initializer, Linear, weight
from dsmoe_jax.sharding import (
    MeshConfig,
    as_mesh,
    check_count,
    constrain,
    pin_to_mesh_of,
    sharding,
    traceable_mesh_of,
)

_log = logging.getLogger(__name__)


class ModelOutput(NamedTuple):
    """The output of `DeepSeekMoE`."""

    logits: Float[Array, "B T V"]  # float32
    routing: dict[int, Routing]  # by index of the MoE layer
    hidden_states: tuple[Float[Array, "B T D"], ...] | None = None  # L + 1, as in transformers: the last is normalized


class DecoderOutput(NamedTuple):
    """The output of `DeepSeekMoE.hidden`."""

    last_hidden_state: Float[Array, "B T D"]  # after the final norm
    routing: dict[int, Routing]  # by index of the MoE layer
    cache: KVCache | None
    hidden_states: tuple[Float[Array, "B T D"], ...]  # the embeddings and every block's output, before the final norm


class DeepSeekMoE(nnx.Module):
    """The decoder. `DeepSeekMoE.init` draws random weights, `dsmoe_jax.load` loads a checkpoint."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        self.config = config
        self.embed = weight(rngs, (V, D), ("vocab", "embed"), Initializer("normal", std), dtype)
        L = config.num_hidden_layers
        self.layers = nnx.List([Block(config, layer, rngs=rngs, dtype=dtype) for layer in range(L)])
        self.norm = RMSNorm(D, eps=config.rms_norm_eps, rngs=rngs, dtype=dtype)
        tied = config.tie_word_embeddings
        self.head = None if tied else Linear((V, D), ("vocab", "embed"), std=std, rngs=rngs, dtype=dtype)

    @classmethod
    def init(
        cls, config: ModelConfig, *, seed: int = 0, dtype=jnp.float32, mesh: Mesh | MeshConfig | None = None
    ) -> "DeepSeekMoE":
        """Initialize a model, each weight directly in its sharding.

        Args:
            config: The architecture.
            seed: In [0, 2**32). The weights do not depend on the mesh.
            dtype: The dtype of the weights.
            mesh: The mesh; None: the default device.

        Returns:
            The model.

        Raises:
            DSMoEError: The seed is out of range, or a weight cannot be sharded evenly over the mesh.
        """
        check_seed(seed)
        places, key = shardings(config, mesh), jax.random.key(seed)
        params = {}
        for name, spec in abstract(config)[1].items():
            draw = _initializer_program(spec.initializer, spec.shape, np.dtype(dtype), places[name])
            params[name] = draw(key_of(name, key))
        return assemble(config, params)

    def __call__(
        self,
        token_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        output_hidden_states: bool = False,
        ablation: Ablation | None = None,
    ) -> ModelOutput:
        """Compute the logits of every position; works under transformations of JAX and Flax.

        Args:
            token_ids: int [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding on either side; outputs at padding are undefined.
            position_ids: int [B, T]; default 0 … T-1 in every sequence, padding included.
            output_hidden_states: Also return the L + 1 hidden states.
            ablation: Change the routing; see `ablated`.

        Raises:
            DSMoEError: Shapes differ, or a token id is outside the vocabulary (not checked under tracing).
        """
        if ablation is not None:
            model = self.ablated(ablation)
            return model(token_ids, attention_mask, position_ids, output_hidden_states=output_hidden_states)
        token_ids = check_token_ids(token_ids, self.config.vocab_size)
        _warn_beyond_context(token_ids.shape[1], self.config.context_length)
        # Defaults are filled in outside jit, so that calls with and without them share a compiled program.
        arange = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
        shape, mask, positions = token_ids.shape, jnp.ones_like(token_ids), jnp.broadcast_to(arange, token_ids.shape)
        if attention_mask is not None:
            mask = _check_like("attention_mask", attention_mask, shape)
        if position_ids is not None:
            positions = _check_like("position_ids", position_ids, shape)
        graph, params = split(self)
        if isinstance(arange, Tracer):
            token_ids = pin_to_mesh_of(params, token_ids)
        with traceable_mesh_of(params):
            return _forward(graph, params, token_ids, mask, positions, output_hidden_states)

    def ablated(self, ablation: Ablation) -> "DeepSeekMoE":
        """Return the model with another selection of experts; the weights are shared.

        Args:
            ablation: What is disabled.

        Raises:
            DSMoEError: The model does not have what is disabled, or too few experts are left.
        """
        if not isinstance(ablation, Ablation):
            raise DSMoEError(f"ablation must be an Ablation, got {ablation!r}")
        graph, params = split(self)
        model = merge(graph, params)
        ablation.apply(self.config, {i: block.moe for i, block in enumerate(model.layers) if block.moe is not None})
        return model

    def hidden(
        self,
        token_ids: Int[Array, "B T"],
        attention_mask: Array | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        *,
        cache: KVCache | None = None,
        prefill: bool = False,
        rope_length: Int[Array, ""] | int | None = None,
        dropout_key: PRNGKeyArray | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: CausalMask | None = None,
        router_bias: Mapping[int, Float[Array, "E"]] | None = None,
        remat: str = "none",
        compute_dtype: Any = None,
        enter: Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]] | None = None,
        scan_layers: bool = False,
    ) -> DecoderOutput:
        """Compute the hidden states before the head; traceable, not jitted, without checks.

        Args:
            token_ids: int [B, T].
            attention_mask: [B, T], 1 for valid tokens. With a cache, padding must be on the right; it is not routed and
              not counted in the lengths, but its slots are written.
            position_ids: int [B, T]; default: continue from the lengths of the cache, or from 0.
            cache: Keys and values of earlier tokens; the T tokens are appended.
            prefill: The cache is empty, so the T tokens attend to each other only.
            rope_length: Length for dynamic NTK scaling; default: all keys, padding included.
            dropout_key: Enables attention dropout.
            segment_ids: int [B, T]; attention is block-diagonal over segments. Not supported with a cache.
            mask: Replaces the mask made of `attention_mask`, `segment_ids` and the lengths of the cache.
            router_bias: Bias on expert selection by layer, see `Router`.
            remat: Rematerialization policy of each block, a key of `layers.stack.REMAT`.
            compute_dtype: Dtype of each block's weights but the router's; default: as they are. Rematerialized blocks
              cast again, so that casts of all layers are not kept.
            enter: Applied to the input and the weights of each block, as in `train.accumulate`.
            scan_layers: Run the last MoE blocks in a loop (`layers.stack.scan`), without a cache. Their hidden states
              are not in the output.

        Returns:
            The hidden states of the last layer and, with them, those of all layers, the routing and the new cache.

        Raises:
            DSMoEError: `scan_layers` and an ablation that differs between layers.
        """
        T = token_ids.shape[1]
        start = None if cache is None or prefill else cache.lengths
        if position_ids is None:
            offset = jnp.zeros_like(token_ids[:, 0]) if start is None else start
            position_ids = offset[:, None] + jnp.arange(T)[None, :]
        if rope_length is None:
            rope_length = T if start is None else start.max() + T
        if mask is None and start is not None:
            mask = CausalMask(start)
        elif mask is None:
            mask = CausalMask(None, None if attention_mask is None else attention_mask != 0, segment_ids, segment_ids)
        valid = None if cache is None or attention_mask is None else attention_mask != 0
        x = constrain(self._embed(token_ids), stack.STATES)
        rope = rotation(self.config, position_ids, rope_length, x.dtype)
        hidden_states, layer_caches, routing, scanned = [x], [], {}, []
        for i, block in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            bias = None if router_bias is None else router_bias.get(i)
            assigned = None
            if self.config.hash_routing and block.moe is not None:
                assigned = hash_experts(token_ids, i, block.moe.router.experts)
            graph, params = nnx.split(block)
            in_loop = scan_layers and all(self.config.is_moe_layer(j) for j in range(i, len(self.layers)))
            if enter is not None:
                name = lambda path, i=i: f"layers.{i}.{_join(path)}"  # noqa: E731
                own = stack.leaves(params)
                before, weights = enter(None if in_loop else x, {name(path): leaf for path, leaf in own.items()})
                x = x if before is None else before
                params = nnx.from_flat_state([(path, weights[name(path)]) for path in own])
            if in_loop:
                scanned.append((graph, stack.leaves(params), key, bias, assigned))
                continue
            layer_cache = None if cache is None else cache.layers[i]
            operands = x, rope, mask, layer_cache, start, key, bias, valid, assigned
            x, layer_cache, routed = stack.apply(graph, remat, compute_dtype, params, *operands)
            x = constrain(x, stack.STATES)
            hidden_states.append(x)
            layer_caches.append(layer_cache)
            if routed is not None:
                routing[i] = routed
        if scanned:
            graphs, weights, *options = zip(*scanned, strict=True)
            if len(set(graphs)) > 1:
                raise DSMoEError("scan_layers needs equal layers, and an ablation has disabled other experts in some")
            options = [None if each[0] is None else each for each in options]  # dropout keys, biases, assigned experts
            x, routed = stack.scan(graphs[0], remat, compute_dtype, weights, x, rope, mask, *options)
            routing |= zip(range(len(self.layers) - len(scanned), len(self.layers)), routed, strict=True)
        if cache is not None:
            new = T if attention_mask is None else attention_mask.astype(jnp.int32).sum(axis=1)
            cache = KVCache(tuple(layer_caches), cache.lengths + new)
        return DecoderOutput(self.norm(x), routing, cache, tuple(hidden_states))

    def _embed(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.embed.get_value()
        if isinstance(table, Quantized):  # int8, one scale per token
            return (table.codes[token_ids] * table.scales[token_ids]).astype(self.norm.weight[...].dtype)
        # All-gather along fsdp before the lookup: tokens are sharded over that axis as well.
        return constrain(table, ("vocab", None))[token_ids]

    @jax.named_scope("head")
    def logits(self, states: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Compute the float32 logits of hidden states after the final norm."""
        weight = self.embed[...] if self.head is None else self.head.weight[...]
        logits = matmul(states, weight, preferred_element_type=jnp.float32)
        return constrain(logits, ("batch", *(None,) * (logits.ndim - 2), "vocab"))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _forward(graph, params, token_ids, attention_mask, position_ids, output_hidden_states: bool) -> ModelOutput:
    model = merge(graph, params)
    hidden = model.hidden(token_ids, attention_mask, position_ids)
    states = (*hidden.hidden_states[:-1], hidden.last_hidden_state) if output_hidden_states else None
    return ModelOutput(model.logits(hidden.last_hidden_state), hidden.routing, states)


@functools.cache
def _warn_beyond_context(length: int, context_length: int) -> None:
    """Warn, once, about sequences longer than the trained context length."""
    if length > context_length:
        _log.warning("Sequences of %d tokens exceed the model's context length %d", length, context_length)


def check_token_ids(token_ids: Any, vocab_size: int) -> Int[Array, "B T"]:
    """Convert to int32 [B, T]; raise if malformed or outside the vocabulary, where JAX would clamp silently."""
    ids = _to_array("token_ids", token_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise DSMoEError(f"token_ids must be non-empty int [B, T], got {ids.dtype} {list(ids.shape)}")
    if not isinstance(ids, Tracer) and (ids.min() < 0 or ids.max() >= vocab_size):
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise DSMoEError(f"token id {worst} is outside the vocabulary of {vocab_size}")
    return jnp.asarray(token_ids, jnp.int32)


def _check_like(name: str, value: Any, shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """Convert to int32; raise for another shape, floats or negative values (the latter not checked under tracing)."""
    array = _to_array(name, value)
    if array.shape != shape:
        raise DSMoEError(f"{name} must have the shape of token_ids, {shape}, got {array.shape}")
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise DSMoEError(f"{name} must be int or bool [B, T], got {array.dtype}")
    if not isinstance(array, Tracer) and array.min() < 0:
        raise DSMoEError(f"{name} must not be negative, got {array.min()}")
    return jnp.asarray(value, jnp.int32)


def _to_array(name: str, value: Any) -> Any:
    """Return a traced value as it is, any other as a numpy array."""
    try:
        return value if isinstance(value, Tracer) else np.asarray(value)
    except ValueError:  # ragged
        raise DSMoEError(f"{name} must be [B, T], got sequences of different lengths; pad them") from None


# --- the model as (graph, parameters) ---


class ParamSpec(NamedTuple):
    """The declaration of a parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical
    initializer: Initializer


def check_seed(seed: int) -> None:
    """Reject a seed that `jax.random.key` would truncate to 32 bits."""
    if not 0 <= seed < 1 << 32:
        raise DSMoEError(f"seed must be in [0, 2**32), got {seed}")


class Graph:
    """A model without its parameters, as a static argument of `jax.jit`.

    The hash is cached: hashing Flax's graph definition takes milliseconds per call of a jitted function.
    """

    def __init__(self, definition: Any):
        self.definition, self._hash = definition, hash(definition)

    def __hash__(self) -> int:
        """The cached hash."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether the definitions are equal."""
        if self is other:
            return True
        return isinstance(other, Graph) and self._hash == other._hash and self.definition == other.definition


def split(model: DeepSeekMoE) -> tuple[Graph, dict[str, Any]]:
    """Split a model into its static graph and its parameters by dotted path."""
    definition, state = nnx.split(model)
    return Graph(definition), {_join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graph: Graph, params: Mapping[str, Any]) -> DeepSeekMoE:
    """The inverse of `split`; projections may be any operand (`kernels.operand`), the embedding may be int8."""
    return nnx.merge(graph.definition, nnx.from_flat_state([(_split(name), value) for name, value in params.items()]))


def assemble(config: ModelConfig, params: Mapping[str, Any]) -> DeepSeekMoE:
    """Create a model from its parameters by dotted path."""
    return merge(abstract(config)[0], params)


@functools.lru_cache(maxsize=16)
def abstract(config: ModelConfig, dispatch: DispatchConfig | None = None) -> tuple[Graph, dict[str, ParamSpec]]:
    """The graph and the declaration of every parameter, without allocating any; cached."""
    model = nnx.eval_shape(lambda: DeepSeekMoE(config, rngs=nnx.Rngs(0)))
    if dispatch is not None:
        model.set_attributes(dispatch=dispatch, raise_if_not_found=False)  # not found in a dense model
    definition, state = nnx.split(model)
    specs = {
        _join(path): ParamSpec(tuple(leaf.shape), leaf.logical_axes, leaf.initializer)
        for path, leaf in nnx.to_flat_state(state)
    }
    return Graph(definition), specs


def short(config: ModelConfig) -> ModelConfig:
    """The model with one layer of each kind: building 62 takes seconds."""
    if config.n_routed_experts is None:
        return dataclasses.replace(config, num_hidden_layers=1)
    return dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1, moe_layer_freq=1)


def layers_of(config: ModelConfig, name: str) -> int:
    """Count the layers of a model that have a parameter of its `short` form; 1 for one outside the layers."""
    moe = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    counts = {"0": config.num_hidden_layers - moe, "1": moe}
    return counts[name.split(".")[1]] if name.startswith("layers.") else 1


def count_tensors(config: ModelConfig, per_stack: int = 1) -> int:
    """Count parameter tensors without building the model; a stack of experts counts as `per_stack`."""
    L = config.num_hidden_layers
    moe = sum(map(config.is_moe_layer, range(L)))
    per_moe = (not config.hash_routing) + 3 * per_stack + 3 * (config.n_shared_experts is not None)
    return 3 - config.tie_word_embeddings + L * (6 + 4 * config.attention_bias) + 3 * (L - moe) + per_moe * moe


def shardings(config: ModelConfig, mesh: Mesh | MeshConfig | None) -> dict[str, Sharding]:
    """The sharding of every parameter over the mesh; None: the default device."""
    mesh = as_mesh(mesh)
    if mesh is not None:
        check_count(config.num_attention_heads, "attention heads", "heads", mesh)
        check_count(config.num_kv_heads, "key-value heads", "kv_heads", mesh)
    return {name: sharding(name, spec.shape, spec.axes, mesh) for name, spec in abstract(config)[1].items()}


@functools.lru_cache(maxsize=64)
def _initializer_program(initializer: Initializer, shape: tuple[int, ...], dtype: np.dtype, place: Sharding):
    """Compile once per shape: random bits take seconds to compile."""
    return jax.jit(lambda key: initializer.draw(key, shape, dtype), out_shardings=place)


def key_of(name: str, key: PRNGKeyArray) -> PRNGKeyArray:
    """The random key of a parameter."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _join(path: tuple) -> str:
    return ".".join(map(str, path))


def _split(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
