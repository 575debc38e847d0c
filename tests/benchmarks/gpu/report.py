"""From rows to the report, JSON and Markdown. Start at `markdown`, then `COLUMNS`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.gpu import parts, work
from tests.benchmarks.timing import Spread, spread

Row = Mapping[str, Any]
Ceilings = Mapping[str, float]  # bytes/s, and operations/s of `matmul`

_LEGEND: Final = """\
Milliseconds are medians with their range. A row's floor is the larger of its operations over the measured bf16 matmul
rate and its bytes over the measured bandwidth (the better of copying and reading); its share is the floor over the
median, by operations or by bytes as it says. Operations are those that the result needs, none that are computed
again; the MFU is that share. Memory is what the compiled program plans to hold; the peak is that of the part's process
up to that row. PyTorch and transformers were not measured."""
_TRIAL: Final = (
    "**A trial at small sizes, whatever the titles say: it shows that the parts run. No figure here is about a GPU.**"
)


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """`YYYY-MM-DD-gpu.json` and `.md` in `out`, `-gpu-trial` for a trial; a report of the same day is overwritten."""
    out.mkdir(parents=True, exist_ok=True)
    kind = "gpu-trial" if results["trial"] else "gpu"
    data, page = (out / f"{results['date']}-{kind}.{ending}" for ending in ("json", "md"))
    data.write_text(json.dumps(results | {"ceilings": ceilings(results)}) + "\n")
    page.write_text(markdown(results))
    return [data, page]


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    facts = {
        "command": f"`{results['command']}`",
        "commit": results["commit"],
        "device": ", ".join(f"{name} {_fact(value)}" for name, value in results["device"].items()),
        "hardware": ", ".join(f"{name} {value}" for name, value in results["hardware"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in results["versions"].items()),
        "took": f"{results['minutes']:.1f} minutes",
    }
    lines = [f"# Benchmarks on GPU, {results['date']}", ""]
    lines += [_TRIAL, ""] if results["trial"] else []
    lines += [*(f"- {name}: {fact}" for name, fact in facts.items()), "", _LEGEND]
    missing = {name: part["not run"] for name, part in results["parts"].items() if "not run" in part}
    if missing:
        lines += ["", "Not run:", "", *(f"- {name} ({parts.PARTS[name].what}): {why}" for name, why in missing.items())]
    rates = ceilings(results)
    for name, part in results["parts"].items():
        if name not in missing:
            lines += ["", f"## {name}: {parts.PARTS[name].what}", "", *_table(name, part["rows"], rates)]
    return "\n".join([*lines, ""])


def ceilings(results: Mapping[str, Any]) -> dict[str, float]:
    """The rates that were measured, by name: `copy`, `read`, `matmul`."""
    found = {}
    for row in results["parts"].get(parts.CEILINGS, {"rows": []})["rows"]:
        if "seconds" in row:
            name = row["key"].split(".")[1]
            found[name] = row["flops" if name == "matmul" else "bytes"] / _spread(row).median
    return found


def one_line(row: Row) -> str:
    """How a row went, while the next one runs."""
    return f"{row['name']}: {row.get('error') or f'{1000 * _spread(row).median:.4g} ms'}"


def share(row: Row, rates: Ceilings) -> str:
    """The floor over the median, and which floor it was."""
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
    """A line for every row; columns that no row fills are left out, a row that failed has its reason as its note."""
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
    return f"{row[amount] / unit / _spread(row).median:.4g}" if row.get(amount) else ""


def _spread(row: Row) -> Spread:
    return spread(row["seconds"])


def _fact(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1e9:.4g} GB" if isinstance(value, int) and value > 1e6 else str(value)
