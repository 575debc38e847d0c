"""The fields of a recipe as flags of the command line, by tyro. See `parse` and `parse_finetuning`."""

import argparse
import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.lora import LoraConfig

from .config import RunConfig
from .finetune import FinetuneConfig
from .recipes import FINETUNING

Config = TypeVar("Config", bound=RunConfig)
_OPTIONS = (tyro.conf.AvoidSubcommands,)  # a part that may be None is as the recipe has it


def parse(recipe: Config, flags: Sequence[str], *, prog: str) -> Config:
    """The recipe with the flags' values in it: `--steps 10 --data.batch-size 16`.

    Raises `ValueError`, in one line, for an unknown flag or a value of another type; `--help` prints all flags and
    exits.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(recipe), default=recipe, args=list(flags), prog=prog, config=_OPTIONS)
    except SystemExit as end:
        if not end.code:
            raise
        raise DSMoEError(_one_line(said.getvalue())) from None


def parse_finetuning(checkpoint: str, flags: Sequence[str]) -> tuple[FinetuneConfig, int]:
    """The run that `dsmoe finetune CHECKPOINT FLAGS` asks for, and how many examples it shall only show.

    `--recipe NAME` is where the other flags start from, `--lora` or any flag below it makes adapters. Raises
    `ValueError` as `parse` does.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--recipe", default="full")
    own.add_argument("--show", type=int, default=0)
    try:
        asked, rest = own.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise DSMoEError(str(error)) from None
    if asked.recipe not in FINETUNING:
        raise DSMoEError(f"recipe {asked.recipe!r} does not exist, only {', '.join(FINETUNING)}")
    recipe = dataclasses.replace(FINETUNING[asked.recipe](), init_from=checkpoint)
    if recipe.lora is None and any(flag == "--lora" or flag.startswith("--lora.") for flag in rest):
        recipe = dataclasses.replace(recipe, lora=LoraConfig())
    rest = [flag for flag in rest if flag != "--lora"]
    return parse(recipe, rest, prog=f"dsmoe finetune {checkpoint}"), asked.show


def _one_line(boxed: str) -> str:
    """What tyro says in a box, without the box and the help under it."""
    lines = [re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", line).strip() for line in boxed.splitlines()]
    title, *rest = [*lines, ""]
    told = []
    for line in rest:
        if not line and told:
            break
        told.append(line)
    return " ".join(" ".join(told or [title]).split())
