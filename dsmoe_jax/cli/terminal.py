"""`dsmoe generate` and `dsmoe chat`: input and output. Start at `generate` and `chat`."""

import contextlib
import itertools
import json
import logging
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError, suggest
from dsmoe_jax.generate.chat import Chat
from dsmoe_jax.generate.generator import Generator
from dsmoe_jax.generate.request import Completion
from dsmoe_jax.generate.sampling_params import FIELD_NAMES, SamplingParams, merge_fields
from dsmoe_jax.progress import count, log_level, plural
from dsmoe_jax.storage.atomic_file import atomic_file
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import parse_json, read_json
from dsmoe_jax.text.chat_template import find_chat_templates
from dsmoe_jax.text.tokenizer import Tokenizer

Load = Callable[[], Generator]
Sampling = Mapping[str, Any]  # arguments of `SamplingParams`
_SAMPLED_ONLY: Final = ("top_k", "top_p", "min_p", "seed")  # flags without effect at temperature 0
_log = logging.getLogger("dsmoe_jax")


def _quiet() -> AbstractContextManager[None]:  # log lines would interleave with the text
    return log_level("dsmoe_jax", logging.WARNING)


def generate(
    load: Load,
    sampling: Sampling,
    *,
    prompt: str | None = None,
    tokens: str | None = None,
    file: str | None = None,
    out: str | None = None,
    chat: bool = False,
) -> None:
    """Stream a prompt (default or "-": stdin) and its completion to stdout, or complete a JSONL file (or stdin).

    With `chat` the prompt is a user message and only the reply is printed, with `tokens` (ids) only the completion.
    """
    passed = [
        name for name, value in (("--prompt", prompt), ("--tokens", tokens), ("--file", file)) if value is not None
    ]
    if len(passed) > 1:
        raise DSMoEError(f"{' and '.join(passed)} are mutually exclusive")
    if chat and (file or tokens):
        raise DSMoEError(f"--chat needs a prompt of text, got {passed[0]}")
    if file is not None:
        return _complete_file(load, sampling, file, out)
    if out is not None:
        raise DSMoEError("--out needs --file")
    params = SamplingParams(**sampling)
    if params.n != 1 or params.logprobs is not None:
        raise DSMoEError("--n and --logprobs need --file")
    _warn_without_effect(sampling, [params])
    if tokens is not None:
        return _complete_ids(load, _parse_ids(tokens), params)
    prompt = _read_stdin() if prompt in (None, "-") else prompt
    if not prompt:
        raise DSMoEError("the prompt is empty")
    generator = load()
    if generator.tokenizer is None:
        raise DSMoEError("a text prompt needs a tokenizer, and this model has none: pass --tokens")
    if chat:
        return _print_pieces(generator.stream([{"role": "user", "content": prompt}], params))
    _print_pieces(itertools.chain([prompt], generator.stream(prompt, params)))


def example_command(checkpoint: str) -> str:
    """Return a command that works for a native checkpoint: a chat, a text prompt, or ids without a tokenizer."""
    name, folder = shlex.quote(checkpoint), Path(checkpoint)
    try:
        Tokenizer.from_pretrained(folder, verify=False)
    except DSMoEError:  # none, or one that generation would refuse
        return f"dsmoe generate {name} --tokens {ModelConfig.from_file(folder).bos_token_id or 0}"
    settings = folder / "tokenizer_config.json"
    templates = find_chat_templates(folder, read_json(settings) if settings.is_file() else {})
    return f"dsmoe chat {name}" if "default" in templates else f"dsmoe generate {name} --prompt Hello"


def _warn_without_effect(sampling: Sampling, used: Iterable[SamplingParams]) -> None:
    """Warn about sampling flags that greedy decoding ignores."""
    flags = [f"--{name.replace('_', '-')}" for name in _SAMPLED_ONLY if name in sampling]
    if flags and not any(params.temperature for params in used):
        verb = "has" if len(flags) == 1 else "have"
        _log.warning("%s %s no effect at temperature 0, greedy decoding", ", ".join(flags), verb)


def _parse_ids(tokens: str) -> list[int]:
    """Parse ids separated by spaces or commas."""
    words = tokens.replace(",", " ").split()
    if bad := next((word for word in words if not word.isdecimal()), None):
        raise DSMoEError(f"--tokens must be token ids, separated by spaces or commas, got {bad[:80]!r}")
    if not words:
        raise DSMoEError("the prompt is empty")
    return [int(word) for word in words]


