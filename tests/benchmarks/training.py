"""`python -m tests.benchmarks.training` times training steps, interleaved, on the `bench` preset.

Full fine-tuning, LoRA on every projection, QLoRA with int8 and nf4, and a bare gradient with AdamW as the floor; then
the overhead of the loop per step. Bytes are those of the state and of the compiled program.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import DeepSeekMoE, abstract, merge, split
from dsmoe_jax.quantize import quantize_params
from dsmoe_jax.train import cross_entropy, loop
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.config import CheckpointConfig, DataConfig, RunConfig
from dsmoe_jax.train.loss import shift_labels
from dsmoe_jax.train.optimizer import OptimizerConfig, make_optimizer
from dsmoe_jax.train.step import StepConfig, Trainable, init_state, make_step
from tests.benchmarks.timing import spread

ROWS, TOKENS = 4, 256


def main() -> None:
    """Print a table, then the overhead of the loop."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=(__doc__ or "").strip())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--preset", default="bench")
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    params = split(DeepSeekMoE.init(config))[1]
    ids = jax.random.randint(jax.random.key(0), (ROWS, TOKENS), 0, config.vocab_size)
    ones, places = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(TOKENS), ids.shape)
    batch = Batch(ids, shift_labels(ids), ones, places)
    steps = {
        "bare gradient and AdamW": _bare(config, params, ids),
        "whole model": _step(config, params, batch, None, None),
        "adapters, r 8": _step(config, params, batch, LoraConfig(), None),
        "adapters over int8": _step(config, params, batch, LoraConfig(), "int8"),
        "adapters over nf4": _step(config, params, batch, LoraConfig(), "nf4"),
    }
    rows: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, (run, _) in steps.items():
            started = time.perf_counter()
            run()
            rows[name].append(time.perf_counter() - started)
    whole, (_, most) = spread(rows["whole model"]).median, steps["whole model"]
    for name, (_, held) in steps.items():
        median = spread(rows[name]).median
        print(
            f"{name:24} {median:6.3f} s ({min(rows[name]):.3f} to {max(rows[name]):.3f}) {median / whole:5.2f}x  "
            f"{held / 2**20:7.0f} MiB {held / most:5.2f}x"
        )
    print(f"between two steps of the loop: {_between_steps(args.preset):.2%} of a step")


def _bare(config: ModelConfig, params: dict[str, Any], ids: Any) -> tuple[Callable[[], Any], int]:
    graph = abstract(config)[0]
    optimizer = optax.adamw(1e-4)

    def loss(params: Any, ids: Any) -> Any:
        model = merge(graph, params)
        return cross_entropy(model.logits(model.hidden(ids).last_hidden_state), ids)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: Any) -> Any:
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params, ids), moments, params)
        return optax.apply_updates(params, updates), moments

    own = jax.tree.map(jnp.copy, params)
    return _repeated(step, (own, optimizer.init(own)), ids)


def _step(
    config: ModelConfig, params: dict[str, Any], batch: Batch, adapter: LoraConfig | None, scheme: str | None
) -> tuple[Callable[[], Any], int]:
    optimizer, schedule = make_optimizer(OptimizerConfig(warmup_steps=0, schedule="constant"), 100)
    frozen: Any = {}
    if adapter is None:
        trained, first = Trainable.all_params(config), jax.tree.map(jnp.copy, params)
    else:
        plan = make_plan(adapter, config)
        frozen = params if scheme is None else quantize_params(params, scheme)
        trained = Trainable(lora.specs(plan, config), lambda own, frozen, key: lora.attach(plan, frozen, own, key))
        first = lora.init(plan, config, frozen, jax.random.key(0))
    state = init_state(config, first, optimizer, StepConfig())
    step = make_step(config, abstract(config)[0], optimizer, schedule, StepConfig(), trainable=trained)
    return _repeated(lambda state: step(state, batch, frozen)[0], state, program=step, held=(state, batch, frozen))


def _repeated(
    step: Callable[..., Any], state: Any, *rest: Any, program: Any = None, held: Any = None
) -> tuple[Callable[[], Any], int]:
    """Return a function that runs one step synchronously, and the bytes of arguments and temporaries."""
    memory = (program or step).lower(*(held or (state, *rest))).compile().memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    carried = [step(state, *rest)]

    def run() -> None:
        carried[0] = jax.block_until_ready(step(carried[0], *rest))

    run()
    return run, size


def _between_steps(preset: str) -> float:
    """Return the median time between two steps, without overlap, as a share of a step."""
    called, ready, original = [], [], loop.make_step

    def noting(*arguments: Any, **options: Any):
        step = original(*arguments, **options)

        def noted(*inputs: Any) -> Any:
            called.append(time.perf_counter())
            out = jax.block_until_ready(step(*inputs))
            ready.append(time.perf_counter())
            return out

        return noted

    loop.make_step = noting  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        loop.run(
            RunConfig(
                output_dir=str(Path(folder) / "run"),
                model=preset,
                steps=12,
                data=DataConfig(sequence_length=TOKENS, batch_size=ROWS),
                checkpoint=CheckpointConfig(interval=100),
                eval_interval=100,
            )
        )
    pauses = np.subtract(called[2:], ready[1:-1])
    return float(np.median(pauses) / np.median(np.subtract(ready[2:], called[2:])))


if __name__ == "__main__":
    main()
