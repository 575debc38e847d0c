"""Format rows as a report, in JSON and Markdown. Start at `markdown`, then `COLUMNS`."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.benchmarks.gpu import bars, parts, work
from tests.benchmarks.timing import Spread, spread

Row = Mapping[str, Any]
Ceilings = Mapping[str, float]  # bytes/s, and operations/s of `matmul`

_LEGEND: Final = """\
Milliseconds are medians with their range. A row's floor is the larger of its operations over the measured bf16 matmul
rate and its bytes over the measured bandwidth (the better of copying and reading); its share is the floor over the
median, by operations or by bytes as it says. Operations are those that the result needs, none that are computed
again. Memory is what the compiled program plans to hold; the peak is that of the part's process up to that row."""
_TRIAL: Final = (
    "**A trial at small sizes, whatever the titles say: it shows that the parts run. No figure here is about a GPU.**"
)


class Place(NamedTuple):
    """The path of a report, and the report that it continues, if any."""

    stem: Path
    earlier: Mapping[str, Any] | None


def place(results: Mapping[str, Any], out: Path, number: int = 1) -> Place:
    """Choose `YYYY-MM-DD-gpu` in `out`, `-gpu-trial` for a trial, with a suffix `-2`, … if the report differs."""
    kind, more = "gpu-trial" if results["trial"] else "gpu", "" if number == 1 else f"-{number}"
    stem = out / f"{results['date']}-{kind}{more}"
    data = stem.with_suffix(".json")
    if not data.exists():
        return Place(stem, None)
    with contextlib.suppress(ValueError):  # truncated by an interrupted run
        earlier = json.loads(data.read_text())
        if _subject(earlier) == _subject(results):
            return Place(stem, earlier)
    return place(results, out, number + 1)


def _subject(results: Mapping[str, Any]) -> list[Any]:
    """Return the properties that runs in one report share."""
    return [results.get("device", {}).get("device"), *(results.get(name) for name in ("commit", "sources", "versions"))]


