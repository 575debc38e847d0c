"""Ctrl-C handling: `interrupts` raises `KeyboardInterrupt` only where it can end a command cleanly."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets before it raises `KeyboardInterrupt`; an ignored SIGINT stays ignored."""
    pressed = threading.Event()

    def press(_: int, frame: FrameType | None) -> None:
        pressed.set()
        while frame is not None:  # deferred during imports, which would print it or leave a module half initialized
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return _interrupt_soon()
            frame = frame.f_back
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:  # Python only reports exceptions of finalizers
        if issubclass(report.exc_type, KeyboardInterrupt):
            _interrupt_soon()
        else:
            hook(report)

    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield pressed
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, press)
    sys.unraisablehook = unraisable
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def _interrupt_soon() -> None:
    # A signal, not `_thread.interrupt_main`, which does not end a system call.
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.daemon = True
    timer.start()
