"""The standard streams of a command: open, able to print any text, and never a reason to lose work.

A job of cron or systemd may start with some of them closed, a reader may leave early, and a terminal may have an
encoding that cannot show what a model writes. Start at `open_standard_streams`.
"""

import codecs
import contextlib
import os
import select
import sys
from typing import Any, Final, TextIO

# By descriptor: the name in `sys`, how /dev/null is opened in its place.
_STREAMS: Final = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def open_standard_streams() -> None:
    """Open `/dev/null` in place of closed streams, and escape what the terminal cannot encode.

    Call it before anything else opens a file: the next file gets the descriptor of a closed stream, and whatever a
    library prints is then written into that file.
    """
    for number, (name, flags, mode) in enumerate(_STREAMS):
        if not _is_open(number):
            null = os.open(os.devnull, flags)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="backslashreplace")
    # Bytes that do not decode are refused by whoever reads the line; an ASCII terminal sends UTF-8 or nothing else.
    encoding = getattr(sys.stdin, "encoding", None) or "ascii"
    is_ascii = codecs.lookup(encoding).name == "ascii"
    _reconfigure(sys.stdin, encoding="utf-8" if is_ascii else encoding, errors="surrogateescape")


def print_status(text: object, end: str = "\n") -> None:
    """Print what a job reports on stdout; a reader that has gone away does not stop the job.

    Raises:
        OSError: if stdout cannot be written for another reason; it is named in the message.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise OSError(error.errno, error.strerror, "stdout") from None


def print_error(line: str) -> None:
    """Print a line on stderr, or nothing if stderr cannot be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def reader_has_left() -> bool:
    """Whether whoever read stdout or stderr through a pipe has closed it."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # pytest's streams have no descriptor
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def flush_or_discard() -> None:
    """Flush stdout and stderr; discard what cannot be written, so that Python does not fail on it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send what is buffered, and whatever is written from now on, to `/dev/null`."""
    with contextlib.suppress(OSError, ValueError):  # pytest's streams have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _reconfigure(stream: Any, **options: str) -> None:
    """Reconfigure a text stream of Python's own; those of pytest and notebooks stay as they are."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(**options)
