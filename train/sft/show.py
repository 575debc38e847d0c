"""Examples as a person sees them: what is learned stands out from what is only read. Start at `show`."""

from itertools import groupby, islice
from typing import TYPE_CHECKING, Final

from dsmoe_jax.text.tokenizer import Tokenizer

from .store import Examples

if TYPE_CHECKING:
    from rich.console import Console

_LEARNED, _READ = "bold green", "dim"
_MARKS: Final = ("⟦", "⟧")  # around targets, where there are no colours
# Data must not move the cursor of a terminal: control characters are written as what they are.
_VISIBLE: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show(examples: Examples, tokenizer: Tokenizer, count: int, console: "Console | None" = None) -> None:
    """Print the first `count` examples, special tokens included, with how many tokens and targets each has.

    On a terminal targets are green and the rest is dim; elsewhere targets stand in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    marks = ("", "") if console.is_terminal and not console.no_color else _MARKS
    for number in islice(range(len(examples)), count):
        tokens, is_target = examples.read(number)
        head = f"example {number} of {len(examples)}: {len(tokens)} tokens, {is_target.sum()} targets"
        text = Text()
        for learned, run in groupby(zip(tokens.tolist(), is_target.tolist(), strict=True), key=lambda pair: pair[1]):
            piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False).translate(_VISIBLE)
            before, after = marks if learned else ("", "")
            text.append(f"{before}{piece}{after}", _LEARNED if learned else _READ)
        console.print(Text(head, "bold"), text, "", sep="\n", soft_wrap=True)
