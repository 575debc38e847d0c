"""The text of an answer as its tokens come, up to the first stop string: `TextStream`."""

from collections.abc import Sequence

from dsmoe_jax.text.tokenizer import DecodeStream


class TextStream:
    """Gives text only when it is final: no half character, and nothing that may yet be part of a stop string.

    All pieces and the flush together are the text of all tokens, cut where the first stop string begins, however the
    tokens part it. Of stop strings that overlap, the one that begins first cuts: one that is complete waits for one
    that began before it and may still become complete. For one answer only.
    """

    def __init__(self, decoder: DecodeStream, stops: Sequence[str] = ()):
        self.stopped = False  # A stop string was found: no more text will come.
        self._decoder = decoder
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, token_id: int) -> str:
        """Returns the text that `token_id` settles, "" once stopped; raises as `Tokenizer.decode`."""
        return "" if self.stopped else self._settle(self._decoder.feed(token_id), open_end=True)

    def flush(self) -> str:
        """Returns what was held back, now that no token will follow; this may find a stop string, too."""
        return "" if self.stopped else self._settle(self._decoder.flush(), open_end=False)

    def _settle(self, piece: str, *, open_end: bool) -> str:
        held = self._held + piece
        complete = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=len(held))
        begun = min((_beginning(held, stop) for stop in self._stops if open_end), default=len(held))
        final = min(complete, begun)
        self.stopped = complete < len(held) and complete <= begun
        self._held = "" if self.stopped else held[final:]
        return held[:final]


def _beginning(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that `stop` begins with, without being all of it."""
    at = max(0, len(text) - len(stop) + 1)
    while not stop.startswith(text[at:]):  # the empty end always is
        at += 1
    return at
