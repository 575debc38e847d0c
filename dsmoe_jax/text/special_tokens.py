"""Keeps text of users from becoming control tokens: `Escape`.

A chat template writes control tokens and text of users into one string. So the text is marked before the template runs,
at every character that could begin or end the name of a control token; names that come out without a mark are the
template's, and are replaced by placeholders that a tokenizer knows instead of the names.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any


def make_placeholders(names: Iterable[str]) -> dict[str, str]:
    """Names for control tokens that are in no text, neither by accident nor on purpose: they are random."""
    secret = f"{secrets.randbelow(10**18):018}"
    return {name: f"\ue000{secret}{i:06}\ue001" for i, name in enumerate(names)}


def longest_first(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the names, of two that begin together the longer one."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)") + ")")


class Escape:
    """Marks text, and finds the control tokens that are not marked.

    Attributes:
        names: Finds the name of any control token.
    """

    def __init__(self, placeholders: Mapping[str, str]):
        """`placeholders` are by the names of the control tokens."""
        self.names = longest_first(placeholders)
        self._placeholders = placeholders
        # Digits alone: filters such as upper and tojson leave them as they are.
        self._mark = f"{secrets.randbelow(10**18):018}"
        self._first, self._last = ({name[at] for name in placeholders if name} for at in (0, -1))
        ends = "".join(map(re.escape, sorted(self._first | self._last)))
        self._ends = re.compile(f"[{ends}]" if ends else "(?!)")
        # A mark within a name breaks it. A name of one character has none within, but one on each side.
        one, more = ([name for name in placeholders if (len(name) == 1) is short] for short in (True, False))
        alone = f"(?<!{self._mark}){longest_first(one).pattern}(?!{self._mark})"
        self._unmarked = re.compile(f"{longest_first(more).pattern}|{alone}")

    def __call__(self, value: Any) -> Any:
        """Marks all strings in a JSON value; keys and roles, which a template compares, only where they hold a name."""
        match value:
            case str():
                return self._ends.sub(self._marked, value)
            case Mapping():
                return {self._key(key): self._key(x) if key == "role" else self(x) for key, x in value.items()}
            case list() | tuple():
                return [self(inner) for inner in value]
        return value

    def _key(self, key: Any) -> Any:
        return self(key) if isinstance(key, str) and self.names.search(key) else key

    def unescape(self, text: str) -> str:
        """Takes the marks away."""
        return text.replace(self._mark, "")

    def protect(self, text: str) -> str:
        """Replaces unmarked names by their placeholders and takes the marks away."""
        return self.unescape(self._unmarked.sub(lambda match: self._placeholders[match[0]], text))

    def _marked(self, match: re.Match[str]) -> str:
        end = match[0]
        return f"{self._mark if end in self._last else ''}{end}{self._mark if end in self._first else ''}"
