"""Check that a chat template ignores nothing: `check_template_coverage`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.chat_template import renders_same

_OTHER: Final = "a replacement that is in no record"
_SURE: Final = 16  # characters: a longer text is not in another by chance
_LINKS: Final = ("tool_call_id",)  # like the ids of tool_calls: templates often omit them

Messages = Sequence[Mapping[str, Any]]


def check_template_coverage(
    render: Callable[..., str], messages: Messages, variables: Mapping[str, Any], text: str
) -> None:
    """Refuse messages, fields and variables that can be changed without changing `text`, the rendered conversation."""
    for what, other_messages, other_variables in _changes(messages, variables, text):
        changed = partial(render, other_messages, add_generation_prompt=False, **other_variables)
        if renders_same(changed, text):
            raise DSMoEError(f"has {what}, which the chat template ignores")


def _changes(messages: Messages, variables: Mapping[str, Any], text: str) -> Iterator[tuple[str, Messages, Mapping]]:
    """Iterate over (name, messages, variables) with one changed field or variable each."""
    for name in variables:
        yield repr(name), messages, {key: value for key, value in variables.items() if key != name}
    for number, message in enumerate(messages):
        for what, changed in _changed(message, text):
            yield f"{what} in message {number}", [*messages[:number], changed, *messages[number + 1 :]], variables


def _changed(message: Mapping[str, Any], text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = message["content"]
    if content and content.strip():
        # Templates never omit user and assistant turns, whose texts are often short.
        sure = len(content.strip()) >= _SURE or message["role"] in ("user", "assistant")
        if not (sure and content.strip() in text):
            yield f"a text from {message['role']!r}", {**message, "content": _OTHER}
    for name, value in message.items():
        if name == "tool_calls" and isinstance(value, list):
            for at, call in enumerate(value):
                for changed in _changed_calls(call):
                    yield repr(name), {**message, name: [*value[:at], changed, *value[at + 1 :]]}
        elif name not in ("role", "content", *_LINKS):
            yield repr(name), {key: one for key, one in message.items() if key != name}


def _changed_calls(call: Any) -> Iterator[Any]:
    """Iterate over the tool call with another name, and with other arguments."""
    if not isinstance(call, Mapping):
        return
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return
    arguments = {"other": _OTHER} if isinstance(function.get("arguments"), Mapping) else f'{{"other": "{_OTHER}"}}'
    for changed in ({**function, "name": "other_function"}, {**function, "arguments": arguments}):
        yield {**call, "function": changed} if "function" in call else changed
