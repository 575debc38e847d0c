"""Invalid input: the exception `DSMoEError`, `check_choice`, `suggest` and `unknown_flag`."""

import difflib
from collections.abc import Iterable, Sequence


class DSMoEError(ValueError):
    """Invalid input of the user; the message is one line that names the argument, the value and what is allowed.

    The command line prints it and exits with code 2. Any other exception except `OSError` is a bug.
    """


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `DSMoEError` unless the value of `name` is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise DSMoEError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def suggest(name: str, names: Sequence[str]) -> str:
    """Return a hint for an unknown name: the most similar of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names)}"


def unknown_flag(flag: str, known: Iterable[str]) -> str:
    """Return the message for an unknown flag, with the most similar one that is known."""
    close = difflib.get_close_matches(flag, list(known), n=1)
    return f"unknown flag {flag}: did you mean {close[0]}?" if close else f"unknown flag {flag}"
