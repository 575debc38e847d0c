"""The best backend for each leg of the experts, and the best tiles of our kernels, on this card.

    python -m tests.benchmarks.gpu.tuning --into my_card.json   # ten minutes
    DSMOE_TUNING=my_card.json dsmoe …                           # or copy its entries to dsmoe_jax/kernels/tuned.json

Start at `cases`, then `table`. `--into` merges the results for this card into a file in the format of
`dsmoe_jax.kernels.tuning`, created if missing. `--out` has every candidate's timings, rewritten after each. Failed
candidates are skipped; an entry whose candidates were not all measured is omitted. `--small` is a trial at small sizes.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax

from dsmoe_jax.kernels import tuning as tuned
from dsmoe_jax.kernels.tuning import Legs
from dsmoe_jax.storage.strict_json import read_json
from tests.benchmarks import machine
from tests.benchmarks.gpu import experts, timing
from tests.benchmarks.gpu.cases import Case, serve
from tests.benchmarks.gpu.sizes import Sizes, sizes

# `dense` is the reference, `block_loop` synchronizes with the host every iteration.
CANDIDATES: Final = ("batched", "grouped", "ragged")
# (rows, columns, depth in bytes, warps, stages) of `pallas_matmul.Tile`.
TILES: Final = (
    (128, 128, 128, 8, 3),
    (128, 128, 128, 4, 3),
    (128, 128, 128, 8, 4),
    (128, 128, 64, 8, 4),
    (64, 128, 128, 4, 3),
    (64, 128, 128, 4, 4),
    (128, 64, 128, 4, 4),
    (64, 64, 128, 4, 4),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print each row, write the table."""
    prog, about = "python -m tests.benchmarks.gpu.tuning", (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--small", action="store_true", help="a trial at small sizes")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="time budget, default %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("tuning.json"), metavar="FILE", help="timings of all candidates"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="file to merge the results into, for DSMOE_TUNING")
    args = parser.parse_args(argv)
    facts, rows = timing.facts(), []
    if args.into and (args.small or facts["platform"] != "gpu"):
        parser.error("--into takes what a GPU does at full size, no trial")
    known = read_json(args.into) if args.into and args.into.exists() else {}

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row["name"], row.get("error") or f"{1000 * statistics.median(row['seconds']):.4g} ms", flush=True)
        about = {"trial": args.small, "commit": machine.commit(), "versions": machine.versions()}
        found = about | {"facts": facts, "rows": rows} | table(facts["device"], rows)
        args.out.write_text(json.dumps(found, indent=1) + "\n")

    serve(lambda: cases(sizes(small=args.small)), time.monotonic() + 60 * args.minutes, tell)
    found = table(facts["device"], rows)
    print(json.dumps(found, indent=1))
    if args.into:
        args.into.write_text(json.dumps(over(known, found), indent=1) + "\n")


def over(known: Any, found: Any) -> Any:
    """Merge nested tables; `found` takes precedence."""
    if not isinstance(known, dict) or not isinstance(found, dict):
        return found
    return known | {key: over(known.get(key), value) for key, value in found.items()}


def cases(sizes: Sizes) -> Iterator[Case]:
    """The legs for bf16 training first, then tiles, then the rest."""
    order = [("bfloat16", "many"), ("bfloat16", "few"), ("float32", "few"), ("float32", "many")]
    yield from _legs(sizes, *order[0])
    yield from _tiles(sizes)
    for dtype, rows in order[1:]:
        yield from _legs(sizes, dtype, rows)


def _legs(sizes: Sizes, dtype: str, rows: str) -> Iterator[Case]:
    E, A = sizes.model.n_routed_experts or 1, sizes.model.num_experts_per_tok or 1
    tokens = E // A if rows == "few" else sizes.expert_tokens[0]  # few rows are no more than there are experts
    for leg in Legs._fields:
        for backend in CANDIDATES:
            _, name, run = experts.case(sizes, tokens, leg, backend, dtype=dtype)
            yield Case(f"legs/{dtype}/{rows}/{leg}/{backend}", f"{name}, {dtype}", run)


def _tiles(sizes: Sizes) -> Iterator[Case]:
    """The Pallas kernels with other tiles, at the main size."""
    tokens = sizes.expert_tokens[0]
    for leg in ("gmm", "gmm_transposed", "tgmm"):
        for tile in TILES[: 2 if sizes.trial else None]:

            def run(leg: str = leg, tile: tuple[int, ...] = tile) -> dict[str, Any]:
                with _tile(tile):
                    return next(one.run() for one in experts.matmuls(sizes) if one.key == f"matmuls.pallas.{leg}")

            yield Case(f"tiles/{leg}/{','.join(map(str, tile))}", f"{leg}, {tokens} tokens, tile {tile}", run)


@contextlib.contextmanager
def _tile(tile: tuple[int, ...]) -> Iterator[None]:
    """Patch the tuned tile; the kernels have no argument for it."""
    original, tuned.tile = tuned.tile, lambda matmul: list(tile)
    jax.clear_caches()  # else an equal call reuses the program of another tile
    try:
        yield
    finally:
        tuned.tile = original
        jax.clear_caches()


def table(device: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fastest candidate per entry; an entry with a candidate that was not run is omitted."""
    best: dict[str, tuple[float, str]] = {}
    begun = [row for row in rows if not row.get("error", "").startswith("not run")]
    unfinished = {row["key"].rpartition("/")[0] for row in rows if row.get("error", "").startswith("not run")}
    for row in begun:
        place, _, candidate = row["key"].rpartition("/")
        if "seconds" in row and place not in unfinished:
            median = statistics.median(row["seconds"])
            if place not in best or median < best[place][0]:
                best[place] = (median, candidate)
    legs: dict[str, Any] = {}
    tiles: dict[str, list[int]] = {}
    for place, (_, candidate) in best.items():
        match place.split("/"):
            case ["legs", dtype, few, leg]:
                legs.setdefault(dtype, {}).setdefault(few, {})[leg] = candidate
            case ["tiles", leg]:
                tiles[leg] = [int(value) for value in candidate.split(",")]
    return {"legs": {device: legs}, "tiles": {device: tiles}}


if __name__ == "__main__":
    main()
