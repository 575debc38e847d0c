"""A conversation written out as the text the model was trained on, by a Jinja template.

Start at `render`. Templates come with a downloaded checkpoint, so they are run in Jinja's sandbox.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

ROLES: Final = ("system", "user", "assistant")

# DeepSeekMoE-16B-chat, a row a role: what stands before its text and what stands after it.
DEEPSEEK: Final = """\
{%- set frame = {
    'system':    ['',            '\n\n'],
    'user':      ['User: ',      '\n\n'],
    'assistant': ['Assistant: ', eos_token],
} -%}
{{ bos_token }}
{%- for message in messages -%}
    {{ frame[message['role']][0] + message['content'] + frame[message['role']][1] }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt }}"""

# Far above any context window. It stops a template that never stops writing; the sandbox limits only `range`.
_LONGEST: Final = 16_000_000


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Returns `messages` as one text; `variables` are bos_token, eos_token and add_generation_prompt.

    Raises ValueError naming the message that is malformed, or saying why the template failed.
    """
    messages = [_checked(index, message) for index, message in enumerate(messages)]
    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(messages=messages, **variables):
            length += len(piece)
            if length > _LONGEST:
                raise ValueError(f"it wrote more than {_LONGEST} characters")
            pieces.append(piece)
    except Exception as error:  # The template is a stranger's program: anything may come out of it.
        raise ValueError(f"the chat template failed: {' '.join(str(error).split())}") from error
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # trim_blocks and lstrip_blocks as transformers sets them: published templates count on both.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _tojson
    return environment.from_string(template)


def find_template(folder: Path, config: Mapping[str, Any]) -> str:
    """Returns the template of chat_template.jinja, else of tokenizer_config.json, else DeepSeek's own.

    Raises ValueError where there is one but it cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # Several templates, each {"name": …, "template": …}.
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", named)
    if template is None:
        return DEEPSEEK
    if not isinstance(template, str):
        raise ValueError(
            f"{folder}/tokenizer_config.json: chat_template is neither a string nor a list with a 'default'"
        )
    return template


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    # A template skips a role it does not know without a word, so a typo would lose the message.
    if not isinstance(message, Mapping):
        raise ValueError(f"message {index} must be a mapping with role and content, got {type(message).__name__}")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {index} has no {key!r}")
    if message["role"] not in ROLES:
        raise ValueError(f"message {index} has role {message['role']!r}; allowed are {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        raise ValueError(f"message {index}: content must be a string, got {type(message['content']).__name__}")
    return dict(message)


def _raise_exception(reason: str) -> NoReturn:
    raise ValueError(reason)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)
