"""`python -m tests.benchmarks.generation`: overhead of `Generator` over the decode step, continuous batching, and int8.

Runs the `bench` preset with random weights. Contenders are interleaved, and figures are medians. Prints JSON lines.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.generate.loading import upcast_for_cpu
from dsmoe_jax.generate.programs import Batch, prefill, step
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from dsmoe_jax.quantize import quantize_embedding, quantize_params
from tests.benchmarks import plan
from tests.benchmarks.inputs import batch

ROWS = 8
REQUESTS = 64
PROMPTS, ANSWERS = (16, 512), (8, 256)  # tokens, both ends included


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.generation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="decode,batching,int8")
    args = parser.parse_args()
    model = DeepSeekMoE.init(ModelConfig.preset(plan.PRESET), seed=plan.SEED)
    for name in args.only.split(","):
        {"decode": decode, "batching": batching, "int8": int8}[name](model, args.rounds)


def decode(model: DeepSeekMoE, rounds: int) -> None:
    """Compare a call of the generator with one prefill and the bare steps, for the same tokens."""
    for rows in (1, ROWS):
        bare, call = _bare(model, rows), _call(Generator(model), rows)
        found = _turns({"bare": bare, "generator": call}, rounds)
        show(f"decode b={rows}", tokens=rows * plan.NEW_TOKENS, ratio=_ratio(found, "generator", "bare"), **found)


def batching(model: DeepSeekMoE, rounds: int) -> None:
    """Compare 64 requests of mixed length at once with batches of 8 that run until their longest completion."""
    rng = np.random.default_rng(0)
    config = model.config
    prompts = [
        rng.integers(2, config.vocab_size, n).tolist() for n in rng.integers(PROMPTS[0], PROMPTS[1] + 1, REQUESTS)
    ]
    counts = rng.integers(ANSWERS[0], ANSWERS[1] + 1, REQUESTS).tolist()
    generator = Generator(model, max_batch_size=ROWS)
    ask = lambda count: SamplingParams(max_new_tokens=count, ignore_eos=True)  # noqa: E731
    shares: dict[str, float] = {}

    def continuous() -> None:
        generator(prompts, [ask(count) for count in counts])
        shares["continuous"] = generator.stats.idle_fraction

    def static(to_the_longest: bool) -> None:
        for start in range(0, REQUESTS, ROWS):
            some = slice(start, start + ROWS)
            longest = max(counts[some])
            generator(prompts[some], [ask(longest if to_the_longest else count) for count in counts[some]])

    found = _turns(
        {
            "continuous": continuous,
            "static": lambda: static(True),
            "static, ended rows idle": lambda: static(False),
        },
        rounds,
    )
    rates = {name: round(sum(counts) / seconds, 1) for name, seconds in found.items()}
    show(
        "batching",
        tokens_per_second=rates,
        over_static=_ratio(found, "static", "continuous"),
        over_idle=_ratio(found, "static, ended rows idle", "continuous"),
        free_rows=round(shares["continuous"], 4),
        bound_by_lengths=round(
            sum(ROWS * max(counts[i : i + ROWS]) for i in range(0, REQUESTS, ROWS)) / sum(counts), 3
        ),
    )


def int8(model: DeepSeekMoE, rounds: int) -> None:
    """Compare decoding with int8 and fp32 weights, in time and bytes."""
    config, params = model.config, split(model)[1]
    small = assemble(config, quantize_embedding(quantize_params(params, "int8")))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(split(one)[1])) for one in (small, model)]
    show("int8 weights", ratio=round(sizes[0] / sizes[1], 4), bytes=sizes)
    for rows in (1, ROWS):
        found = _turns({"fp32": _call(Generator(model), rows), "int8": _call(Generator(small), rows)}, rounds)
        show(f"int8 decode b={rows}", ratio=_ratio(found, "int8", "fp32"), **found)


def _call(generator: Generator, rows: int) -> Callable[[], object]:
    prompts = batch(generator.config, rows, plan.PROMPT).tolist()
    params = SamplingParams(max_new_tokens=plan.NEW_TOKENS + 1, ignore_eos=True)
    return lambda: generator(prompts, params)


def _bare(model: DeepSeekMoE, rows: int) -> Callable[[], object]:
    graph, params = split(model)
    params = upcast_for_cpu(params)
    ids, counts = batch(model.config, rows, plan.PROMPT), np.full(rows, plan.PROMPT, np.int32)
    active, drawn = np.ones(rows, bool), np.zeros(rows, np.int32)

    def run() -> None:
        logits, cache = prefill(graph, plan.PROMPT + plan.NEW_TOKENS, jnp.float32, params, ids, counts)
        token: Any = logits.argmax(axis=1).astype(jnp.int32)
        now = Batch(cache, None)
        for _ in range(plan.NEW_TOKENS):
            ready = token
            (token, *_), now = step(graph, None, params, now, token, active, None, drawn)
            np.asarray(ready)
        np.asarray(token)

    return run


def _turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, after one call that compiles."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(seconds), 4) for name, seconds in taken.items()}


def _ratio(found: dict[str, float], above: str, below: str) -> float:
    return round(found[above] / found[below], 3)


def show(what: str, **figures: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({"what": what, **figures}), flush=True)


if __name__ == "__main__":
    main()