def _complete_ids(load: Load, token_ids: list[int], params: SamplingParams) -> None:
    """Print the completion of token ids, as text if there is a tokenizer, else as ids."""
    generator = load()
    if generator.tokenizer is not None:
        return _print_pieces(generator.stream(token_ids, params))
    with _quiet():
        print(*generator(token_ids, params).token_ids)


def _print_pieces(pieces: Iterable[str]) -> None:
    with _quiet():
        for piece in pieces:
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


def _read_file(file: str) -> str:
    """Return the text of `--file`; "-" is stdin."""
    if file == "-":
        return _decode(sys.stdin.buffer.read(), "stdin")
    path = user_path(file, "--file")
    if not path.exists():
        raise DSMoEError(f"--file {path} does not exist")
    return _decode(path.read_bytes(), str(path))


def _complete_file(load: Load, sampling: Sampling, file: str, out: str | None) -> None:
    """Complete all prompts in one call of the generator; write an error for each invalid line."""
    SamplingParams(**sampling)
    lines = [
        _parse_line(number, line, sampling)
        for number, line in enumerate(_read_file(file).split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise DSMoEError(f"{file} has no prompts")
    valid = [(line.prompt, line.params) for line in lines if line.params is not None]
    _warn_without_effect(sampling, [params for _, params in valid])
    failed: list[dict[str, Any]] = []
    with contextlib.nullcontext(sys.stdout.buffer) if out is None else _new_file(out) as written:
        began, completions = time.perf_counter(), []
        if valid:
            generator = load()
            began = time.perf_counter()
            with _quiet():
                prompts, params = zip(*valid, strict=True)
                completions = generator(prompts, params, errors="return", progress=count)
        seconds = time.perf_counter() - began
        for record in _records(lines, completions):
            failed += [record] if "error" in record else []
            written.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        written.flush()
    complete = [one for entry in completions for one in _as_list(entry) if one.error is None]
    tokens = sum(len(one.token_ids) for one in complete)
    print(f"{plural(len(complete), 'completion')}, {_rate(tokens, seconds)}", file=sys.stderr)
    if failed:
        first = f"line {failed[0]['line']}: {failed[0]['error']}"
        total = plural(len(lines), "prompt")
        raise DSMoEError(f"{len(failed)} of {total} in {file} failed; first error, {first}")


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
    return prompt, SamplingParams(**merge_fields(sampling, fields))


def _token_id(key: str) -> int | str:
    """Convert a canonical integer literal; return anything else, like "05", unchanged."""
    return int(key) if key.isdecimal() and len(key) <= 10 and str(int(key)) == key else key


def _records(lines: Iterable[_Line], completions: Iterable[Completion | list[Completion]]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects to write, in the order of the lines."""
    rest = iter(completions)
    for line in lines:
        outputs = [] if line.params is None else _as_list(next(rest))
        error = line.error if line.params is None else outputs[0].error
        if error is not None:
            yield {**line.id, "line": line.number, "error": error}
            continue
        for index, one in enumerate(outputs):
            record = {**line.id, **{name: getattr(one, name) for name in _COMPLETION}}
            if one.logprobs is not None:
                record["logprobs"] = [logprob._asdict() for logprob in one.logprobs]
            yield record | ({"index": index} if line.params.n > 1 else {})  # type: ignore[union-attr]


def _as_list(entry: Completion | list[Completion]) -> list[Completion]:
    """Return the completions of a prompt."""
    return entry if isinstance(entry, list) else [entry]


@contextlib.contextmanager
def _new_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file; see `atomic_file`."""
    with atomic_file(path) as staging, staging.open("wb") as file:
        yield file


def chat(load: Load, sampling: Sampling, *, system: str | None = None) -> None:
    """Chat until the input ends. Ctrl-C stops a reply; at the prompt it ends the chat."""
    SamplingParams(**sampling)
    conversation = Chat(load(), system=system, **sampling)
    _warn_without_effect(sampling, [SamplingParams(**conversation.params)])
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
    return f"{plural(tokens, 'token')}, {tokens / max(seconds, 1e-9):.1f} tok/s"


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
    print(f"Saved {file}")


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
