"""The bare jitted steps of our model. Start at `actions`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsmoe_jax.axes import Array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate.loading import upcast_for_cpu
from dsmoe_jax.generate.programs import Batch, prefill, step
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.loading import load
from dsmoe_jax.model import DeepSeekMoE, merge, split
from dsmoe_jax.train import cross_entropy
from tests.benchmarks import plan
from tests.benchmarks.children import Actions
from tests.benchmarks.inputs import batch
from tests.benchmarks.limits import Reader
from tests.benchmarks.timing import seconds
from tests.helpers.hf_folder import write_hf


def actions(task: str, folder: Path, dtype: str = "float32", quantize: str | None = None) -> Actions:
    """Return the actions of our child; `write` writes the checkpoint for all contenders."""
    if task == "write":
        return {"run": lambda: _write(folder)}
    model = load(folder, dtype=dtype, quantize=quantize)
    tasks: dict[str, Callable[[DeepSeekMoE], Actions]] = {
        "check": lambda model: {"logits": lambda ids: np.asarray(model(ids).logits)},
        "prefill": _prefill_actions,
        "decode1": lambda model: _decode_actions(model, 1),
        "decode8": lambda model: _decode_actions(model, 8),
        "train": _train_actions,
    }
    return tasks[task](model)


def _write(folder: Path) -> None:
    model = DeepSeekMoE.init(ModelConfig.preset(plan.PRESET), seed=plan.SEED)
    write_hf(folder, model.config, {name: np.asarray(value) for name, value in split(model)[1].items()})


def _as_generated(model: DeepSeekMoE) -> tuple[Any, dict[str, Array]]:
    graph, params = split(model)
    return graph, upcast_for_cpu(params)


def _prefill_actions(model: DeepSeekMoE) -> Actions:
    graph, params = _as_generated(model)
    dtype = params["norm.weight"].dtype
    ids = batch(model.config, 1, plan.PREFILL_TOKENS)
    counts = np.array([plan.PREFILL_TOKENS], np.int32)

    def run() -> float:
        return seconds(lambda: jax.block_until_ready(prefill(graph, ids.shape[1], dtype, params, ids, counts)))

    return {"run": run}


def _decode_actions(model: DeepSeekMoE, rows: int) -> Actions:
    graph, params = _as_generated(model)
    ids, counts = batch(model.config, rows, plan.PROMPT), np.full(rows, plan.PROMPT, np.int32)
    slots, dtype = plan.PROMPT + plan.NEW_TOKENS, params["norm.weight"].dtype
    active, drawn = np.ones(rows, bool), np.zeros(rows, np.int32)

    def start() -> tuple[Array, KVCache]:
        logits, cache = prefill(graph, slots, dtype, params, ids, counts)
        return jax.block_until_ready((logits.argmax(axis=1).astype(jnp.int32), cache))

    def generate(token: Array, cache: KVCache) -> list[list[int]]:
        """Dispatch each step before reading the tokens of the previous one, as `Generator` does."""
        answer, now = [], Batch(cache, None)
        for _ in range(plan.NEW_TOKENS):
            ready = token
            (token, *_), now = step(graph, None, params, now, token, active, None, drawn)
            answer.append(np.asarray(ready).tolist())
        jax.block_until_ready((token, now))
        return [*answer, np.asarray(token).tolist()]

    def run() -> float:
        begun = start()
        return seconds(lambda: generate(*begun))

    reader: list[Reader] = []  # created on demand: not needed for bf16

    def floor() -> float:
        """Time steps that only read the bytes that a decode step must read."""
        if not reader:
            reader.append(Reader(_touched(model, params, *start())))
        return seconds(lambda: [reader[0].read() for _ in range(plan.NEW_TOKENS)])

    def touched_bytes() -> int:
        return reader[0].bytes

    return {
        "run": run,
        "floor": floor,
        "floor bytes": touched_bytes,
        "tokens": lambda: generate(*start()),
    }


def _touched(model: DeepSeekMoE, params: dict[str, Array], token: Array, cache: KVCache) -> list[np.ndarray]:
    """Return views of all arrays that a decode step reads: cache, weights, and activated experts.

    The number of activated experts varies by step; this is the step nearest to the mean.
    """
    steps = _hit_experts(model, params, token, cache)
    counts = [sum(len(hit) for hit in step.values()) for step in steps]
    typical = steps[int(np.argmin(np.abs(np.array(counts) - np.mean(counts))))]
    arrays = [np.asarray(array) for layer in cache.layers for array in layer if array is not None]
    for name, value in params.items():
        view = np.asarray(value)
        if ".experts." in name:
            arrays += [view[expert] for expert in typical[int(name.split(".")[1])]]
        else:
            arrays.append(view[: len(token)] if name == "embed" else view)
    return arrays


def _hit_experts(
    model: DeepSeekMoE, params: dict[str, Array], token: Array, cache: KVCache
) -> list[dict[int, np.ndarray]]:
    """Return the activated experts of each decode step, by layer."""
    graph, _ = split(model)

    @jax.jit
    def hits(params: dict[str, Array], token: Array, cache: KVCache) -> tuple[Array, KVCache, dict[int, Array]]:
        model = merge(graph, params)
        hidden = model.hidden(token[:, None], cache=cache)
        assert hidden.cache is not None
        token = jnp.argmax(model.logits(hidden.last_hidden_state[:, 0]), axis=-1).astype(jnp.int32)
        return token, hidden.cache, {layer: routing.ids for layer, routing in hidden.routing.items()}

    steps = []
    for _ in range(plan.NEW_TOKENS):
        token, cache, ids = hits(params, token, cache)
        steps.append({layer: np.unique(chosen) for layer, chosen in ids.items()})
    return steps


def _train_actions(model: DeepSeekMoE) -> Actions:
    graph, params = split(model)
    optimizer = optax.adamw(plan.LEARNING_RATE, weight_decay=plan.WEIGHT_DECAY)
    ids = batch(model.config, *plan.TRAIN_SHAPE)

    def loss_of(params: dict[str, Array], ids: Array) -> Array:
        model = merge(graph, params)
        return cross_entropy(model.logits(model.hidden(ids).last_hidden_state), ids)

    def step(params: dict[str, Array], state: Any, ids: Array) -> tuple[Array, Any, Any]:
        loss, grads = jax.value_and_grad(loss_of)(params, ids)
        updates, state = optimizer.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    train = jax.jit(step, donate_argnums=(0, 1))
    # Committed to the device like the outputs of a step: else the second call would compile again.
    now, losses = list(jax.device_put((params, optimizer.init(params)), jax.devices()[0])), []

    def run() -> float:
        def work() -> None:
            loss, *now[:] = train(*now, ids)
            jax.block_until_ready(now)
            losses.append(float(loss))

        return seconds(work)

    return {"run": run, "losses": lambda: losses}
