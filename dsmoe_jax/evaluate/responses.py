"""Responses of a model, kept by request: `Responses` in memory, `open_responses` for a file that outlives the process.

The file has one line per response, appended as soon as it is computed, so that a killed evaluation resumes. Its first
line identifies what was evaluated. All processes of a cluster hold the same responses; process 0 writes.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import plural
from dsmoe_jax.storage.json_lines import JsonLinesFile
from dsmoe_jax.storage.locks import lock_name

RESPONSES: Final = "responses.jsonl"
HASHES: Final = "hashes.json"  # of the files of the model; written before the responses
_FORMAT: Final = 1
_log = logging.getLogger("dsmoe_jax")


class Response(NamedTuple):
    """What the model returned for a request.

    Attributes:
        value: `[logprob, greedy]`, the log-likelihood of a text, or generated text.
        truncated: Whether the context was truncated to the window.
    """

    value: Any
    truncated: bool = False

    def answers(self, kind: str) -> bool:
        """Return whether the value is one of a request of this type."""
        return _VALID[kind](self.value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_VALID: Final[Mapping[str, Callable[[Any], bool]]] = {  # by request type
    "loglikelihood": lambda v: isinstance(v, list) and len(v) == 2 and _is_number(v[0]) and type(v[1]) is bool,
    "loglikelihood_rolling": _is_number,
    "generate_until": lambda v: isinstance(v, str),
}


class Responses:
    """Responses by the key of their request."""

    def __init__(self, known: Mapping[str, Response] | None = None, file: JsonLinesFile | None = None):
        self._known, self._file = dict(known or {}), file

    def has(self, key: str, kind: str) -> bool:
        """Return whether a request of this type has been answered."""
        return key in self._known and self._known[key].answers(kind)

    def __getitem__(self, key: str) -> Response:
        """Return a response."""
        return self._known[key]

    def __len__(self) -> int:
        """Number of responses."""
        return len(self._known)

    def add(self, key: str, response: Response) -> None:
        """Keep a response; on process 0 append it to the file."""
        self._known[key] = response
        if self._file is not None:
            self._file.append({"key": key, **response._asdict()})


@contextlib.contextmanager
def open_responses(folder: Path, identity: Mapping[str, Any]) -> Iterator[Responses]:
    """Yield the responses kept in a folder, which `lock_output` has locked; collective.

    Args:
        folder: Output of the evaluation, created if needed; process 0 alone needs it.
        identity: What was evaluated: JSON, by name. Process 0 alone needs it.

    Yields:
        The responses.

    Raises:
        DSMoEError: The folder belongs to something else, or to an evaluation with another identity.
    """
    with contextlib.ExitStack() as stack:
        content, file = b"", None
        with collective_errors():
            if jax.process_index() == 0:
                file, content = _open(folder, identity)
                stack.callback(file.close)
        known = _parse(_broadcast(content))
        if known:
            _log.info("Resuming with %s: %s", plural(len(known), "response"), folder / RESPONSES)
        responses = Responses(known, file)
        try:
            yield responses
        except BaseException:
            if len(responses) and jax.process_index() == 0:
                kept = plural(len(responses), "response")
                _log.info("Keeping %s in %s; run the same command to resume", kept, folder / RESPONSES)
            raise


@contextlib.contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Lock the output of an evaluation on process 0; collective.

    Raises:
        DSMoEError: It is in use, or exists and is something else.
    """
    with contextlib.ExitStack() as stack:
        with collective_errors():
            if jax.process_index() == 0:
                _check_output(folder)
                stack.enter_context(lock_name(folder))
        yield


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DSMoEError(f"out must be a folder, got the file {folder}")
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {HASHES} and not (folder / RESPONSES).is_file():
        raise DSMoEError(f"{folder} is not empty and has no {RESPONSES}: choose another --out")


def _open(folder: Path, identity: Mapping[str, Any]) -> tuple[JsonLinesFile, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESPONSES
    file = JsonLinesFile(path)
    try:
        if file.is_new:
            file.append({"format": _FORMAT, "identity": identity})
        content = path.read_bytes()
        _check_identity(path, content, identity)
    except BaseException:
        file.close()
        raise
    return file, content


def _check_identity(path: Path, content: bytes, identity: Mapping[str, Any]) -> None:
    try:
        head = json.loads(content.split(b"\n", 1)[0])
        found = head["identity"] if head["format"] == _FORMAT else None
    except (ValueError, LookupError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise DSMoEError(f"{path} is not a file of responses in format {_FORMAT}: choose another --out")
    for name in {**found, **identity}:
        if found.get(name) != identity.get(name):
            was, now = (_shown(name, fields.get(name)) for fields in (found, identity))
            raise DSMoEError(f"{path.parent} has the scores of another {name} ({was}, now {now}): choose another --out")


def _shown(name: str, value: Any) -> str:
    return "as stored" if name == "dtype" and value is None else f"{value!s:.40}"


def _parse(content: bytes) -> dict[str, Response]:
    known = {}
    for number, line in enumerate(content.splitlines()[1:], 2):
        try:
            entry = json.loads(line)
            response = Response(entry["value"], entry["truncated"])
            if (
                not any(is_valid(response.value) for is_valid in _VALID.values())
                or type(response.truncated) is not bool
            ):
                raise ValueError
            known[str(entry["key"])] = response
        except (ValueError, LookupError, TypeError):
            _log.warning("Skipping damaged line %d of %s", number, RESPONSES)
    return known


def _broadcast(content: bytes) -> bytes:
    """Return the bytes of process 0 on all processes."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(padded).tobytes()
