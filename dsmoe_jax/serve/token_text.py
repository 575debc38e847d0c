"""`TokenTexts`: what single tokens look like in log-probabilities."""

import functools
import math
from collections.abc import Mapping
from typing import Any, Final

from dsmoe_jax.text.tokenizer import Tokenizer

_INCOMPLETE: Final = "\ufffd"  # a part of a character
_LOWEST: Final = -9999.0  # instead of minus infinity, which JSON lacks


class TokenTexts:
    """Texts of tokens by id; without a tokenizer their ids."""

    def __init__(self, tokenizer: Tokenizer | None):
        """Create the texts of a tokenizer."""
        self._tokenizer = tokenizer
        # Tokens are decoded after another one: sentencepiece drops the leading space of a text.
        self._before = [] if tokenizer is None else tokenizer.encode("a", add_special_tokens=False)
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)
        self.visible = functools.lru_cache(maxsize=1 << 16)(self._visible)

    def _of(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else self._decode(token, skip=False)

    def _visible(self, token: int) -> str:
        """Return the text of a token in an output, where special tokens are left out."""
        return "" if self._tokenizer is None else self._decode(token, skip=True)

    def _decode(self, token: int, *, skip: bool) -> str:
        assert self._tokenizer is not None
        before, both = (
            self._tokenizer.decode(ids, skip_special_tokens=skip) for ids in (self._before, [*self._before, token])
        )
        return both.removeprefix(before)

    def utf8(self, token: int) -> list[int] | None:
        """Return the bytes of a token's text; None for a part of a character, whose bytes are unknown."""
        text = self.of(token)
        return None if _INCOMPLETE in text else [*text.encode()]

    def by_text(self, top: Mapping[int, float], count: int, token: int, logprob: float) -> dict[str, float]:
        """Return the `count` most likely tokens by text, and the token itself; of equal texts the most likely."""
        found: dict[str, float] = {}
        for other, value in [*[*top.items()][:count], (token, logprob)]:
            found.setdefault(self.of(other), finite(value))
        return found

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return a token with its log-probability, as in chats."""
        return {"token": self.of(token), "logprob": finite(logprob), "bytes": self.utf8(token)}


def finite(value: float) -> float:
    """Return a number that JSON has."""
    return value if math.isfinite(value) else _LOWEST
