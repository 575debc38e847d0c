"""Ctrl-C: `KeyboardInterrupt` where it can end a command cleanly."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Yield an event that is set by Ctrl-C, which also raises `KeyboardInterrupt`.

    It is deferred during imports, since extension modules print it or continue half initialized. Python only reports it
    in finalizers, so it is raised again. A process that ignores SIGINT continues to do so.
    """
    pressed = threading.Event()

    def press(_: int, frame: FrameType | None) -> None:
        pressed.set()
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return _interrupt_soon()
            frame = frame.f_back
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:
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
