"""Flags of `dsmoe pretrain` and `dsmoe finetune`: `parse_pretraining` and `parse_finetuning`.

tyro makes every field of a config a flag and its docstring the help text, in which the sentence "Default: …" says what
a default of None means. The verbs without a config use argparse (`dsmoe_jax.cli`), because configs import jax.
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructTypeInfo
from tyro.constructors import PrimitiveTypeInfo as TypeInfo
from tyro.constructors._struct_spec_dataclass import dataclass_rule

from dsmoe_jax.errors import DSMoEError, check_choice, unknown_flag
from dsmoe_jax.kernels.expert_ffn import BACKENDS
from dsmoe_jax.lora import LoraConfig

from .checks import check_minimum
from .config import RunConfig
from .finetune import FinetuneConfig
from .old_names import new_flags
from .recipes import FINETUNING, RECIPES
from .resume import CONFIG, settings_of_run, with_settings
from .sft.templates import TEMPLATES

Config = TypeVar("Config")
Recipes = Mapping[str, Callable[[], RunConfig]]
_CKPT: Final = "CKPT|HUB_ID"
# fmt: off
# The value in the help, of fields whose type says too little; `...` stands for further values.
METAVARS: Final[dict[str, str]] = {
    "alpha_pattern":       "REGEX FLOAT ...",
    "backend":             f"{{{','.join(BACKENDS)}}}|FWD,DGRAD,WGRAD",
    "coordinator_address": "HOST:PORT",
    "eval_tasks":          "TASK ...",
    "eval_tasks_data":     "DIR",
    "eval_tasks_include":  "DIR ...",
    "files":               "FILE ...",
    "init_from":           _CKPT,
    "layers_pattern":      "NAME",
    "layers_to_transform": "INT ...",
    "model":               "PRESET|CONFIG.json",
    "modules_to_save":     "MODULE ...",
    "output_dir":          "DIR",
    "profile":             "FIRST:LAST",
    "rank_pattern":        "REGEX INT ...",
    "revision":            "REV",
    "sources":             "SOURCE ...",
    "target_modules":      "MODULE ...|REGEX",
    "template":            f"{{{','.join(TEMPLATES)}}}|FILE.jinja",
    "tokenizer":           "DIR",
    "validation":          "SOURCE ...",
    "weights":             "FLOAT ...",
}
# fmt: on
# tyro's messages, and ours.
_SHORTER: Final[dict[str, Callable[[re.Match[str]], str]]] = {
    r"^Error parsing (\S+): invalid literal for int.*: (.+)$": lambda match: (
        f"{match[1]} must be an integer, got {match[2]}"
    ),
    r"^Error parsing (\S+): could not convert.*: (.+)$": lambda match: f"{match[1]} must be a number, got {match[2]}",
    r"^invalid choice (.+) for argument '(\S+)'\. Expected one of \((.*?),?\)\.$": lambda match: (
        f"{match[2]} must be one of {_choices(match[3])}, got {match[1]}"
    ),
}
_PRETRAINING: Final = (
    "Pretrain a model, or resume the run in the output directory. RECIPE is one of those at the end: it sets the "
    "defaults of all flags, here those of `{}`. --force starts a run that exceeds the planned memory (`dsmoe plan`)."
)
_REGISTRY: Final = ConstructorRegistry()
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Finetuning:
    """Fine-tune a model on examples, all parameters or LoRA, or resume the run in the output directory.

    CKPT|HUB_ID is a native checkpoint, a Hugging Face folder or a hub id. --force starts a run that exceeds the planned
    memory (`dsmoe plan`).
    """

    recipe: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(FINETUNING)}}}")] = "full"
    """Recipe, which sets the defaults of the other flags; the recipes are listed below."""

    show: int = 0
    """Print this many examples with their loss tokens highlighted, and do not train."""

    enable_lora: Annotated[bool, tyro.conf.arg(name="lora"), tyro.conf.FlagCreatePairsOff] = False
    """Train low-rank adapters instead of all parameters; every `--lora.…` flag enables them, too."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    """The fine-tuning run."""


def parse_pretraining(arguments: Sequence[str]) -> RunConfig:
    """Parse `RECIPE --FLAG VALUE …`, the arguments of `dsmoe pretrain`."""
    given, flags = _first(arguments, f"dsmoe pretrain RECIPE --FLAG VALUE; recipes are {', '.join(RECIPES)}")
    name = given or "tiny"
    if name not in RECIPES and (name.endswith(".json") or Path(name).exists()):
        raise DSMoEError(f"recipe must be one of {', '.join(RECIPES)}; pass a model with it, `tiny --model {name}`")
    check_choice("recipe", name, RECIPES)
    config, _ = _resumed(RECIPES, name, name, flags)
    with _recipes_after_help(RECIPES):
        return parse(config, flags, prog=f"dsmoe pretrain {given or 'RECIPE'}", description=_PRETRAINING.format(name))


def parse_finetuning(arguments: Sequence[str]) -> tuple[FinetuneConfig, int]:
    """Parse `CKPT --FLAG VALUE …`, the arguments of `dsmoe finetune`; return also the number of examples to show."""
    checkpoint, flags = _first(arguments, f"dsmoe finetune {_CKPT} --data FILE")
    if (requested := _value_of(flags, "--recipe")) is not None:
        check_choice("recipe", requested, FINETUNING)
    config, name = _resumed(FINETUNING, requested, "full", flags)
    config = dataclasses.replace(config, init_from=checkpoint)
    if config.lora is None and any(flag.partition(".")[0] in ("--lora", "--help", "-h") for flag in flags):
        config = dataclasses.replace(config, lora=LoraConfig())
    with _recipes_after_help(FINETUNING):
        parsed = parse(_Finetuning(recipe=name, config=config), flags, prog=f"dsmoe finetune {checkpoint or _CKPT}")
    check_minimum(parsed, {"show": 0}, "--")
    return parsed.config, parsed.show


def parse(default: Config, flags: Sequence[str], *, prog: str, description: str | None = None) -> Config:
    """Override fields of a config with flags, `--steps 10 --data.batch-size 16`; errors are one line."""
    errors, options = io.StringIO(), {"prog": prog, "description": description, "registry": _REGISTRY}
    markers = (tyro.conf.AvoidSubcommands,)  # an optional group is as in `default`
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(type(default), default=default, args=new_flags(flags), config=markers, **options)
    except DSMoEError as error:
        raise DSMoEError(_with_flag(str(error), default)) from None
    except SystemExit as end:
        if not end.code:
            raise
        raise DSMoEError(_one_line(errors.getvalue(), default)) from None


def _first(arguments: Sequence[str], usage: str) -> tuple[str | None, Sequence[str]]:
    """Split the first argument from the flags; None if only help is requested."""
    metavar = usage.split()[2]
    if arguments and not arguments[0].startswith("-"):
        if not arguments[0].strip():
            raise DSMoEError(f"{metavar} must not be empty")
        return arguments[0], arguments[1:]
    if {"-h", "--help"} & set(arguments):
        return None, arguments
    raise DSMoEError(f"{metavar} must come first: {usage}")


def _resumed(recipes: Recipes, requested: str | None, default: str, flags: Sequence[str]) -> tuple[Any, str]:
    """Return the defaults of the flags and their recipe: those of the run in the output directory, if any."""
    name = requested or default
    config = recipes[name]()
    output_dir = _value_of(flags, "--output-dir", "--output_dir", "--out") or config.output_dir
    settings = settings_of_run(Path(output_dir).expanduser())
    known = settings.get("recipe") or name
    if requested not in (None, known):
        raise DSMoEError(
            f"recipe {requested} is not that of the run in {output_dir}, {known}; choose another --output-dir"
        )
    if settings:
        _log.info("Using the settings of %s; flags override them", Path(output_dir) / CONFIG)
        config = with_settings(recipes[known]() if known in recipes else config, settings)
    return dataclasses.replace(config, recipe=known), known


def _value_of(flags: Sequence[str], *names: str) -> str | None:
    """Return the value of the flag with one of the names, None if it is not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*names, dest="value")
    try:
        return parser.parse_known_args(list(flags))[0].value
    except argparse.ArgumentError as error:
        raise DSMoEError(str(error)) from None


