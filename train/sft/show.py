"""Preview of examples with their loss tokens highlighted: `show`."""

from itertools import groupby, islice
from typing import TYPE_CHECKING, Final

from dsmoe_jax.text.tokenizer import Tokenizer

from .examples import Examples

if TYPE_CHECKING:
    from rich.console import Console

_LOSS, _NO_LOSS = "bold green", "dim"
_MARKS: Final = ("⟦", "⟧")  # around loss tokens, without colors
# Control characters are escaped, so that data cannot control the terminal.
_VISIBLE: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show(examples: Examples, tokenizer: Tokenizer, count: int, console: "Console | None" = None) -> None:
    """Print the first examples with their loss tokens highlighted.

    Args:
        examples: The examples.
        tokenizer: Their tokenizer.
        count: How many to print.
        console: A rich console; stdout by default. A color terminal shows loss tokens in green, others in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    marks = ("", "") if console.is_terminal and not console.no_color else _MARKS
    for number in islice(range(len(examples)), count):
        tokens, loss_mask = examples.example(number)
        head = f"example {number} of {len(examples)}: {len(tokens)} tokens, {loss_mask.sum()} with loss"
        text = Text()
        for has_loss, run in groupby(zip(tokens.tolist(), loss_mask.tolist(), strict=True), key=lambda pair: pair[1]):
            piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False).translate(_VISIBLE)
            before, after = marks if has_loss else ("", "")
            text.append(f"{before}{piece}{after}", _LOSS if has_loss else _NO_LOSS)
        console.print(Text(head, "bold"), text, "", sep="\n", soft_wrap=True)
