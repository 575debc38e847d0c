"""Each contender in a separate process. Start at `Child`; `CONTENDERS` maps names to modules.

A waiting child blocks on its pipe and uses no CPU; thread pools and memory are not shared.
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

# The actions of a child by name; those that return a time are synchronous.
Actions = dict[str, Callable[..., Any]]

# fmt: off
# name: (room of this package, options of its `actions`)
CONTENDERS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "ours":         ("ours",              {}),
    "ours bf16":    ("ours",              {"dtype": "bfloat16"}),
    "ours int8":    ("ours",              {"quantize": "int8"}),
    "llama.cpp":    ("peer_llama_cpp",    {}),
    "llama.cpp q8_0": ("peer_llama_cpp",  {"dtype": "q8_0"}),
    "twin":         ("peer_torch",        {}),
    "transformers": ("peer_transformers", {}),
    "block_loop":   ("kernel",            {"backend": "block_loop"}),
    "ragged":       ("kernel",            {"backend": "ragged"}),
    "limits":       ("limits",            {}),
}
# Packages of the extra [bench] that a contender needs.
_LLAMA_CPP: Final = ("gguf", "pytest", "xllamacpp")
NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "twin":           ("torch",),
    "transformers":   ("torch", "transformers"),
    "llama.cpp":      _LLAMA_CPP,
    "llama.cpp q8_0": _LLAMA_CPP,
}
# fmt: on

# For all contenders; set before a process starts, unless the caller has set it.
ENVIRONMENT: Final = {
    "JAX_PLATFORMS": "cpu",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages for large arrays
    # PyTorch's threads spin at barriers, which is 3 to 100× slower if another process uses a core; with a short spin
    # it reaches the same best times, with less variance.
    "GOMP_SPINCOUNT": "10000",
}
# Seconds. Thread pools spin briefly after their work, which would slow down the next turn.
_PAUSE: Final = 0.1


class Child:
    """A contender in a separate process, with the weights of `folder` loaded for one task."""

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
        self._answer()  # ready
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def call(self, action: str, *args: Any) -> Any:
        """Run an action in the child and return its result; raise with its traceback if it failed."""
        self._pipe.send((action, args))
        return self._answer()

    def take_turn(self, action: str, *, warm_up: bool = False) -> tuple[Any, float]:
        """Run an action; return its result and the share of CPU time used by other processes.

        With `warm_up`, run it twice and return the second result: an idle process has lost its caches.
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
            raise RuntimeError(f"{self._name} exited with code {self._process.exitcode} (-9: out of memory)") from None
        if not good:
            raise RuntimeError(f"{self._name} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, contender: str, task: str, folder: Path) -> None:
    """Load the contender, then run actions until the pipe is closed."""
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
    """Reset the peak memory after loading (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    """Return the peak memory of this process, compilation and warm-up included."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
