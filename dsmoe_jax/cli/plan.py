"""`dsmoe plan pretrain|finetune|generate …`: what a run needs, before it runs. Start at `run`."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from dsmoe_jax.cli.flags import AXES, GENERATION_PLAN, PLAN, Argument
from dsmoe_jax.errors import DSMoEError, check_choice, closest, unknown_flag

_NEARLY: Final = 0.85  # similarity of a misspelled flag; those of training are less similar to these
_LEAST: Final = {"devices": 1, "max_batch_size": 1, "context_length": 2}
_SEARCHED: Final = ("--mesh.", "--step.gradient-accumulation-steps", "--step.remat")
KINDS: Final = ("pretrain", "finetune", "generate")
_USAGE: Final = (
    "Print memory, communication and estimated speed of a run from its configs alone: no device is used, nothing is "
    "loaded. `dsmoe plan pretrain RECIPE` and `dsmoe plan finetune CKPT` take all flags of `dsmoe pretrain` and `dsmoe "
    "finetune`; --mesh, --step, --data.batch-size, --data.sequence-length, --optimizer.moments, --lora and --quantize "
    "matter. CKPT may also be a preset. Exits with 1 if the run does not fit, 2 for invalid input."
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised."""

    def error(self, message: str) -> NoReturn:
        raise DSMoEError(message)