def merged(results: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Add the parts that only the earlier run measured, with their ceilings."""
    if earlier is None:
        return dict(results)
    ran = {name: part for name, part in results["parts"].items() if any("seconds" in row for row in part["rows"])}
    known = {name: part for name, part in earlier["parts"].items() if part["rows"]}
    together = {**earlier["parts"], **results["parts"], **known, **ran}
    return {
        **results,
        "commands": [*earlier["commands"], *results["commands"]],
        "minutes": earlier["minutes"] + results["minutes"],
        "parts": {name: together[name] for name in parts.PARTS if name in together},
    }


def write(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write both files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data, page = stem.with_suffix(".json"), stem.with_suffix(".md")
    data.write_text(json.dumps({**results, "bars": bars.measured(results)}) + "\n")
    page.write_text(markdown(results))
    return [data, page]


def markdown(results: Mapping[str, Any]) -> str:
    """Format the report as Markdown."""
    facts = {
        "commands" if len(results["commands"]) > 1 else "command": ", ".join(f"`{one}`" for one in results["commands"]),
        "commit": results["commit"],
        "device": ", ".join(f"{name.replace('_', ' ')} {_fact(value)}" for name, value in results["device"].items()),
        "hardware": ", ".join(f"{name} {value}" for name, value in results["hardware"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
        "took": f"{results['minutes']:.1f} minutes",
    }
    lines = [f"# Benchmarks on GPU, {results['date']}", ""]
    lines += [_TRIAL, ""] if results["trial"] else []
    lines += [*_bars(results), "", *(f"- {name}: {fact}" for name, fact in facts.items()), "", _LEGEND]
    missing = {name: part["not run"] for name, part in results["parts"].items() if "not run" in part}
    if missing:
        lines += ["", "Not run:", "", *(f"- {name} ({parts.PARTS[name].what}): {why}" for name, why in missing.items())]
    latest = ceilings(results)
    for name, part in results["parts"].items():
        if name not in missing:
            lines += ["", f"## {name}: {parts.PARTS[name].what}", ""]
            lines += [_other_run(part["ceilings"]), ""] if part["ceilings"] != latest else []
            lines += _table(name, part["rows"], part["ceilings"])
    return "\n".join([*lines, ""])


def _bars(results: Mapping[str, Any]) -> list[str]:
    """Format one line per bar."""
    lines = ["| figure | measured | bar | aim | met | of |", "| --- " * 6 + "|"]
    for line in bars.measured(results):
        value, figure = line["measured"], f"{line['figure']}, {line['unit']}"
        met = "not measured" if value is None else {None: "a trial", True: "yes", False: "no"}[line["met"]]
        shown = "" if value is None else _number(value)
        lines.append(f"| {figure} | {shown} | {line['bar']:,} | {line['aim']:,} | {met} | {line['of']} |")
    return [*lines, "", "The bars and aims are for one H200."]


def _other_run(rates: Ceilings) -> str:
    shown = [
        f"{name} {rate / 1e12:.4g} TFLOP/s" if name == "matmul" else f"{name} {rate / 1e9:.4g} GB/s"
        for name, rate in rates.items()
    ]
    return f"Of another run, against its own ceilings: {', '.join(shown) or 'none'}."


def ceilings(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the measured rates `copy`, `read` and `matmul`."""
    found = {}
    for row in results["parts"].get(parts.CEILINGS, {"rows": []})["rows"]:
        if "seconds" in row:
            name = row["key"].split(".")[1]
            found[name] = row["flops" if name == "matmul" else "bytes"] / _spread(row).median
    return found


def one_line(row: Row) -> str:
    """Summarize a row in one line."""
    return f"{row['name']}: {row.get('error') or f'{1000 * _spread(row).median:.4g} ms'}"


def share(row: Row, rates: Ceilings) -> str:
    """Return the floor over the median, and which floor it is."""
    floor = work.total(row, rates)
    if floor is None:
        return ""
    by = "operations" if work.total({"flops": row.get("flops")}, rates) == floor else "bytes"
    return f"{floor / _spread(row).median:.1%} ({by})"


# fmt: off
COLUMNS: Final[dict[str, Callable[[Row, Ceilings], str]]] = {
    "median ms":   lambda row, _: f"{1000 * _spread(row).median:.4g}",
    "range":       lambda row, _: f"{1000 * _spread(row).least:.4g} … {1000 * _spread(row).most:.4g}",
    "turns":       lambda row, _: f"{len(row['seconds'])}",
    "tok/s":       lambda row, _: _rate(row, "tokens", 1),
    "TFLOP/s":     lambda row, _: _rate(row, "flops", 1e12),
    "GB/s":        lambda row, _: _rate(row, "bytes", 1e9),
    "share":       share,
    "memory GB":   lambda row, _: f"{row['memory'] / 1e9:.4g}" if row.get("memory") else "",
    "peak GB":     lambda row, _: f"{row['peak'] / 1e9:.4g}" if row.get("peak") else "",
    "compile s":   lambda row, _: f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
    "note":        lambda row, _: row.get("note", ""),
}
# fmt: on


def _table(part: str, rows: list[Row], rates: Ceilings) -> list[str]:
    """Format one line per row, without empty columns; the note of a failed row is its error."""
    if not rows:
        return ["No row came back."]
    shown = [_cells(row, rates) for row in rows]
    kept = [name for name in COLUMNS if any(cells[name] for cells in shown)]
    titles = ["", *(parts.PARTS[part].share if name == "share" else name for name in kept)]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row, cells in zip(rows, shown, strict=True):
        lines.append(f"| {' | '.join([row['name'], *(cells[name].replace('|', '/') for name in kept)])} |")
    return lines


def _cells(row: Row, rates: Ceilings) -> dict[str, str]:
    if "error" in row:
        return dict.fromkeys(COLUMNS, "") | {"note": row["error"]}
    return {name: cell(row, rates) for name, cell in COLUMNS.items()}


def _rate(row: Row, amount: str, unit: float) -> str:
    return _number(row[amount] / unit / _spread(row).median) if row.get(amount) else ""


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def _spread(row: Row) -> Spread:
    return spread(row["seconds"])


def _fact(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value / 1e12:.4g} TFLOP/s"
    return f"{value / 1e9:.4g} GB" if isinstance(value, int) and value > 1e6 else str(value)
