"""`dsmoe generate` and `dsmoe chat`: input and output. Start at `generate` and `chat`."""

import contextlib
import errno
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.chat import Chat
from dsmoe_jax.generate.generator import Completion, Generator
from dsmoe_jax.generate.sampling_params import FIELD_NAMES, SamplingParams, suggest
from dsmoe_jax.progress import count, log_level
from dsmoe_jax.storage.atomic_dir import check_new_path, name_full_disk, staging_path
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import parse_json

Load = Callable[[], Generator]
Sampling = Mapping[str, Any]  # arguments of `SamplingParams`


def _quiet() -> AbstractContextManager[None]:  # log lines would interleave with the text
    return log_level("dsmoe_jax", logging.WARNING)


def generate(
    load: Load, sampling: Sampling, *, prompt: str | None = None, file: str | None = None, out: str | None = None
) -> None:
    """Stream `prompt` (default or "-": stdin) and its completion to stdout, or complete a JSONL file of prompts."""
    if prompt is not None and file is not None:
        raise DSMoEError("--prompt and --file are mutually exclusive")
    if file is not None:
        return _complete_file(load, sampling, user_path(file, "file"), out)
    if out is not None:
        raise DSMoEError("--out needs --file")
    params = SamplingParams.of(**sampling)
    if params.n != 1 or params.logprobs is not None:
        raise DSMoEError("--n and --logprobs need --file")
    prompt = _read_stdin() if prompt in (None, "-") else prompt
    if not prompt:
        raise DSMoEError("the prompt is empty")
    pieces = load().stream(prompt, params)
    with _quiet():
        for piece in itertools.chain([prompt], pieces):
            print(piece, end="", flush=True)
        print()


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise DSMoEError("no prompt: pass --prompt, --file or text on stdin")
    return _decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n").removesuffix("\r")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DSMoEError(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


class _Line(NamedTuple):
    """A line of the file: a prompt with its parameters, or an error."""

    number: int
    id: dict[str, Any]  # {"id": …}, or empty
    prompt: Any = None
    params: SamplingParams | None = None
    error: str | None = None


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


# fmt: off
_PROMPTS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "prompt":    ("a string",              lambda value: isinstance(value, str)),
    "token_ids": ("a list of token ids",   _is_list_of(int)),
    "messages":  ("a list of messages",    _is_list_of(dict)),
}
# fmt: on
_COMPLETION: Final = ("text", "token_ids", "finish_reason", "stop_reason")
_FIELDS: Final = ("id", *_PROMPTS, *FIELD_NAMES)