def run(arguments: Sequence[str]) -> int:
    """Print the plan of a run; return the exit code, 1 if it does not fit."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU is left alone
    if not arguments or arguments[0] in ("-h", "--help"):
        make_parser("pretrain").print_help()
        return 0
    check_choice("run", arguments[0], KINDS)
    kind, parser = arguments[0], make_parser(arguments[0])
    own, rest = parser.parse_known_args(arguments[1:])
    for name, least in _LEAST.items():
        if (value := getattr(own, name, least)) < least:
            raise DSMoEError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if own.compile:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={own.devices}"
        )
    if kind == "generate":
        if own.search:
            raise DSMoEError("--search is for pretrain and finetune")
        if rest:
            raise DSMoEError(_unknown(rest[0], parser))
        return _generate(own)
    if (
        flag := next((flag for flag in rest if closest(flag.partition("=")[0], _flags(parser), _NEARLY)), None)
    ) is not None:
        raise DSMoEError(_unknown(flag, parser))
    return _train(kind, own, rest)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    flag = argument.partition("=")[0]
    return unknown_flag(flag, _flags(parser)) if flag.startswith("-") else f"unexpected argument {argument!r}"


def make_parser(kind: str) -> argparse.ArgumentParser:
    """Return the parser of the flags that only plans have."""
    parser = _Parser(prog=f"dsmoe plan {'|'.join(KINDS)}", description=_USAGE, allow_abbrev=False)
    arguments: tuple[Argument, ...] = (*PLAN, *(GENERATION_PLAN if kind == "generate" else ()))
    for flags, options in arguments:
        parser.add_argument(*flags, **options)
    return parser


def _card(own: argparse.Namespace) -> Any:
    from dsmoe_jax.plan.cards import card_name, card_of

    own.device = card_name(own.device)
    bandwidths = {"bandwidth": own.device_bandwidth, "link": own.link_bandwidth, "network": own.network_bandwidth}
    card = card_of(own.device, memory=own.device_memory, tflops=own.device_tflops, **bandwidths)
    if card.platform == "cpu" and own.device_memory is None:  # simulated devices share it
        return dataclasses.replace(card, memory=card.memory // own.devices)
    return card


def _train(kind: str, own: argparse.Namespace, flags: Sequence[str]) -> int:
    from dsmoe_jax.plan import report
    from dsmoe_jax.plan.compiled import compile_plan, mesh_of_card
    from dsmoe_jax.plan.search import search
    from dsmoe_jax.plan.ways_out import ways_out
    from dsmoe_jax.train.checks import check_model
    from dsmoe_jax.train.defaults import with_defaults
    from dsmoe_jax.train.flags import parse_finetuning, parse_pretraining

    card = _card(own)
    config: Any = parse_pretraining(flags) if kind == "pretrain" else parse_finetuning(flags)[0]
    model, dtype = _model(config)
    config = with_defaults(config, model)
    check_model(config, model)
    if own.search:
        found = search(config, model, own.devices, card, dtype=dtype)
        plan = next(iter(found.fitting), found.smallest)
        ways = [] if plan.fits else ways_out(config, model, plan)
        text = _replaced(flags) + report.search_text(found, own.device, ways)
    else:
        plan = _planned(config, model, own.devices, card, dtype)
        text = report.training_text(plan, own.device)
    if compiles := own.compile and (plan.fits or not own.search):
        mesh_of_card(own.device, plan.work.mesh)  # refuses before anything is printed
    print(text, end="", flush=True)
    if compiles:
        print(report.compiled_text(plan, compile_plan(plan, own.device)), end="")
    return int(not plan.fits)


def _planned(config: Any, model: Any, devices: int, card: Any, dtype: Any) -> Any:
    """Return the plan of a run on its own mesh."""
    from dsmoe_jax.plan.training import TrainingPlan
    from dsmoe_jax.plan.workload import Parameters

    parameters = Parameters.of(config, model)
    try:
        return TrainingPlan.of(config, model, devices, card, parameters=parameters, dtype=dtype)
    except DSMoEError as error:
        raise DSMoEError(f"{error}; --search tries all meshes and micro-batches") from None


def _replaced(flags: Sequence[str]) -> str:
    """Return a line with those flags that a search replaces; empty without them."""
    names = (flag.partition("=")[0].replace("_", "-") for flag in flags)
    replaced = [name for name in dict.fromkeys(names) if name.startswith(_SEARCHED)]
    return f"the search replaces {', '.join(replaced)}\n" if replaced else ""


def _model(config: Any) -> tuple[Any, Any]:
    """Return the model of a training run, and the dtype in which a frozen base is stored."""
    from dsmoe_jax.checkpoint.native import DTYPES

    if config.init_from is None:
        return config.model_config(), DTYPES["bfloat16"]
    model = _model_config(config.init_from, config.revision)
    if config.aux_loss_alpha is not None:
        model = dataclasses.replace(model, aux_loss_alpha=config.aux_loss_alpha)
    return model, DTYPES.get(model.torch_dtype or "", DTYPES["bfloat16"])


def _model_config(name: str, revision: str | None) -> Any:
    """Return the config of a preset, a checkpoint, a Hugging Face folder or a hub id; weights are not read."""
    from dsmoe_jax.config import PRESETS, ModelConfig
    from dsmoe_jax.convert.hub import resolve_config

    if name in PRESETS and revision is None and not Path(name).exists():
        return ModelConfig.preset(name)
    return ModelConfig.from_file(resolve_config(name, revision))


def _generate(own: argparse.Namespace) -> int:
    from dsmoe_jax.plan import report
    from dsmoe_jax.plan.compiled import mesh_of_card
    from dsmoe_jax.plan.compiled_generation import compile_generation
    from dsmoe_jax.plan.generation import GenerationPlan
    from dsmoe_jax.sharding import MeshConfig

    axes = {axis: getattr(own, f"mesh_{axis}") for axis in AXES}
    options = {"batch_size": own.max_batch_size, "max_length": own.context_length, "quantize": own.quantize}
    options |= {"dtype": own.dtype, "cache_dtype": own.cache_dtype}
    model = _model_config(own.path, own.revision)
    plan = GenerationPlan.of(model, MeshConfig(**axes), own.devices, _card(own), **options)
    if own.compile:
        mesh_of_card(own.device, plan.mesh)  # refuses before anything is printed
    print(report.generation_text(plan, own.device), end="", flush=True)
    if own.compile:
        print(report.compiled_generation_text(plan, compile_generation(plan, own.device)), end="")
    return int(not plan.fits)