@contextlib.contextmanager
def _recipes_after_help(recipes: Recipes) -> Iterator[None]:
    """List the recipes below the help."""
    try:
        yield
    except SystemExit:
        width = max(map(len, recipes))
        print("Recipes:")
        for name, recipe in recipes.items():
            print(f"  {name:{width}}  {(inspect.getdoc(recipe) or '').splitlines()[0]}")
        raise


# --- help ---


@_REGISTRY.struct_rule
def _readable(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Read the help of a config's fields from their docstrings."""
    if (spec := dataclass_rule(info)) is None:
        return None
    fields = []
    for field in spec.fields:
        help_text = field.helptext() if callable(field.helptext) else field.helptext
        text, _, absent = " ".join((help_text or "").split()).partition(" Default: ")
        hint = f"(default: {absent.rstrip('.')})" if field.default in (None, (), {}) and absent else None
        if dataclasses.is_dataclass(field.default):
            annotated: Any = field.type
        else:
            metavar = METAVARS.get(field.name) or _metavar_without_none(field.type)
            annotated = Annotated[field.type, tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)]
        fields.append(dataclasses.replace(field, type=annotated, helptext=text))
    return dataclasses.replace(spec, fields=tuple(fields))


def _metavar_without_none(hint: Any) -> str | None:
    """Return the metavar of `T | None`, that of T; None for other types."""
    kinds = get_args(hint)
    if NoneType not in kinds:
        return None
    spec = ConstructorRegistry.get_primitive_spec(TypeInfo.make(kinds[0], set()))
    return spec.metavar if isinstance(spec, PrimitiveConstructorSpec) else None


