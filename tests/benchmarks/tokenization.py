"""`python -m tests.benchmarks.tokenization SOURCE TOKENIZER` times `dsmoe tokenize` and the bare library, interleaved.

The bare library is `Tokenizer.encode_batch` of tokenizers on the same texts in memory, with all its threads. Startup,
reading and writing are part of the other. CPU seconds include those of worker processes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.timing import ratios, spread


def main() -> None:
    """Print a line per round, then the ratios."""
    from tokenizers import Tokenizer

    from dsmoe_jax.train.data import documents, tokenize

    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.tokenization", description=(__doc__ or "").strip()
    )
    parser.add_argument("source")
    parser.add_argument("tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    texts = [document.text for document in documents(args.source)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    library = Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json"))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    for _ in range(args.rounds):
        found["bare"].append(_timed(lambda: library.encode_batch(texts)))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            found["ours"].append(
                _timed(lambda out=out: tokenize(args.source, args.tokenizer, out, workers=args.workers))
            )
        speeds = {name: f"{megabytes / times[-1][0]:.2f}" for name, times in found.items()}
        print(f"bare {speeds['bare']} MB/s, dsmoe tokenize {speeds['ours']} MB/s", flush=True)
    for number, what in enumerate(("time", "CPU time")):
        ratio = spread(ratios(*([times[number] for times in found[name]] for name in ("bare", "ours"))))
        print(f"{what}: speed relative to the bare library {ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})")


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds and CPU seconds, those of ended children included."""
    start, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - start, sum(after[:4]) - sum(before[:4])


if __name__ == "__main__":
    main()
