"""A conversation written out as the text the model was trained on, by a Jinja template.

Start at `render`. Templates come with a downloaded checkpoint: template_worker.py runs them in a sandbox with limits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text import template_worker

ROLES: Final = ("system", "user", "assistant")

# DeepSeekMoE-16B-chat, a row a role: what stands before its text and what stands after it.
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

_FILE: Final = "chat_template.jinja"
_MORE: Final = "additional_chat_templates"  # a folder: NAME.jinja
_PROCESSOR: Final = "chat_template.json"  # that of a multimodal model, which older releases wrote
_MAX_BYTES: Final = 1_000_000


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Writes messages as one text.

    Args:
        template: The Jinja source. It sees what transformers offers.
        messages: {"role": …, "content": …} and other fields. Content is text, a list of text parts (joined for a
            template that does not read parts), or None beside tool calls.
        add_generation_prompt: Whether the assistant's next turn is opened.
        tools: JSON schemas of functions.
        documents: Documents to answer from.
        variables: What else the template sees, bos_token and eos_token above all.

    Raises:
        ValueError: Naming the message that is malformed or that the template ignores, or why the template failed.
    """
    messages = [_checked(index, message) for index, message in enumerate(messages)]
    for name, value in (("tools", tools), ("documents", documents)):
        if value is not None and not (
            isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)
        ):
            raise DSMoEError(f"{name} must be a list of JSON objects, got {value!r:.80}")
    given = {"add_generation_prompt": add_generation_prompt, "tools": tools, "documents": documents, **variables}
    text = _render(template, messages, given)
    for index, message in enumerate(messages):
        if message["role"] not in ROLES and _ignores(template, messages, given, index, text):
            raise DSMoEError(
                f"message {index} has role {message['role']!r:.80}, which the chat template ignores; "
                f"allowed are {', '.join(ROLES)}"
            )
    return text


def _render(template: str, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> str:
    try:
        return template_worker.render(template, {**given, "messages": messages})
    except ValueError as error:
        raise DSMoEError(f"the chat template failed: {error}") from None


def _ignores(
    template: str, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any], index: int, text: str
) -> bool:
    """Whether a template writes the same without a message, as templates do with a role that they do not know."""
    try:
        return _render(template, [*messages[:index], *messages[index + 1 :]], given) == text
    except ValueError:
        return False


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Finds the chat templates of a folder.

    Args:
        folder: That of a tokenizer.
        config: What its tokenizer_config.json says.

    Returns:
        The templates by name, "default" being that of chat_template.jinja, else of tokenizer_config.json, else of
        chat_template.json; and DeepSeek's own where there is no template at all.

    Raises:
        ValueError: If there is one but it cannot be read.
    """
    templates = _named(f"{folder}/tokenizer_config.json", config.get("chat_template"))
    if not templates and (folder / _PROCESSOR).is_file():
        templates = _named(f"{folder}/{_PROCESSOR}", read_json(folder / _PROCESSOR).get("chat_template"))
    templates |= {path.stem: _read(path) for path in sorted((folder / _MORE).glob("*.jinja"))}
    if (folder / _FILE).is_file():
        templates["default"] = _read(folder / _FILE)
    return templates or {"default": DEEPSEEK_TEMPLATE}


def _named(where: str, value: Any) -> dict[str, str]:
    """Templates by name from one template, a list of {"name": …, "template": …}, or an object."""
    if value is None:
        return {}
    templates = value
    if isinstance(value, str):
        templates = {"default": value}
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(templates, dict) or not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise DSMoEError(f"{where}: chat_template is neither a string nor a list of named templates")
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
            _check_part(f"message {index}: part {number} of content", part)
    elif not isinstance(content, str):
        raise DSMoEError(f"message {index}: content must be a string or a list, got {type(content).__name__}")
    return dict(message)


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise DSMoEError(f"{where} has type {kind!r:.80}; only 'text' is supported")
    if not isinstance(part.get("text"), str):
        raise DSMoEError(f"{where} has no string as 'text'")
