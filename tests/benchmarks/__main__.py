"""`python -m tests.benchmarks`: measure, print and write a report. Start at `main`, then `measure`."""

import argparse
import datetime
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from rich.console import Console

from dsmoe_jax.cli.commands import Parser
from dsmoe_jax.config import ModelConfig
from tests.benchmarks import machine, plan, report
from tests.benchmarks.children import ENVIRONMENT, NEEDS, Child
from tests.benchmarks.inputs import batch

REPORTS: Final = Path(__file__).parent / "reports"
LOGITS: Final = 1e-4  # absolute; the README allows the same for the original ("Parity")
_CHECK_SHAPE: Final = (2, 48)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return the exit code: 1 if the PyTorch peer's logits differ, 2 for invalid options."""
    try:
        args = options(sys.argv[1:] if argv is None else argv)
        check_installed([name for area in chosen_areas(args).values() for name in area.contenders])
    except ValueError as error:
        print(f"tests.benchmarks: {error}", file=sys.stderr)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = measure(args, Path(folder) / "checkpoint", console.log)
        except RuntimeError as error:
            print(f"tests.benchmarks: {error}", file=sys.stderr)
            return 1
    report.show(results, console)
    for path in report.write(results, args.out):
        console.print(f"Saved report: {path}", soft_wrap=True)
    return 0


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and validate the options."""
    parser = Parser(prog="python -m tests.benchmarks", description="Speed and memory against peers and floors.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds per contender, default 5")
    parser.add_argument("--only", default=",".join(plan.OPTIONS), metavar="AREA,…", help="default %(default)s")
    parser.add_argument("--contenders", default=",".join(plan.ALL), metavar="NAME,…", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=REPORTS, metavar="DIR", help="directory of the report")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    args.only = _listed("--only", args.only, plan.OPTIONS)
    args.contenders = _listed("--contenders", args.contenders, plan.ALL)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a directory")
    return args


def _listed(option: str, value: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Split a comma-separated list and sort it in the order of `choices`."""
    words = value.split(",")
    for word in words:
        if word not in choices:
            raise ValueError(f"{option} must be one of {', '.join(choices)}, got {word!r}")
    return tuple(choice for choice in choices if choice in words)


def check_installed(contenders: Sequence[str]) -> None:
    """Raise if a contender's package is not installed, naming the extra."""
    for contender in contenders:
        for package in NEEDS.get(contender, ()):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{contender} needs {package}: pip install -e '.[bench]', or leave it out (--contenders)"
                )


def chosen_areas(args: argparse.Namespace) -> dict[str, plan.Area]:
    """Return the selected areas with the selected contenders; those of special areas are fixed."""
    chosen = {}
    for name, area in plan.AREAS.items():
        kept = tuple(c for c in area.contenders if c in args.contenders or area.contenders != plan.ALL)
        if area.option in args.only:
            chosen[name] = area._replace(contenders=kept)
    return chosen


