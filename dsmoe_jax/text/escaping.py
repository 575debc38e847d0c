"""Keep special-token strings in user text from becoming special tokens. Start at `SpecialTokenEscaper`.

A chat template mixes special tokens with user text. So user text is marked before rendering, at every character that
can begin or end a special token; unmarked special tokens in the output come from the template and become placeholders.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any


def make_placeholders(tokens: Iterable[str]) -> dict[str, str]:
    """Return a random placeholder for each special token, so that no text contains one."""
    secret = f"{secrets.randbelow(10**18):018}"
    return {token: f"\ue000{secret}{i:06}\ue001" for i, token in enumerate(tokens)}


def longest_match(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest first."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")


class SpecialTokenEscaper:
    """Marks text and replaces unmarked special tokens by their placeholders."""

    def __init__(self, placeholders: Mapping[str, str]):
        self.pattern = longest_match(placeholders)
        self._placeholders = placeholders
        # Digits only: filters such as upper and tojson do not change them.
        self._mark = f"{secrets.randbelow(10**18):018}"
        self._first, self._last = ({token[at] for token in placeholders if token} for at in (0, -1))
        ends = "".join(map(re.escape, sorted(self._first | self._last)))
        self._ends = re.compile(f"[{ends}]" if ends else "(?!)")
        # A mark inside a token breaks the match. A token of one character has its marks on both sides instead.
        single, longer = ([token for token in placeholders if (len(token) == 1) is short] for short in (True, False))
        unmarked_single = f"(?<!{self._mark}){longest_match(single).pattern}(?!{self._mark})"
        self._unmarked = re.compile(f"{longest_match(longer).pattern}|{unmarked_single}")

    def __call__(self, value: Any) -> Any:
        """Mark all strings of a JSON value; keys and roles, which templates compare, only if they contain a token."""
        match value:
            case str():
                return self._ends.sub(self._add_mark, value)
            case Mapping():
                return {self._key(key): self._key(x) if key == "role" else self(x) for key, x in value.items()}
            case list() | tuple():
                return [self(item) for item in value]
        return value

    def _key(self, key: Any) -> Any:
        return self(key) if isinstance(key, str) and self.pattern.search(key) else key

    def unescape(self, text: str) -> str:
        """Remove the marks."""
        return text.replace(self._mark, "")

    def protect(self, text: str) -> str:
        """Replace unmarked special tokens by their placeholders and remove the marks."""
        return self.unescape(self._unmarked.sub(lambda match: self._placeholders[match[0]], text))

    def _add_mark(self, match: re.Match[str]) -> str:
        end = match[0]
        return f"{self._mark if end in self._last else ''}{end}{self._mark if end in self._first else ''}"
