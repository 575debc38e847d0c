"""Format measurements as tables, for the terminal and Markdown. Start at `tables`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from tests.benchmarks import plan
from tests.benchmarks.timing import Spread, ratios, spread


class Table(NamedTuple):
    """A table of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(results: dict[str, Any]) -> list[Table]:
    """Return all tables, the verdicts first."""
    made = [_ratio_table(results), _figure_table(results), _limit_table(results), _agreement_table(results)]
    return [table for table in made if table.rows]


def show(results: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for table in tables(results):
        drawn = RichTable(*table.columns, title=table.title, title_justify="left", box=box.SIMPLE)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """Write `YYYY-MM-DD-cpu.json` and `.md`, replacing a report of the same day; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    data, page = (out / f"{results['date']}-cpu.{ending}" for ending in ("json", "md"))
    data.write_text(json.dumps(results | {"bars": [bar._asdict() | _held(bar, results) for bar in _bars(results)]}))
    page.write_text(markdown(results))
    return [data, page]


def markdown(results: dict[str, Any]) -> str:
    """Format the report as Markdown."""
    facts = {
        "command": f"`{results['command']}`",
        "commit": results["commit"],
        "hardware": ", ".join(f"{name} {value}" for name, value in results["hardware"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
        "environment of every contender": " ".join(f"`{n}={v}`" for n, v in results["environment"].items()),
        "took": f"{results['minutes']:.0f} minutes",
    }
    lines = [f"# Benchmarks on CPU, {results['date']}", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    for table in tables(results):
        lines += ["", f"## {table.title}", "", f"| {' | '.join(table.columns)} |", "| --- " * len(table.columns) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*lines, ""])


def one_line(name: str, area: dict[str, Any]) -> str:
    """Summarize an area in one line."""
    medians = [f"{who} {1000 * spread(figures).median:.4g} ms" for who, figures in area["seconds"].items()]
    return f"{name}: {', '.join(medians)}"


def _bars(results: dict[str, Any]) -> Iterator[plan.Bar]:
    """Yield the bars whose contenders were both measured."""
    for bar in plan.BARS:
        sides = results["areas"].get(bar.area, {}).get(bar.quantity, {})
        if bar.above in sides and bar.below in sides:
            yield bar


def _held(bar: plan.Bar, results: dict[str, Any]) -> dict[str, Any]:
    """Return the ratio of a bar and its verdict; `best` is the ratio of the two best turns.

    Disturbed measurements are marked: load from other processes slows PyTorch more than us.
    """
    sides = results["areas"][bar.area][bar.quantity]
    above, below = sides[bar.above], sides[bar.below]
    if bar.quantity != "seconds":
        above, below = [above], [below]
    ratio = spread(ratios(above, below))
    stands = verdict(bar, ratio.median)
    if stands and bar.quantity == "seconds" and max(results["areas"][bar.area]["disturbance"]) > plan.QUIET:
        stands += ", disturbed"
    return {"ratio": ratio._asdict(), "best": min(above) / min(below), "verdict": stands}


def verdict(bar: plan.Bar, ratio: float) -> str:
    """Compare a ratio with its bar and aim."""
    if bar.bar is None:
        return ""

    def reached(mark: float) -> bool:
        return ratio >= mark if bar.sense == "at least" else ratio <= mark

    if not reached(bar.bar):
        return "MISSED"
    return "aim" if bar.aim is not None and reached(bar.aim) else "held"


def _ratio_table(results: dict[str, Any]) -> Table:
    rows = []
    for bar in _bars(results):
        held = _held(bar, results)
        ratio, sign = Spread(**held["ratio"]), {"at least": "≥", "at most": "≤"}[bar.sense]
        marks = ["" if mark is None else f"{sign} {mark:.3g}" for mark in (bar.bar, bar.aim)]
        what = f"{bar.above} / {bar.below}" + (", temporary memory" if bar.quantity == "temp_bytes" else "")
        numbers = (f"{ratio.median:.3g}", *_spans(ratio, 3), f"{held['best']:.3g}")
        rows.append((bar.area, what, *numbers, *marks, held["verdict"]))
    columns = ("area", "time of", "median", "quartiles", "range", "best turns", "bar", "aim", "verdict")
    return Table("Ratios, turn by turn", columns, rows)


def _figure_table(results: dict[str, Any]) -> Table:
    rows = []
    for name, area in results["areas"].items():
        for who, figures in area["seconds"].items():
            ms = Spread(*(1000 * second for second in spread(figures)))
            rate = f"{1000 * area['tokens'] / ms.median:.0f}" if area["tokens"] else ""
            memory = area["peak_bytes"].get(who)
            peak = f"{memory / 2**30:.2f}" if memory else ""
            rows.append((name, who, rate, f"{ms.median:.4g}", *_spans(ms, 4), str(len(figures)), peak))
    columns = ("area", "contender", "tok/s", "median ms", "quartiles", "range", "turns", "peak GiB")
    return Table("Figures, one turn each", columns, rows)


def _spans(figure: Spread, digits: int) -> tuple[str, str]:
    """Format quartiles and range."""
    ends = ((figure.quartile1, figure.quartile3), (figure.least, figure.most))
    quartiles, whole = (f"{low:.{digits}g} … {high:.{digits}g}" for low, high in ends)
    return quartiles, whole


def _limit_table(results: dict[str, Any]) -> Table:
    rows = []
    for name, area in results["areas"].items():
        rates = [spread(area["limits"][limit]) for limit in ("read", "copy", "matmul") if limit in area["limits"]]
        texts = [f"{r.median / 1e9:.3g} ({r.least / 1e9:.3g} … {r.most / 1e9:.3g})" for r in rates] or [""] * 3
        floor = ""
        if "floor_bytes" in area:
            floor = f"{area['floor_bytes'] / 1e9:.3g} GB read"
        if "floor_flops" in area:
            floor = f"{area['floor_flops'] / 1e9:.4g} GFLOP"
        kept = f"{len(area['disturbance'])} of {area['rounds_taken']}"
        rows.append((name, *texts, floor, kept, f"{max(area['disturbance']):.0%}"))
    columns = ("while measuring", "read GB/s", "copy GB/s", "fp32 matmul GFLOP/s", "a turn's floor")
    quiet = ("rounds kept", "others took up to")
    return Table("The machine's limits, median (range), and its peace", (*columns, *quiet), rows)


def _agreement_table(results: dict[str, Any]) -> Table:
    """Compare our outputs with those of the peers that have the same weights."""
    rows = [(name, f"{far:.1e} apart") for name, far in results["checks"].items()]
    for name, area in results["areas"].items():
        for peer, steps in _same_weights(area, "answers"):
            equal = [ours == other for pair in steps for ours, other in zip(*pair, strict=True)]
            rows.append((f"greedy tokens, {name}, {peer}", f"{sum(equal)} of {len(equal)} equal"))
        for peer, steps in _same_weights(area, "losses"):
            far = max(abs(ours - other) for ours, other in steps)
            rows.append((f"loss, {len(steps)} steps, {peer}", f"{far:.1e} apart"))
    return Table("Agreement with ours", ("what", "by"), rows)


def _same_weights(area: dict[str, Any], note: str) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
    """Yield each peer with our results and its own, step by step."""
    told = area.get(note, {})
    for peer in ("twin", "llama.cpp"):
        if "ours" in told and peer in told:
            yield peer, list(zip(told["ours"], told[peer], strict=True))
