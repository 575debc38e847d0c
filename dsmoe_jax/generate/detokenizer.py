"""Incremental detokenization up to the first stop string: `Detokenizer`."""

from collections.abc import Sequence

from dsmoe_jax.text.tokenizer import DecodeStream


class Detokenizer:
    """Decodes one output token by token and cuts it before the first stop string.

    Text is returned once it is final: never part of a character, nor what may still become part of a stop string.
    The concatenation of all pieces and the flush is the text of all tokens up to the first stop string, wherever the
    token boundaries are. Of overlapping stop strings the leftmost wins, so a complete one waits for one that started
    earlier; of two that start together, the shorter.

    Attributes:
        stop_string: The stop string that was found, or None. No text follows it.
    """

    def __init__(self, decoder: DecodeStream, stop: Sequence[str] = ()):
        self.stop_string: str | None = None
        self._decoder = decoder
        self._stop = tuple(stop)
        self._pending = ""

    def feed(self, token_id: int) -> str:
        """Return the text that `token_id` makes final, "" after a stop string; raises as `Tokenizer.decode`."""
        return "" if self.stop_string is not None else self._settle(self._decoder.feed(token_id), final=False)

    def flush(self) -> str:
        """Return the pending text after the last token; this may find a stop string, too."""
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
    """Return where the longest suffix of `text` starts that is a proper prefix of `stop`."""
    at = max(0, len(text) - len(stop) + 1)
    while not stop.startswith(text[at:]):  # always true of the empty suffix
        at += 1
    return at
