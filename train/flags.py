"""The fields of a recipe as flags of the command line, by tyro. See `parse`."""

import contextlib
import io
import re
from collections.abc import Sequence

import tyro

from .config import RunConfig


def parse(recipe: RunConfig, flags: Sequence[str], *, prog: str) -> RunConfig:
    """The recipe with the flags' values in it: `--steps 10 --data.batch-size 16`.

    Raises `ValueError`, in one line, for an unknown flag or a value of another type; `--help` prints all flags and
    exits.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(RunConfig, default=recipe, args=list(flags), prog=prog)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def _one_line(boxed: str) -> str:
    """What tyro says in a box, without the box and the help under it."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in boxed.splitlines()]
    title, *rest = [*lines, ""]
    told = []
    for line in rest:
        if not line and told:
            break
        told.append(line)
    return " ".join(" ".join(told or [title]).split())