def measure(args: argparse.Namespace, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Run all selected areas; return the content of the JSON report."""
    start = datetime.datetime.now(datetime.UTC)
    with Child("ours", "write", folder) as ours:
        ours.call("run")
    checks = check_twin(folder) if {"ours", "twin"} <= set(args.contenders) else {}
    areas = {}
    for name, area in chosen_areas(args).items():
        log(f"{name}: {', '.join(area.contenders)}, {args.rounds * area.turns} quiet turns each")
        areas[name] = measure_area(area, plan.AREAS[name].contenders == plan.ALL, args.rounds, folder)
        log(report.one_line(name, areas[name]))
    return {
        "date": start.date().isoformat(),
        "minutes": (datetime.datetime.now(datetime.UTC) - start).total_seconds() / 60,
        "command": f"python -m tests.benchmarks --rounds {args.rounds} --only {','.join(args.only)} "
        f"--contenders {','.join(args.contenders)}",
        "environment": ENVIRONMENT,
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "checks": checks,
        "areas": areas,
    }


def check_twin(folder: Path) -> dict[str, float]:
    """Return the largest logit difference of the PyTorch peer, in training and in decoding; raise above `LOGITS`."""
    ids = batch(ModelConfig.from_file(folder), *_CHECK_SHAPE)
    with Child("ours", "check", folder) as ours, Child("twin", "check", folder) as twin:
        want = ours.call("logits", ids)
        got = {"training": twin.call("training logits", ids), "decoding": twin.call("decoded logits", ids)}
    half = ids.shape[1] // 2
    want = {"training": want, "decoding": want[:, half - 1 :]}
    far = {f"logits, {way}": float(np.abs(got[way] - want[way]).max()) for way in got}
    for name, distance in far.items():
        if not distance <= LOGITS:
            raise RuntimeError(f"the PyTorch {name} must differ from ours by at most {LOGITS:.0e}, got {distance:.1e}")
    return far


def measure_area(area: plan.Area, judged: bool, rounds: int, folder: Path) -> dict[str, Any]:
    """Measure one area; if `judged`, with the limits of the hardware."""
    contenders = area.contenders
    watched = [*contenders, "limits"] if judged else list(contenders)
    turns = [(name, name, "run") for name in watched]
    reads = judged and "ours" in watched and area.task.startswith("decode")
    if reads:
        turns.insert(1, (plan.FLOOR, "ours", "floor"))
    with ExitStack() as stack:
        loading = {name: Child(name, area.task, folder) for name in watched}
        children = {name: stack.enter_context(child) for name, child in loading.items()}
        for _, child, action in turns:
            children[child].call(action)  # compile and warm up
        # Prefill and train turns are a single step, so they are preceded by another one; a decode turn has 64 steps.
        kept, taken = take_rounds(rounds * area.turns, turns, children, warm_up=area.task in ("prefill", "train"))
        result: dict[str, Any] = {
            "tokens": area.tokens,
            "rounds_taken": taken,
            "disturbance": [round.disturbance for round in kept],
            "peak_bytes": {name: children[name].call("peak bytes") for name in contenders},
        }
        for note, action in _NOTES.get(area.task, ()) if judged or area.option in ("kernel", "llama.cpp") else ():
            result[note] = {name: children[name].call(action) for name in contenders}
        if reads:
            result["floor_bytes"] = children["ours"].call("floor bytes") * plan.NEW_TOKENS
    figures = {name: [round.figures[name] for round in kept] for name, _, _ in turns}
    limits = figures.pop("limits", [])
    result["limits"] = {name: [limit[name] for limit in limits] for name in (limits[0] if limits else ())}
    work = plan.task_flops(ModelConfig.preset(plan.PRESET))
    if limits and area.task in work:
        result["floor_flops"] = work[area.task]
        figures[plan.FLOOR] = [work[area.task] / rate for rate in result["limits"]["matmul"]]
    return result | {"seconds": figures}


class Round(NamedTuple):
    """One turn of each contender."""

    disturbance: float  # the largest share of CPU time used by other processes during a turn
    figures: dict[str, Any]


def take_rounds(
    wanted: int, turns: list[tuple[str, str, str]], children: Mapping[str, Child], *, warm_up: bool = False
) -> tuple[list[Round], int]:
    """Return the `wanted` least disturbed rounds, in order, and the number of rounds run.

    Rounds are repeated until enough were quiet, at most twice as many. The starting contender rotates, so that none
    always follows the same one. A turn is (name of its figure, child, action).
    """
    rounds: list[Round] = []
    while sum(round.disturbance <= plan.QUIET for round in rounds) < wanted and len(rounds) < 2 * wanted:
        shift, figures, disturbance = len(rounds) % len(turns), {}, 0.0
        for name, child, action in turns[shift:] + turns[:shift]:
            figures[name], others = children[child].take_turn(action, warm_up=warm_up)
            disturbance = max(disturbance, others)
        rounds.append(Round(disturbance, figures))
    bound = sorted(round.disturbance for round in rounds)[wanted - 1]
    return [round for round in rounds if round.disturbance <= bound][:wanted], len(rounds)


# Additional results by task: (name, action of the child).
_NOTES: Final = {
    "decode1": (("answers", "tokens"),),
    "decode8": (("answers", "tokens"),),
    "train": (("losses", "losses"),),
    "kernel": (("temp_bytes", "temp bytes"),),
}

if __name__ == "__main__":
    sys.exit(main())