def _complete_file(load: Load, sampling: Sampling, file: Path, out: str | None) -> None:
    """Complete all prompts in one call of the generator; write an error for each invalid line."""
    SamplingParams.of(**sampling)
    lines = [
        _parse_line(number, line, sampling)
        for number, line in enumerate(_decode(file.read_bytes(), str(file)).split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DSMoEError(f"{file} has no prompts")
    valid = [(line.prompt, line.params) for line in lines if line.params is not None]
    failed: list[dict[str, Any]] = []
    with contextlib.nullcontext(sys.stdout.buffer) if out is None else _new_file(out) as written:
        began, completions = time.perf_counter(), []
        if valid:
            generator = load()
            began, total = time.perf_counter(), sum(params.n for _, params in valid)
            with count("completions", total) as advance, _quiet():
                prompts, params = zip(*valid, strict=True)
                completions = generator(prompts, params, errors="return", progress=advance)
        seconds = time.perf_counter() - began
        for record in _records(lines, completions):
            failed += [record] if "error" in record else []
            written.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        written.flush()
    complete = [one for one in completions if one.error is None]
    tokens = sum(len(one.token_ids) for one in complete)
    print(f"{len(complete)} completions, {_rate(tokens, seconds)}", file=sys.stderr)
    if failed:
        first = f"line {failed[0]['line']}: {failed[0]['error']}"
        raise DSMoEError(f"{len(failed)} of {len(lines)} prompts in {file} failed; first error, {first}")


def _parse_line(number: int, line: str, sampling: Sampling) -> _Line:
    line_id: dict[str, Any] = {}
    try:
        fields = parse_json(line.encode())
        if "id" in fields:
            line_id = {"id": fields.pop("id")}
        return _Line(number, line_id, *_parse_fields(fields, sampling))
    except DSMoEError as error:
        return _Line(number, line_id, error=str(error))


def _parse_fields(fields: dict[str, Any], sampling: Sampling) -> tuple[Any, SamplingParams]:
    """Return prompt and parameters of a line; its fields override `sampling`, and null means absent."""
    for name in fields:
        if name not in _FIELDS:
            raise DSMoEError(f"unknown field {name[:80]!r}; {suggest(name, _FIELDS)}")
    fields = {name: value for name, value in fields.items() if value is not None}
    present = [name for name in _PROMPTS if name in fields]
    if len(present) != 1:
        raise DSMoEError(f"needs one of {', '.join(_PROMPTS)}, got {' and '.join(present) or 'none'}")
    prompt, (kind, valid) = fields.pop(present[0]), _PROMPTS[present[0]]
    if not valid(prompt):
        raise DSMoEError(f"{present[0]} must be {kind}")
    if isinstance(biases := fields.get("logit_bias"), dict):  # JSON keys are strings
        fields["logit_bias"] = {_token_id(key): value for key, value in biases.items()}
    if "max_tokens" in fields:  # the alias overrides the flag, too
        sampling = {name: value for name, value in sampling.items() if name != "max_new_tokens"}
    return prompt, SamplingParams.of(**{**sampling, **fields})


def _token_id(key: str) -> int | str:
    """Convert a canonical integer literal; return anything else, like "05", unchanged."""
    return int(key) if key.isdecimal() and len(key) <= 10 and str(int(key)) == key else key


def _records(lines: Iterable[_Line], completions: Iterable[Completion]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects to write, in the order of the lines."""
    rest = iter(completions)
    for line in lines:
        first = None if line.params is None else next(rest)
        error = line.error if first is None else first.error
        if line.params is None or first is None or error is not None:
            yield {**line.id, "line": line.number, "error": error}
            continue
        for index, one in enumerate([first, *itertools.islice(rest, line.params.n - 1)]):
            record = {**line.id, **{name: getattr(one, name) for name in _COMPLETION}}
            if one.logprobs is not None:
                record["logprobs"] = [logprob._asdict() for logprob in one.logprobs]
            yield record | ({"index": index} if line.params.n > 1 else {})


@contextlib.contextmanager
def _new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Create a file atomically: renamed into place once fsynced. Raises `DSMoEError` if it exists."""
    path = check_new_path(path)
    staging = staging_path(path)
    if not path.parent.is_dir():  # `lock_name` would create it
        raise DSMoEError(f"{path} cannot be written: {os.strerror(errno.ENOENT)}")
    with lock_name(path), name_full_disk(path):
        check_new_path(path)  # another process may have created it before it released the lock
        try:
            file = staging.open("wb")  # overwrites the file of a killed process
        except OSError as error:
            raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_new_path(path)
            staging.rename(path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


def chat(load: Load, sampling: Sampling, *, system: str | None = None) -> None:
    """Chat until the input ends. Ctrl-C stops a reply; at the prompt it ends the chat."""
    SamplingParams.of(**sampling)
    conversation = Chat(load(), system=system, **sampling)
    print("/help lists the commands; /quit, Ctrl-D or Ctrl-C ends the chat.")
    with contextlib.suppress(EOFError), _quiet():
        while True:
            line = _read_line("User: ").strip()
            try:
                if line.startswith("/"):
                    _run_command(conversation, line)
                elif line:
                    _print_reply(conversation, line)
            except BrokenPipeError:
                raise
            except (DSMoEError, OSError) as error:  # e.g. too long: drop this turn
                print(f"dsmoe chat: {' '.join(str(error).split())}", file=sys.stderr)


def _read_line(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        print()
        raise


def _print_reply(conversation: Chat, text: str) -> None:
    began = time.perf_counter()
    with _ctrl_c() as pressed, contextlib.closing(conversation.send(text)) as pieces:  # type: ignore[type-var]
        print("Assistant: ", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            if pressed.is_set():
                break
        print()
    if sys.stderr.isatty():
        print(_rate(len(conversation.token_ids), time.perf_counter() - began), file=sys.stderr)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tok/s"


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets; only a second one interrupts, since an interrupted step loses the KV cache."""
    pressed = threading.Event()

    def press(*_: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _run_command(conversation: Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in _COMMANDS:
        raise DSMoEError(f"unknown command {name}; /help lists the commands")
    _COMMANDS[name][0](conversation, argument.strip())


def _save(conversation: Chat, file: str) -> None:
    if not file or "\0" in file:
        raise DSMoEError(f"/save needs the name of a new file, got {file!r}")
    messages = json.dumps(conversation.messages, ensure_ascii=False, indent=2)
    with _new_file(file) as written:
        written.write(messages.encode("utf-8", "backslashreplace") + b"\n")


def _help(_: Chat, __: str) -> None:
    for name, (_run, what) in _COMMANDS.items():
        print(f"  {name:7} {what}")


def _quit(_: Chat, __: str) -> None:
    raise EOFError


# fmt: off
_COMMANDS: Final[dict[str, tuple[Callable[[Chat, str], None], str]]] = {
    "/reset": (lambda chat, _: chat.reset(), "clear the conversation, except for the system message"),
    "/save":  (_save,  "FILE: save the conversation as a JSON list of messages"),
    "/help":  (_help,  "list the commands"),
    "/quit":  (_quit,  "end the chat"),
}
# fmt: on
