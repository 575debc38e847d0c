"""Render conversations by Jinja chat templates. Start at `render`.

Templates come from downloaded checkpoints: template_worker.py runs them in a sandbox with limits.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text import template_worker

ROLES: Final = ("system", "user", "assistant")

# DeepSeekMoE-16B-chat: the prefix and suffix of each role.
DEEPSEEK_TEMPLATE: Final = """\
{%- set frame = {
    'system':    ['',            '\n\n'],
    'user':      ['User: ',      '\n\n'],
    'assistant': ['Assistant: ', eos_token | default('')],
} -%}
{{ bos_token }}
{%- for message in messages if message['role'] in frame -%}
    {{ frame[message['role']][0] + message['content'] + frame[message['role']][1] }}
{%- endfor -%}
{{ 'Assistant:' if add_generation_prompt }}"""

_TEMPLATE_FILE: Final = "chat_template.jinja"
_ADDITIONAL_FOLDER: Final = "additional_chat_templates"  # holds NAME.jinja
_PROCESSOR_FILE: Final = "chat_template.json"  # of multimodal processors, written by older releases of transformers
_MAX_BYTES: Final = 1_000_000


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render messages as one text, with the variables of `Tokenizer.render_chat`; no message may be ignored."""
    messages = [_checked(index, message) for index, message in enumerate(messages)]
    variables = {"add_generation_prompt": False, "tools": None, "documents": None, **variables}
    for name in ("tools", "documents"):
        objects = () if variables[name] is None else variables[name]
        if not isinstance(objects, list | tuple) or not all(isinstance(entry, Mapping) for entry in objects):
            raise DSMoEError(f"{name} must be a list of JSON objects, got {objects!r:.80}")
    text = _render(template, messages, variables)
    for index, message in enumerate(messages):
        others, role = [*messages[:index], *messages[index + 1 :]], message["role"]
        if role not in ROLES and renders_same(partial(_render, template, others, variables), text):
            ignored = f"role {role!r:.80}, which the chat template ignores"
            raise DSMoEError(f"message {index} has {ignored}; allowed are {', '.join(ROLES)}")
    return text


def _render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    try:
        return template_worker.render(template, {**variables, "messages": messages})
    except DSMoEError as error:
        raise DSMoEError(f"the chat template failed: {error}") from None


def renders_same(render: Callable[[], str], text: str) -> bool:
    """Return whether `render` without some part of the input still returns `text`: the template ignores that part."""
    try:
        return render() == text
    except DSMoEError:
        return False


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a tokenizer by name, DeepSeek's as "default" if it has none."""
    return find_chat_templates(folder, config) or {"default": DEEPSEEK_TEMPLATE}


def find_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates in a tokenizer's files by name.

    chat_template.jinja overrides tokenizer_config.json (`config`), which overrides chat_template.json.
    """
    templates = _named(f"{folder}/tokenizer_config.json", config.get("chat_template"))
    if not templates and (folder / _PROCESSOR_FILE).is_file():
        fields = read_json(folder / _PROCESSOR_FILE)
        templates = _named(f"{folder}/{_PROCESSOR_FILE}", fields.get("chat_template"))
    templates |= {path.stem: _read(path) for path in sorted((folder / _ADDITIONAL_FOLDER).glob("*.jinja"))}
    if (folder / _TEMPLATE_FILE).is_file():
        templates["default"] = _read(folder / _TEMPLATE_FILE)
    return templates


def _named(where: str, value: Any) -> dict[str, str]:
    """Return templates by name from a string, a list of {"name": …, "template": …}, or an object."""
    if value is None:
        return {}
    templates = value
    if isinstance(value, str):
        templates = {"default": value}
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(templates, dict) or not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise DSMoEError(f"{where}: chat_template must be a string or a list of named templates")
    return templates


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise DSMoEError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_BYTES}")
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DSMoEError(f"{path} is not UTF-8 text: {error}") from None


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DSMoEError(f"message {index} must be a mapping with role and content, got {type(message).__name__}")
    if "role" not in message:
        raise DSMoEError(f"message {index} has no 'role'")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise DSMoEError(f"message {index}: role must be a string, got {type(role).__name__}")
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return dict(message)
    if "content" not in message:
        raise DSMoEError(f"message {index} has no 'content'")
    if isinstance(content, list):
        for number, part in enumerate(content):
            where = f"message {index}: part {number} of content"
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise DSMoEError(f"{where} has type {kind!r:.80}; only 'text' is supported")
            if not isinstance(part.get("text"), str):
                raise DSMoEError(f"{where} has no string as 'text'")
    elif not isinstance(content, str):
        raise DSMoEError(f"message {index}: content must be a string or a list, got {type(content).__name__}")
    return dict(message)
