"""Invalid input: the exception `DSMoEError`, and messages with suggestions."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

_SIMILAR: Final = 0.8  # above that of short names such as int4 and int8


class DSMoEError(ValueError):
    """Invalid input of the user; the message is one line that names the argument, the value and what is allowed.

    The command line prints it and exits with code 2. Any other exception except `OSError` is a bug.
    """


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `DSMoEError` unless the value of `name` is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise DSMoEError(f"{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}")


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Return the end of a message, `: did you mean X?` with the choice most similar to the value, or nothing."""
    close = closest(value, choices, _SIMILAR) if isinstance(value, str) else None
    return f": did you mean {close}?" if close else ""


def suggest(name: str, names: Sequence[str]) -> str:
    """Return a hint for an unknown name: the most similar of `names`, or all of them."""
    close = closest(name, names)
    return f"did you mean {close!r}?" if close else f"allowed: {', '.join(names)}"


def unknown_flag(flag: str, known: Iterable[str]) -> str:
    """Return the message for an unknown flag, with the most similar one that is known."""
    close = closest(flag, known)
    return f"unknown flag {flag}: did you mean {close}?" if close else f"unknown flag {flag}"


def closest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar of `names`, None if none is at least as similar as `cutoff`."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)
