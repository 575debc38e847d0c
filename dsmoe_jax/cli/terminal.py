"""`dsmoe generate` and `dsmoe chat`: what they read and what they print. Start at `generate` and at `chat`.

Mistakes are a `ValueError`, where possible before the model is loaded. On stdout is what the model says, nothing else.
"""

import contextlib
import dataclasses
import difflib
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
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.chat import Chat
from dsmoe_jax.generate.generator import Completion, Generator
from dsmoe_jax.generate.sampling_params import SamplingParams
from dsmoe_jax.progress import count
from dsmoe_jax.storage.atomic_dir import check_new_path, name_full_disk, staging_path
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import parse_json

Load = Callable[[], Generator]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only warnings: what the engine notes of itself would stand in the middle of the text."""
    log = logging.getLogger("dsmoe_jax")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def generate(
    load: Load,
    sampling: Mapping[str, Any],
    *,
    prompt: str | None = None,
    file: str | None = None,
    out: str | None = None,
) -> None:
    """Continue `prompt` on stdout as it comes, or answer the prompts of `file`, in order, to `out` or stdout.

    Without either, or for "-", the prompt is what stdin has, but for a newline at its end.
    """
    if prompt is not None and file is not None:
        raise DSMoEError("--prompt and --file exclude each other")
    if file is not None:
        return _answer_file(load, sampling, user_path(file, "file"), out)
    if out is not None:
        raise DSMoEError("--out is for the answers to a --file")
    asked = SamplingParams.of(**sampling)
    if asked.n != 1 or asked.logprobs is not None:
        raise DSMoEError(
            "--n and --logprobs are for the answers to a --file: a --prompt is answered once, by text alone"
        )
    prompt = _from_stdin() if prompt in (None, "-") else prompt
    if not prompt:
        raise DSMoEError("the prompt is empty")
    pieces = load().stream(prompt, asked)
    with _quiet():
        for piece in itertools.chain([prompt], pieces):
            print(piece, end="", flush=True)
        print()


def _from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise DSMoEError("give a --prompt, a --file, or the prompt on stdin")
    return _text(sys.stdin.buffer.read(), "stdin").removesuffix("\n").removesuffix("\r")


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DSMoEError(f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


# --- a file of prompts ---


class _Line(NamedTuple):
    """A line of the file: a prompt and what is asked, or what is wrong with it."""

    number: int
    id: dict[str, Any]  # {"id": …}, or empty
    prompt: Any = None
    asked: SamplingParams | None = None
    error: str | None = None


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


# fmt: off
_PROMPTS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "prompt":   ("a text",                lambda value: isinstance(value, str)),
    "tokens":   ("a list of token ids",   _is_list_of(int)),
    "messages": ("a list of messages",    _is_list_of(dict)),
}
# fmt: on
_FIELDS: Final = ("id", *_PROMPTS, *(field.name for field in dataclasses.fields(SamplingParams)))


def _answer_file(load: Load, sampling: Mapping[str, Any], file: Path, out: str | None) -> None:
    """All prompts are one call of the generator; a line that is refused gets an answer that says why."""
    SamplingParams.of(**sampling)
    lines = [
        _line(number, line, sampling)
        for number, line in enumerate(_text(file.read_bytes(), str(file)).split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DSMoEError(f"{file} has no prompts")
    good = [(line.prompt, line.asked) for line in lines if line.asked is not None]
    failed: list[dict[str, Any]] = []
    with contextlib.nullcontext(sys.stdout.buffer) if out is None else _new_file(out) as written:
        began, completions = time.perf_counter(), []
        if good:
            generator = load()
            began, total = time.perf_counter(), sum(asked.n for _, asked in good)
            with count("answers", total) as advance, _quiet():
                prompts, params = zip(*good, strict=True)
                completions = generator(prompts, params, errors="return", progress=advance)
        seconds = time.perf_counter() - began
        for reply in _replies(lines, completions):
            failed += [reply] if "error" in reply else []
            written.write(json.dumps(reply, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        written.flush()
    answers = [one for one in completions if one.error is None]
    tokens = sum(len(one.tokens) for one in answers)
    print(f"{len(answers)} answers, {_rate(tokens, seconds)}", file=sys.stderr)
    if failed:
        reason = f"the first, line {failed[0]['line']}: {failed[0]['error']}"
        raise DSMoEError(f"{len(failed)} of the {len(lines)} prompts in {file} failed; {reason}")


def _line(number: int, line: str, sampling: Mapping[str, Any]) -> _Line:
    kept: dict[str, Any] = {}
    try:
        fields = parse_json(line.encode())
        if "id" in fields:
            kept = {"id": fields.pop("id")}
        return _Line(number, kept, *_request(fields, sampling))
    except ValueError as error:
        return _Line(number, kept, error=str(error))


def _request(fields: dict[str, Any], sampling: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
    """The prompt of a line and its parameters: `sampling`, and over them its own; a null field is an absent one."""
    for name in fields:
        if name not in _FIELDS:
            close = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(_FIELDS)}"
            raise DSMoEError(f"unknown field {name[:80]!r}; {hint}")
    fields = {name: value for name, value in fields.items() if value is not None}
    given = [name for name in _PROMPTS if name in fields]
    if len(given) != 1:
        raise DSMoEError(f"needs one of {', '.join(_PROMPTS)}, and has {' and '.join(given) or 'none'}")
    prompt, (kind, fits) = fields.pop(given[0]), _PROMPTS[given[0]]
    if not fits(prompt):
        raise DSMoEError(f"{given[0]} must be {kind}")
    if isinstance(biases := fields.get("logit_bias"), dict):  # JSON's keys are texts
        fields["logit_bias"] = {_token_id(key): value for key, value in biases.items()}
    return prompt, SamplingParams.of(**{**sampling, **fields})


def _token_id(key: str) -> int | str:
    """The number that is written so; anything else, "05" say, as it is, to be refused."""
    return int(key) if key.isdecimal() and str(int(key)) == key else key


def _replies(lines: Iterable[_Line], completions: Iterable[Completion]) -> Iterator[dict[str, Any]]:
    """What is written, in the order of the lines."""
    rest = iter(completions)
    for line in lines:
        first = None if line.asked is None else next(rest)
        error = line.error if first is None else first.error
        if line.asked is None or first is None or error is not None:
            yield {**line.id, "line": line.number, "error": error}
            continue
        for index, one in enumerate([first, *itertools.islice(rest, line.asked.n - 1)]):
            reply = {**line.id, "text": one.text, "tokens": one.tokens, "finish_reason": one.finish_reason}
            if one.logprobs is not None:
                reply["logprobs"] = [logprob._asdict() for logprob in one.logprobs]
            yield reply | ({"index": index} if line.asked.n > 1 else {})


@contextlib.contextmanager
def _new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that has its name only when all of it is on disk; `ValueError` if there is one of that name already."""
    path = check_new_path(path)
    draft = staging_path(path)
    if not path.parent.is_dir():  # a lock would make it
        raise DSMoEError(f"{path} cannot be written: {os.strerror(errno.ENOENT)}")
    with lock_name(path), name_full_disk(path):
        check_new_path(path)  # the one who had the lock may have made it
        try:
            file = draft.open("wb")  # what a killed one left is overwritten
        except OSError as error:
            raise DSMoEError(f"{path} cannot be written: {error.strerror}") from None
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_new_path(path)
            draft.rename(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


# --- a conversation ---


def chat(load: Load, sampling: Mapping[str, Any], *, system: str | None = None) -> None:
    """Ask, answer and keep the history until the input ends. Ctrl-C stops an answer, and at the prompt the chat."""
    SamplingParams.of(**sampling)
    talk = Chat(load(), system=system, **sampling)
    print("/help lists the commands; /quit, Ctrl-D or Ctrl-C ends the conversation.")
    with contextlib.suppress(EOFError), _quiet():
        while True:
            line = _ask("User: ").strip()
            try:
                if line.startswith("/"):
                    _command(talk, line)
                elif line:
                    _answer(talk, line)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:  # too long, say: the conversation goes on without this turn
                print(f"dsmoe chat: {' '.join(str(error).split())}", file=sys.stderr)


def _ask(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        print()
        raise


def _answer(talk: Chat, text: str) -> None:
    began = time.perf_counter()
    with _ctrl_c() as pressed, contextlib.closing(talk.send(text)) as pieces:  # type: ignore[type-var]
        print("Assistant: ", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            if pressed.is_set():
                break
        print()
    if sys.stderr.isatty():
        print(_rate(len(talk.tokens), time.perf_counter() - began), file=sys.stderr)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tok/s"


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set once Ctrl-C is pressed. It interrupts nothing, as a step cut in two loses the cache; a second one does."""
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


# --- its commands ---


def _command(talk: Chat, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name not in _COMMANDS:
        raise DSMoEError(f"there is no {name}; /help lists the commands")
    run, _ = _COMMANDS[name]
    run(talk, argument.strip())


def _reset(talk: Chat, _: str) -> None:
    talk.reset()


def _save(talk: Chat, file: str) -> None:
    if not file:
        raise DSMoEError("/save needs the name of a new file")
    with _new_file(Path(file).expanduser()) as written:
        written.write(
            json.dumps(talk.messages, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"
        )


def _help(_: Chat, __: str) -> None:
    for name, (_run, what) in _COMMANDS.items():
        print(f"  {name:7} {what}")


def _quit(_: Chat, __: str) -> None:
    raise EOFError


# fmt: off
_COMMANDS: Final[dict[str, tuple[Callable[[Chat, str], None], str]]] = {
    "/reset": (_reset, "forgets the conversation, but not the system's message"),
    "/save":  (_save,  "FILE: writes the conversation as a JSON list of messages"),
    "/help":  (_help,  "lists the commands"),
    "/quit":  (_quit,  "ends the conversation"),
}
# fmt: on
