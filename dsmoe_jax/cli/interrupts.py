"""Ctrl-C and SIGTERM: `interrupts` raises `KeyboardInterrupt` only where it can end a command cleanly."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C or SIGTERM sets before it raises `KeyboardInterrupt`; ignored ones stay ignored."""
    pressed = threading.Event()

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()
        while frame is not None:  # deferred during imports, which would print it or leave a module half initialized
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return _interrupt_soon(number)
            frame = frame.f_back
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:  # Python only reports exceptions of finalizers
        if issubclass(report.exc_type, KeyboardInterrupt):
            _interrupt_soon(next(iter(taken)))
        else:
            hook(report)

    is_main = threading.current_thread() is threading.main_thread()
    default = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    taken = {number: handler for number, handler in default.items() if is_main and signal.getsignal(number) == handler}
    if not taken:
        yield pressed
        return
    hook = sys.unraisablehook
    for number in taken:
        signal.signal(number, press)
    sys.unraisablehook = unraisable
    try:
        yield pressed
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _interrupt_soon(number: int) -> None:
    # A signal, not `_thread.interrupt_main`, which does not end a system call.
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number))
    timer.daemon = True
    timer.start()
