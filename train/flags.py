"""Command-line flags for config fields: `parse` and `parse_finetuning`."""

import argparse
import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.lora import LoraConfig

from .config import RunConfig
from .finetune import FinetuneConfig
from .old_names import new_flags
from .recipes import FINETUNING

Config = TypeVar("Config", bound=RunConfig)
_OPTIONS = (tyro.conf.AvoidSubcommands,)  # an optional group is as in the recipe


def parse(recipe: Config, flags: Sequence[str], *, prog: str) -> Config:
    """Override fields of a recipe with flags, `--steps 10 --data.batch-size 16`; errors are one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(type(recipe), default=recipe, args=new_flags(flags), prog=prog, config=_OPTIONS)
    except SystemExit as end:
        if not end.code:
            raise
        raise DSMoEError(_one_line(errors.getvalue())) from None


def parse_finetuning(checkpoint: str, flags: Sequence[str]) -> tuple[FinetuneConfig, int]:
    """Parse the flags of `dsmoe finetune CHECKPOINT`; return the config and the number of examples to `--show`.

    `--recipe NAME` sets the defaults of the other flags; `--lora`, or any flag of that group, enables adapters.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="full")
    parser.add_argument("--show", type=int, default=0)
    try:
        known, rest = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise DSMoEError(str(error)) from None
    check_choice("recipe", known.recipe, FINETUNING)
    recipe = dataclasses.replace(FINETUNING[known.recipe](), init_from=checkpoint)
    if recipe.lora is None and any(flag == "--lora" or flag.startswith("--lora.") for flag in rest):
        recipe = dataclasses.replace(recipe, lora=LoraConfig())
    rest = [flag for flag in rest if flag != "--lora"]
    return parse(recipe, rest, prog=f"dsmoe finetune {checkpoint}"), known.show


def _one_line(boxed: str) -> str:
    """Extract the message from tyro's box, without the help below it."""
    lines = [re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", line).strip() for line in boxed.splitlines()]
    title, *rest = [*lines, ""]
    message = []
    for line in rest:
        if not line and message:
            break
        message.append(line)
    text = " ".join(" ".join(message or [title]).split())
    return re.sub(r"^Error parsing \w+Config: ", "", text)
