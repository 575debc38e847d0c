"""The training steps of `dsmoe_jax.train.step.make_step`. Start at `step_row`."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Final

import jax
import jax.numpy as jnp

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.kernels.operand import Operand
from dsmoe_jax.layers.weights import Initializer
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import DeepSeekMoE, abstract, split
from dsmoe_jax.quantize import kind_of, quantized_spec
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.loss import shift_labels
from dsmoe_jax.train.optimizer import OptimizerConfig, make_optimizer
from dsmoe_jax.train.step import StepConfig, Trainable, init_state, make_step
from tests.benchmarks.gpu import timing, work
from tests.benchmarks.gpu.cases import Case, UnableError, turns
from tests.benchmarks.gpu.sizes import Sizes

# Bytes per parameter: fp32 weight and two moments, a gradient, the bf16 copy, and the largest temporaries of an update.
_STATE_BYTES: Final = 20
_HEADROOM: Final = 8e9  # activations of a block, logits


def widths_of_16b(sizes: Sizes) -> Iterator[Case]:
    """Yield the step with as many layers as fit, for each remat policy and attention backend."""
    config = sizes.trained
    while config.num_hidden_layers > 1 and not _fits(config):
        config = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    B, T = sizes.train_shape
    for remat in ("full", "dots"):
        run = functools.partial(step_row, config, sizes.train_shape, sizes, remat=remat)
        key = f"train.{config.num_hidden_layers}.{remat}"
        name = f"{config.num_hidden_layers} layers, {B} x {T} tokens, remat {remat}"
        yield Case(key, name, run)
        for backend in ("pallas", "cudnn"):
            by_backend = functools.partial(timing.by_attention, backend, run)
            yield Case(f"{key}.{backend}", f"{name}, attention by {backend}", by_backend)


def largest_preset(sizes: Sizes) -> Iterator[Case]:
    """Return whether the step fits, state included."""
    for preset in sizes.whole_presets:
        config = ModelConfig.preset(preset)
        if _fits(config) or preset == sizes.whole_presets[-1]:
            T = min(sizes.train_shape[1], config.max_position_embeddings)
            B = sizes.train_shape[0] * sizes.train_shape[1] // T
            run = functools.partial(step_row, config, (B, T), sizes, remat="full")
            yield Case(f"train.{preset}.full", f"{preset}, {B} x {T} tokens, remat full", run)
            return


def adapters(sizes: Sizes) -> Iterator[Case]:
    """Rank 8 on every projection, the base in bf16 and in nf4."""
    B, T = sizes.adapter_shape
    for name, scheme in (("LoRA", None), ("QLoRA", "nf4")):
        run = functools.partial(
            step_row, sizes.model, sizes.adapter_shape, sizes, remat="full", adapter=LoraConfig(), scheme=scheme
        )
        yield Case(f"finetune.{name}", f"{name}, base in {scheme or sizes.dtype}, {B} x {T} tokens, remat full", run)


def step_row(
    config: ModelConfig,
    shape: tuple[int, int],
    sizes: Sizes,
    *,
    remat: Any,
    adapter: LoraConfig | None = None,
    scheme: str | None = None,
) -> dict[str, Any]:
    """Measure one step; frozen weights are random."""
    options = StepConfig(compute_dtype="bfloat16", remat=remat)
    optimizer, schedule = make_optimizer(OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=1e-5), 1000)
    trained, frozen = Trainable.all_params(config), {}
    if adapter is None:
        if not _fits(config):
            raise UnableError(
                f"{_count(config) / 1e9:.2f}B parameters take about {_bytes(config) / 1e9:.0f} GB to train"
            )
        params = split(DeepSeekMoE.init(config))[1]
    else:
        plan = make_plan(adapter, config)
        frozen = noise_params(config, scheme, jnp.dtype(sizes.dtype))
        trained = Trainable(lora.specs(plan, config), lambda own, frozen, key: lora.attach(plan, frozen, own, key))
        params = lora.init(plan, config, frozen, jax.random.key(0))
    # Committed to the device like the outputs: else the compiled program would reject them.
    state = jax.device_put(init_state(config, params, optimizer, options), jax.devices()[0])
    del params
    ids = timing.ids(config, *shape)
    ones, places = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    batch = Batch(ids, shift_labels(ids), ones, places)
    step = make_step(config, abstract(config)[0], optimizer, schedule, options, trainable=trained)
    program, figures = timing.compiled(step, state, batch, frozen)
    held: list[Any] = [state]
    del state
    losses: list[Any] = []

    def run() -> None:
        held[0], metrics = program(held[0], batch, frozen)
        jax.block_until_ready(held[0])
        losses.append(metrics.loss)

    seconds = turns(run, sizes.turn_seconds, most=10)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        **figures,
        "tokens": shape[0] * shape[1],
        "flops": work.train_flops(config, *shape, frozen=adapter is not None),
        "peak": stats.get("peak_bytes_in_use"),
        "note": f"{_count(config) / 1e9:.3g}B parameters, loss {float(losses[0]):.3f} to {float(losses[-1]):.3f}",
    }


def noise_params(
    config: ModelConfig, scheme: str | None, dtype: Any, *, embedding: str | None = None
) -> dict[str, Operand]:
    """Draw random parameters on the device; with a `scheme`, random codes and scales.

    Real quantization runs matrix by matrix through the host, which takes minutes.
    """
    found: dict[str, Any] = {}
    for number, (name, spec) in enumerate(abstract(config)[1].items()):
        own = scheme if kind_of(name) else embedding if name == "embed" and not config.tie_word_embeddings else None
        if own is None:
            found[name] = (
                spec.initializer.draw(jax.random.key(number), spec.shape, dtype)
                if len(spec.shape) < 2
                else (_drawn(spec.initializer, jax.random.key(number), spec.shape, jnp.dtype(dtype).name))
            )
            continue
        found[name] = timing.noise(quantized_spec(spec.shape, own), scale=_SCALE, seed=number)
    return found


_SCALE: Final = 1e-4  # of quantized weights: times codes up to 127, similar to initial weights


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _drawn(initializer: Initializer, key: Any, shape: tuple[int, ...], dtype: str) -> Any:
    return initializer.draw(key, shape, jnp.dtype(dtype))


def _count(config: ModelConfig) -> int:
    return timing.nbytes([jax.ShapeDtypeStruct(spec.shape, jnp.int8) for spec in abstract(config)[1].values()])


def _bytes(config: ModelConfig) -> float:
    return _STATE_BYTES * _count(config) + _HEADROOM


def _fits(config: ModelConfig) -> bool:
    try:
        timing.need("the state", _bytes(config))
    except UnableError:
        return False
    return True
