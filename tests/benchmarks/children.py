"""Each contender in its own process, taking turns: start at `Child`; `CONTENDERS` says who is who.

A child that waits for its turn blocks on its pipe and costs nothing; thread pools and memory never mix.
"""

import importlib
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import machine

# What a child can be asked to do, by name; what returns a time has finished its work.
Actions = dict[str, Callable[..., Any]]

# fmt: off
# name: (room of this package, options of its `actions`)
CONTENDERS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "ours":         ("ours",              {}),
    "ours bf16":    ("ours",              {"dtype": "bfloat16"}),
    "twin":         ("peer_torch",        {}),
    "transformers": ("peer_transformers", {}),
    "block_loop":   ("kernel",            {"backend": "block_loop"}),
    "ragged":       ("kernel",            {"backend": "ragged"}),
    "limits":       ("limits",            {}),
}
# Packages of the extra [bench] that a contender cannot do without.
NEEDS: Final[dict[str, tuple[str, ...]]] = {"twin": ("torch",), "transformers": ("torch", "transformers")}
# fmt: on

# For every contender alike; set before a process starts, and what the caller has set stays.
ENVIRONMENT: Final = {
    "JAX_PLATFORMS": "cpu",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages for large arrays
    # PyTorch's threads wait for each other by spinning. Where another process has a core, that costs it 3 to 100 times
    # its time; with a short spin it reaches the same best times and keeps to them.
    "GOMP_SPINCOUNT": "10000",
}
# Thread pools spin for a moment after their work; the next turn shall not pay for that.
_PAUSE: Final = 0.1


class Child:
    """A contender in a process of its own, with the weights of `folder` loaded for one task."""

    def __init__(self, contender: str, task: str, folder: Path):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")
        self._name = f"{contender} at {task}"
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender, task, folder), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Child":
        self._answer()  # it is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def call(self, action: str, *args: Any) -> Any:
        """The answer to one action; `RuntimeError` with the child's traceback if it failed."""
        self._pipe.send((action, args))
        return self._answer()

    def take_turn(self, action: str, *, warm_up: bool = False) -> tuple[Any, float]:
        """The answer to `action`, and the share of the machine that other processes took meanwhile.

        With `warm_up`, the answer to the second of two: what was idle must first get its memory and caches back.
        """
        assert self._process.pid is not None
        time.sleep(_PAUSE)
        if warm_up:
            self.call(action)
        start, busy, own = time.perf_counter(), machine.busy_seconds(), machine.cpu_seconds(self._process.pid)
        answer = self.call(action)
        others = machine.busy_seconds() - busy - (machine.cpu_seconds(self._process.pid) - own)
        return answer, max(0.0, others) / (machine.cores() * (time.perf_counter() - start))

    def _answer(self) -> Any:
        try:
            good, answer = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise RuntimeError(f"{self._name} died, exit code {self._process.exitcode} (-9: out of memory)") from None
        if not good:
            raise RuntimeError(f"{self._name} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, contender: str, task: str, folder: Path) -> None:
    """The child's whole life: load, say so, act until the pipe closes."""
    try:
        room, options = CONTENDERS[contender]
        actions: Actions = importlib.import_module(f"tests.benchmarks.{room}").actions(task, folder, **options)
        actions |= {"peak bytes": _peak_bytes}
        _reset_peak()
        pipe.send((True, None))
        while True:
            action, args = pipe.recv()
            pipe.send((True, actions[action](*args)))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send((False, traceback.format_exc()))


def _reset_peak() -> None:
    """Forget what loading took: the peak is to be that of the task. Linux only; elsewhere loading counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    """The most memory this process has held, compilation and warm-up included."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
