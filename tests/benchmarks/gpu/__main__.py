"""`python -m tests.benchmarks.gpu`: measure part by part and write a report. Start at `main`, then `measure`."""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.cli.commands import Parser
from tests.benchmarks import machine
from tests.benchmarks.gpu import parts, report

REPORTS: Final = Path(__file__).parents[1] / "reports"
_ROOT: Final = Path(__file__).parents[3]
_LONGEST_ROW: Final = 180  # seconds of grace for a part beyond its allotment
_PROBE: Final = "import jax; print(jax.default_backend())"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return the exit code: 2 for invalid options."""
    try:
        args = options(sys.argv[1:] if argv is None else argv)
        if not args.small and (backend := default_backend()) != "gpu":
            print(
                f"No GPU found (default backend {backend!r}): running a trial at small sizes, as with --small",
                flush=True,
            )
            args.small = True
    except ValueError as error:
        print(f"tests.benchmarks.gpu: {error}", file=sys.stderr)
        return 2

    def log(line: str) -> None:
        print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)

    measure(args, log)
    return 0


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and validate the options."""
    parser = Parser(prog="python -m tests.benchmarks.gpu", description="Speed and memory on one NVIDIA GPU.")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="time budget, default %(default)s")
    parser.add_argument("--only", default="", metavar="PART,…", help=f"default all: {', '.join(parts.PARTS)}")
    parser.add_argument("--small", action="store_true", help="a trial at small sizes, on the CPU")
    parser.add_argument("--out", type=Path, default=REPORTS, metavar="DIR", help="directory of the report")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {args.minutes:g}")
    args.only = parts.chosen(args.only.split(",") if args.only else None)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a directory")
    return args


def default_backend() -> str:
    """Return jax's default backend, from a child process, as this one must not allocate GPU memory."""
    found = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"jax failed to start: {(found.stderr.strip().splitlines() or ['no output'])[-1]}")
    return found.stdout.strip()


def measure(args: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """Run all parts that fit; the report is written after each of them, merged with the one that it continues."""
    start, budget = time.monotonic(), 60 * args.minutes
    shown = f"--minutes {args.minutes:g}" + (" --small" if args.small else "")
    shown += "" if args.only == list(parts.PARTS) else f" --only {','.join(args.only)}"
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "trial": args.small,
        "commands": [f"python -m tests.benchmarks.gpu {shown}"],
        "commit": machine.commit(),
        "sources": sources(),
        "hardware": machine.hardware() | driver(),
        "versions": machine.versions(),
        "minutes": 0.0,
        "device": {},
        "parts": {name: {"rows": [], "not run": "not reached"} for name in args.only},
    }
    place, written = None, []
    for name in args.only:
        left = budget - (time.monotonic() - start)
        seconds = parts.allotment(name, left, args.only, budget)
        if seconds is None:
            results["parts"][name]["not run"] = f"{max(left, 0):.0f} s were left, it takes {parts.PARTS[name].least}"
        else:
            results["parts"][name] = run_part(name, seconds, left, results["device"], small=args.small, log=log)
        results["minutes"] = (time.monotonic() - start) / 60
        results["parts"][name]["ceilings"] = report.ceilings(results)
        place = place or report.place(results, args.out)  # known from the first part
        written = report.write(report.merged(results, place.earlier), place.stem)
    for path in written:
        log(f"Saved report: {path}")
    return results


def run_part(
    name: str, seconds: float, left: float, device: dict[str, Any], *, small: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """Run a part in a child process and return its rows.

    No row starts after `seconds`; the process is killed if a row exceeds `left`, or takes very long.
    """
    log(f"{name}: {parts.PARTS[name].what}, up to {seconds:.0f} s")
    start, rows = time.monotonic(), []
    command = [sys.executable, "-m", "tests.benchmarks.gpu.child", name, str(seconds), *(["--small"] if small else [])]
    limit = min(left, seconds + _LONGEST_ROW)
    for row in lines_of(command, parts.environment(name, os.environ, small=small), limit):
        if "facts" in row:
            device |= row["facts"]
        else:
            rows.append(row)
            log(f"  {report.one_line(row)}")
    return {"rows": rows, "seconds": time.monotonic() - start}


def lines_of(command: Sequence[str], environment: Mapping[str, str], limit: float) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a process, and an error if it was killed or failed."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=said, text=True
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        timer = threading.Timer(limit, process.kill)
        stack.callback(timer.cancel)
        timer.start()
        assert process.stdout is not None
        with process.stdout:
            yield from (json.loads(line) for line in process.stdout if line.endswith("\n"))
        code = process.wait()
        said.seek(0)
        last = (said.read().strip().splitlines() or ["no output"])[-1]
        if code and time.monotonic() - start >= limit:
            yield {"key": "", "name": "all further cases", "error": f"not run: the part was ended after {limit:.0f} s"}
        elif code:
            yield {"key": "", "name": "all further cases", "error": f"exit code {code} of the process: {last[:200]}"}


def sources() -> str:
    """Return a digest of the package and of this benchmark, which includes uncommitted changes."""
    folders = ("dsmoe_jax", "convert", "train", "tests/benchmarks/gpu")
    files = (file for folder in folders for file in (_ROOT / folder).rglob("*") if file.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def driver() -> dict[str, str]:
    """Return the GPU's name, driver and power limit from nvidia-smi; empty without it."""
    fields = ("name", "driver_version", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(("gpu", "driver", "power limit"), (value.strip() for value in found.split(",")), strict=False))


if __name__ == "__main__":
    sys.exit(main())
