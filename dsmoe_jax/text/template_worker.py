"""Render chat templates in a subprocess with limits on time, memory and output: `render`.

Templates come from downloaded checkpoints. Jinja's sandbox blocks access to files and objects, but not `9**9**9`.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text import jinja_sandbox

_PROGRAM: Final = str(Path(jinja_sandbox.__file__).absolute())
# The status byte and at most 4 bytes per character.
_MAX_RESPONSE_BYTES: Final = 4 * jinja_sandbox.CHARACTERS + 1
_lock = threading.Lock()
_worker: subprocess.Popen[bytes] | None = None
_inherited: list[subprocess.Popen[bytes]] = []  # of the parent process; referenced, so that they are not terminated


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a template in the worker process; the messages of errors continue "the chat template failed: "."""
    try:
        request = json.dumps({"template": template, "variables": dict(variables)}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DSMoEError(f"its variables must be JSON: {error}") from None
    with _lock:
        try:
            response = _exchange(_running_worker(), request)
        except BaseException:  # KeyboardInterrupt too: a pending response would be read by the next call.
            _stop()
            raise
    text = response[1:].decode("utf-8", "surrogatepass")
    if response[:1] != b"+":
        raise DSMoEError(text)
    return text


def _exchange(worker: subprocess.Popen[bytes], request: bytes) -> bytes:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(len(request).to_bytes(8, "little"))
        worker.stdin.write(request)
        worker.stdin.flush()
        head = worker.stdout.read(8)
        size = int.from_bytes(head, "little")
        response = worker.stdout.read(size) if len(head) == 8 and 0 < size <= _MAX_RESPONSE_BYTES else b""
    except BrokenPipeError:
        size, response = 0, b""
    if response and len(response) == size:
        return response
    try:
        code = worker.wait(timeout=1)
    except subprocess.TimeoutExpired:
        raise DSMoEError("its process sent a malformed response") from None
    if code == -14:  # SIGALRM
        raise DSMoEError(f"it took more than {jinja_sandbox.SECONDS} s")
    raise DSMoEError(f"its process ended with exit code {code}; memory is limited to {jinja_sandbox.MEGABYTES} MB")


def _running_worker() -> subprocess.Popen[bytes]:
    global _worker
    if _worker is not None and _worker.poll() is not None:
        _stop()
    if _worker is None:
        if not sys.executable:
            raise DSMoEError("it needs a subprocess, but sys.executable is empty")
        # -I ignores the environment and the current folder; a new session does not receive Ctrl-C.
        _worker = subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", _PROGRAM, str(jinja_sandbox.SECONDS), *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return _worker


def _stop() -> None:
    global _worker
    if _worker is None:
        return
    worker, _worker = _worker, None
    worker.kill()
    worker.wait()
    for pipe in filter(None, (worker.stdin, worker.stdout)):
        with contextlib.suppress(OSError):  # unsent data has no reader
            pipe.close()


def _after_fork() -> None:
    global _lock, _worker
    _lock = threading.Lock()
    if _worker is not None:
        _inherited.append(_worker)
        _worker = None


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
