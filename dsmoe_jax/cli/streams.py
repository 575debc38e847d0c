"""Standard streams that may be closed, broken or unable to encode all text. Start at `open_standard_streams`."""

import codecs
import contextlib
import os
import select
import sys
from typing import Any, Final, TextIO

# By file descriptor: name in `sys`, flags and mode to open /dev/null.
_STREAMS: Final = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def open_standard_streams() -> None:
    """Open `/dev/null` for closed streams, and escape characters that the terminal cannot encode. Call it first."""
    # Otherwise the next opened file would get the descriptor of a closed stream, and library output would go there.
    for number, (name, flags, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:  # closed
            null = os.open(os.devnull, flags)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="backslashreplace")
    # Undecodable bytes are rejected later. An ASCII terminal may still send UTF-8.
    encoding = getattr(sys.stdin, "encoding", None) or "ascii"
    is_ascii = codecs.lookup(encoding).name == "ascii"
    _reconfigure(sys.stdin, encoding="utf-8" if is_ascii else encoding, errors="surrogateescape")


def print_status(text: object, end: str = "\n") -> None:
    """Print a status line to stdout; ignore a closed pipe, raise `OSError` for any other failure."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise OSError(error.errno, error.strerror, "stdout") from None


def print_error(line: str) -> None:
    """Print a line to stderr, unless it cannot be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def describe_error(error: BaseException) -> str:
    """Return the message of an error on one line, that of an `OSError` without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    return " ".join(text.split())


def reader_has_left() -> bool:
    """Return whether the reader of stdout or stderr closed its pipe."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # streams of pytest have no descriptor
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def flush_or_discard() -> None:
    """Flush stdout and stderr, discarding unwritable output so that Python does not fail at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Redirect buffered and future output to `/dev/null`."""
    with contextlib.suppress(OSError, ValueError):  # streams of pytest have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _reconfigure(stream: Any, **options: str) -> None:
    """Reconfigure a text stream, unless it is one of pytest or a notebook."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(**options)
