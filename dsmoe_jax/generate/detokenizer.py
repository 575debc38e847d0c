"""Incremental detokenization up to the first stop string: `Detokenizer`."""

from collections.abc import Sequence

from dsmoe_jax.text.tokenizer import DecodeStream


class Detokenizer:
    """Decodes one output token by token up to the first stop string (`stop_string`, None if none was found).

    Text is returned once it is final: no partial characters, and nothing that may still become part of a stop string.
    Token boundaries do not matter. Of overlapping stop strings the leftmost wins, then the shorter one.
    """

    def __init__(self, decoder: DecodeStream, stop: Sequence[str] = ()):
        self.stop_string: str | None = None
        self._decoder, self._stop, self._pending = decoder, tuple(stop), ""

    def feed(self, token_id: int) -> str:
        """Return the text that `token_id` completes, "" after a stop string."""
        return "" if self.stop_string is not None else self._settle(self._decoder.feed(token_id), final=False)

    def flush(self) -> str:
        """Return the pending text after the last token; this may find a stop string."""
        return "" if self.stop_string is not None else self._settle(self._decoder.flush(), final=True)

    def _settle(self, piece: str, *, final: bool) -> str:
        text = self._pending + piece
        found = [(at, len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        complete, _, stop_string = min(found, default=(len(text), 0, None))
        partial = min((_partial_start(text, stop) for stop in self._stop if not final), default=len(text))
        if stop_string is not None and complete <= partial:
            self.stop_string = stop_string
        end = min(complete, partial)
        self._pending = text[end:] if self.stop_string is None else ""
        return text[:end]


def _partial_start(text: str, stop: str) -> int:
    """Return the start of the longest suffix of `text` that is a proper prefix of `stop`."""
    at = max(0, len(text) - len(stop) + 1)
    while not stop.startswith(text[at:]):  # always true of the empty suffix
        at += 1
    return at