# --- errors ---


def _one_line(boxed: str, config: Any) -> str:
    """Extract the message from tyro's box, without the help below it."""
    lines = [re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", line).strip() for line in boxed.splitlines()]
    title, *rest = [*lines, ""]
    message = []
    for line in rest:
        if not line and message:
            break
        message.append(line)
    text = " ".join(" ".join(message or [title]).split())
    if unknown := re.match(r"Unrecognized options: ([^ ,=]+)", text):
        flag = unknown[1]
        return _unknown_flag(flag, [*_flag_names(config)]) if flag.startswith("-") else f"unexpected argument {flag!r}"
    for pattern, shorten in _SHORTER.items():
        text = re.sub(pattern, shorten, text)
    return _with_flag(text, config)


def _choices(listed: str) -> str:
    """Return tyro's choices without quotes; those of `T | None`, in random order, sorted and without None."""
    choices = listed.replace("'", "").split(", ")
    return ", ".join(sorted({*choices} - {"None"}) if "None" in choices else choices)


def _with_flag(text: str, config: Any) -> str:
    """Name the flag of the field that a message starts with: "Error parsing config.lora: r must be …" is `--lora.r`."""
    if checked := re.match(r"Error parsing (?!-)(?:config\b\.?)?(\S*): ", text):
        text = text[checked.end() :].removeprefix(f"{checked[1]}: ")
    field, names = re.split(r"[^\w.]", text, maxsplit=1)[0], set(_flag_names(config))
    for path in (field, f"{checked[1]}.{field}" if checked else ""):
        if (flag := f"--{path.replace('_', '-')}") in names:
            return f"{flag}{text[len(field) :]}"
    return text


def _unknown_flag(flag: str, known: Sequence[str]) -> str:
    """Return the message for an unknown flag: `--batch-size` and `--bs` are in a group, `--data.batch-size`."""
    last = flag.lstrip("-").replace("_", "-")
    for name in known:
        words = name.rpartition(".")[2].lstrip("-").split("-")
        if last in ("-".join(words), "".join(word[0] for word in words)):
            return f"unknown flag {flag}: did you mean {name}?"
    return unknown_flag(flag, known)


def _flag_names(config: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name.replace('_', '-')}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flag_names(value, "--" if isinstance(value, RunConfig) else f"{name}.")
        else:
            yield name
