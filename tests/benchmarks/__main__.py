"""`python -m tests.benchmarks` measures, prints and writes a report. Start at `main`, then `measure`."""

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
LOGITS: Final = 1e-4  # the twin may differ from us by as much as the original does (README, "Parity")
_CHECK_SHAPE: Final = (2, 48)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the options ask for; returns the exit code: 0, 1 if the twin is no twin, 2 for a user's mistake."""
    try:
        asked = options(sys.argv[1:] if argv is None else argv)
        check_installed(asked.contenders)
    except ValueError as error:
        print(f"tests.benchmarks: {error}", file=sys.stderr)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = measure(asked, Path(folder) / "checkpoint", console.log)
        except RuntimeError as error:
            print(f"tests.benchmarks: {error}", file=sys.stderr)
            return 1
    report.show(results, console)
    for path in report.write(results, asked.out):
        console.print(f"written: {path}", soft_wrap=True)
    return 0


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `ValueError` for a value that does not exist."""
    parser = Parser(prog="python -m tests.benchmarks", description="Speed and memory against peers and floors.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of turns per contender, default 5")
    parser.add_argument("--only", default=",".join(plan.OPTIONS), metavar="AREA,…", help="default %(default)s")
    parser.add_argument("--contenders", default=",".join(plan.ALL), metavar="NAME,…", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=REPORTS, metavar="DIR", help="for the report")
    asked = parser.parse_args(argv)
    if asked.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {asked.rounds}")
    asked.only = _listed("--only", asked.only, plan.OPTIONS)
    asked.contenders = _listed("--contenders", asked.contenders, plan.ALL)
    if asked.out.exists() and not asked.out.is_dir():
        raise ValueError(f"--out {asked.out} is not a directory")
    return asked


def _listed(option: str, value: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a comma list, in the order of `choices`."""
    words = value.split(",")
    for word in words:
        if word not in choices:
            raise ValueError(f"{option} {word!r} does not exist, only {', '.join(choices)}")
    return tuple(choice for choice in choices if choice in words)


def check_installed(contenders: Sequence[str]) -> None:
    """`ValueError` naming the extra if a contender's package is missing."""
    for contender in contenders:
        for package in NEEDS.get(contender, ()):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{contender} needs {package}: pip install -e '.[bench]', or leave it out (--contenders)"
                )


def measure(asked: argparse.Namespace, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Everything asked for, as plain data: what the JSON report holds."""
    start = datetime.datetime.now(datetime.UTC)
    with Child("ours", "write", folder) as ours:
        ours.call("run")
    checks = check_twin(folder) if {"ours", "twin"} <= set(asked.contenders) else {}
    areas = {}
    for name, area in plan.AREAS.items():
        kept = [c for c in area.contenders if c in asked.contenders or area.contenders != plan.ALL]
        if area.option in asked.only:
            log(f"{name}: {', '.join(kept)}, {asked.rounds * area.turns} quiet turns each")
            areas[name] = measure_area(area, kept, asked.rounds, folder)
            log(report.one_line(name, areas[name]))
    return {
        "date": start.date().isoformat(),
        "minutes": (datetime.datetime.now(datetime.UTC) - start).total_seconds() / 60,
        "command": f"python -m tests.benchmarks --rounds {asked.rounds} --only {','.join(asked.only)} "
        f"--contenders {','.join(asked.contenders)}",
        "environment": ENVIRONMENT,
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "checks": checks,
        "areas": areas,
    }


def check_twin(folder: Path) -> dict[str, float]:
    """How far the twin's logits are from ours, by both of its ways; `RuntimeError` if too far to be called a twin."""
    ids = batch(ModelConfig.from_file(folder), *_CHECK_SHAPE)
    with Child("ours", "check", folder) as ours, Child("twin", "check", folder) as twin:
        want = ours.call("logits", ids)
        got = {"training": twin.call("training logits", ids), "decoding": twin.call("decoded logits", ids)}
    half = ids.shape[1] // 2
    want = {"training": want, "decoding": want[:, half - 1 :]}
    far = {f"logits, {way}": float(np.abs(got[way] - want[way]).max()) for way in got}
    for name, distance in far.items():
        if not distance <= LOGITS:
            raise RuntimeError(f"the twin's {name} differ from ours by {distance:.1e}, more than {LOGITS:.0e}")
    return far


def measure_area(area: plan.Area, contenders: Sequence[str], rounds: int, folder: Path) -> dict[str, Any]:
    """All turns of one area, as plain data."""
    judged = area.contenders == plan.ALL
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
        # A turn of decoding is 64 steps, one of these a single one: in use, another has gone before.
        kept, taken = take_rounds(rounds * area.turns, turns, children, warm_up=area.task in ("prefill", "train"))
        result: dict[str, Any] = {
            "tokens": area.tokens,
            "rounds_taken": taken,
            "disturbance": [round.disturbance for round in kept],
            "peak_bytes": {name: children[name].call("peak bytes") for name in contenders},
        }
        for note, action in _NOTES.get(area.task, ()) if judged or area.task == "kernel" else ():
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
    """One turn of everybody."""

    disturbance: float  # the largest share of the machine that others took during a turn
    figures: dict[str, Any]


def take_rounds(
    wanted: int, turns: list[tuple[str, str, str]], children: Mapping[str, Child], *, warm_up: bool = False
) -> tuple[list[Round], int]:
    """The `wanted` least disturbed rounds in their order, and how many were taken.

    Rounds go on until enough were quiet, at most to twice as many. Each begins with another contender, so that
    nobody always follows the same one. A turn is (name of its figure, child, action).
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


# By task: what else a contender tells, and the action that it answers.
_NOTES: Final = {
    "decode1": (("answers", "tokens"),),
    "decode8": (("answers", "tokens"),),
    "train": (("losses", "losses"),),
    "kernel": (("temp_bytes", "temp bytes"),),
}

if __name__ == "__main__":
    sys.exit(main())
