"""Whether a chat template writes all that a line says. Start at `check_all_read`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError

_OTHER: Final = "something else that no text holds"
_SURE: Final = 16  # characters: a text as long is not in another by chance
_LINKS: Final = ("tool_call_id",)  # beside the ids of tool_calls: they say which result is whose, and many leave it out

Messages = Sequence[Mapping[str, Any]]


def check_all_read(render: Callable[..., str], messages: Messages, variables: Mapping[str, Any], text: str) -> None:
    """`ValueError` for a message, a field of one, or a variable that the template ignores.

    A template skips what it does not know without a word. `text` is what `render` makes of `messages`; where it may
    lack something, that is changed and written again: a template that reads it writes another text, or fails.
    """
    for what, other_messages, other_variables in _changes(messages, variables, text):
        try:
            ignored = render(other_messages, add_generation_prompt=False, **other_variables) == text
        except ValueError:
            ignored = False
        if ignored:
            raise DSMoEError(f"has {what}, which the chat template ignores")


def _changes(messages: Messages, variables: Mapping[str, Any], text: str) -> Iterator[tuple[str, Messages, Mapping]]:
    """What may be ignored, and messages and variables that differ in it."""
    for name in variables:
        yield repr(name), messages, {key: value for key, value in variables.items() if key != name}
    for number, message in enumerate(messages):
        for what, changed in _changed(message, text):
            yield f"{what} in message {number}", [*messages[:number], changed, *messages[number + 1 :]], variables


def _changed(message: Mapping[str, Any], text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = message["content"]
    if content and content.strip():
        # Nobody's template leaves out the user or the assistant; what they say is often short.
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
    """A call of a function with another name, and with other arguments."""
    if not isinstance(call, Mapping):
        return
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return
    arguments = {"other": _OTHER} if isinstance(function.get("arguments"), Mapping) else f'{{"other": "{_OTHER}"}}'
    for changed in ({**function, "name": "other_function"}, {**function, "arguments": arguments}):
        yield {**call, "function": changed} if "function" in call else changed
