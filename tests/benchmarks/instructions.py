"""`python -m tests.benchmarks.instructions CKPT` fine-tunes on a new task: full, LoRA and QLoRA.

CKPT is the output of `dsmoe pretrain tiny`. The task is to reverse three or four digits; prints the number of exact
completions of held-out prompts.
"""

import argparse
import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from dsmoe_jax import Generator
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.optimizer import OptimizerConfig

TRAINED, EVALUATED = 4000, 200
LORA: Final = LoraConfig(r=16, lora_alpha=32)
WAYS: Final[dict[str, dict[str, Any]]] = {
    "full": {"lora": None},
    "LoRA": {"lora": LORA},
    "QLoRA (nf4)": {"lora": LORA, "quantize": "nf4"},
}


def main() -> None:
    """Print one table row per method."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.instructions", description=(__doc__ or "").strip()
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    rows = examples(TRAINED + EVALUATED)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[:TRAINED]))
        print("| way | exact answers | minutes | updates skipped |\n| --- | --- | --- | --- |")
        print(f"| before | {score(args.checkpoint, rows[TRAINED:])} of {EVALUATED} | | |", flush=True)
        for way in args.ways:
            config = FinetuneConfig(
                output_dir=f"{folder}/{way}",
                init_from=args.checkpoint,
                steps=args.steps,
                data=ExamplesConfig(files=(str(file),), sequence_length=256, batch_size=4),
                optimizer=OptimizerConfig(
                    learning_rate=args.learning_rate, schedule="cosine", warmup_steps=50, weight_decay=0.0, b2=0.99
                ),
                eval_interval=500,
                trackers=("jsonl",),
            )
            started = time.perf_counter()
            result = run(dataclasses.replace(config, **WAYS[way]))
            minutes = (time.perf_counter() - started) / 60
            adapter = None if WAYS[way]["lora"] is None else result.model
            found = score(result.model if adapter is None else args.checkpoint, rows[TRAINED:], adapter)
            print(f"| {way} | {found} of {EVALUATED} | {minutes:.1f} | {result.total_skips} |", flush=True)


def examples(count: int) -> list[dict[str, str]]:
    """Return distinct examples from a fixed seed."""
    rng, seen = random.Random(0), {}
    while len(seen) < count:
        digits = tuple(rng.choices("0123456789", k=rng.randint(3, 4)))
        seen[digits] = {"instruction": "Reverse: " + " ".join(digits), "output": " ".join(reversed(digits))}
    return list(seen.values())


def score(checkpoint: Any, rows: list[dict[str, str]], adapter: Any = None) -> int:
    """Count the exact greedy completions."""
    generate = Generator.from_pretrained(checkpoint, adapter=adapter)
    chats = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    answers = generate(chats, max_new_tokens=16)
    return sum(answer.text.strip() == row["output"] for answer, row in zip(answers, rows, strict=True))


if __name__ == "__main__":
    main()
