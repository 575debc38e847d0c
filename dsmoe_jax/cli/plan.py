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
KINDS: Final = ("pretrain", "finetune", "generate")
_USAGE: Final = (
    "Print memory, communication and estimated speed of a run from its configs alone: no device is used, nothing is "
    "loaded. `dsmoe plan pretrain RECIPE` and `dsmoe plan finetune CKPT` take all flags of `dsmoe pretrain` and `dsmoe "
    "finetune`; --mesh, --step, --data.batch-size, --data.sequence-length, --optimizer.moments, --lora and --quantize "
    "matter. CKPT may also be a preset."
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are raised."""

    def error(self, message: str) -> NoReturn:
        raise DSMoEError(message)


def run(arguments: Sequence[str]) -> None:
    """Print the plan of a run."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU is left alone
    if not arguments or arguments[0] in ("-h", "--help"):
        make_parser("pretrain").print_help()
        return
    check_choice("run", arguments[0], KINDS)
    kind, parser = arguments[0], make_parser(arguments[0])
    own, rest = parser.parse_known_args(arguments[1:])
    if own.devices < 1:
        raise DSMoEError(f"--devices must be at least 1, got {own.devices}")
    if own.compile:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={own.devices}"
        )
    if kind == "generate":
        if own.search:
            raise DSMoEError("--search is for pretrain and finetune")
        if rest:
            raise DSMoEError(_unknown(rest[0], parser))
        _generate(own)
        return
    if (
        flag := next((flag for flag in rest if closest(flag.partition("=")[0], _flags(parser), _NEARLY)), None)
    ) is not None:
        raise DSMoEError(_unknown(flag, parser))
    _train(kind, own, rest)


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
    from dsmoe_jax.plan.cards import card_of

    bandwidths = {"bandwidth": own.device_bandwidth, "link": own.link_bandwidth, "network": own.network_bandwidth}
    card = card_of(own.device, memory=own.device_memory, tflops=own.device_tflops, **bandwidths)
    if card.platform == "cpu" and own.device_memory is None:  # simulated devices share it
        return dataclasses.replace(card, memory=card.memory // own.devices)
    return card


def _train(kind: str, own: argparse.Namespace, flags: Sequence[str]) -> None:
    from dsmoe_jax.plan import report
    from dsmoe_jax.plan.search import search
    from dsmoe_jax.plan.training import TrainingPlan
    from dsmoe_jax.train.flags import parse_finetuning, parse_pretraining

    card = _card(own)
    config: Any = parse_pretraining(flags) if kind == "pretrain" else parse_finetuning(flags)[0]
    model, dtype = _model(config)
    if own.search:
        print(report.search_text(search(config, model, own.devices, card, dtype=dtype), own.device, config), end="")
        return
    plan = TrainingPlan.of(config, model, own.devices, card, dtype=dtype)
    print(report.training_text(plan, own.device), end="")
    if own.compile:
        from dsmoe_jax.plan.compiled import compile_plan

        print(report.compiled_text(plan, compile_plan(plan, own.device)), end="")


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


def _generate(own: argparse.Namespace) -> None:
    from dsmoe_jax.plan import report
    from dsmoe_jax.plan.generation import GenerationPlan
    from dsmoe_jax.sharding import MeshConfig

    axes = {axis: getattr(own, f"mesh_{axis}") for axis in AXES}
    options = {"batch_size": own.max_batch_size, "max_length": own.context_length, "quantize": own.quantize}
    options |= {"dtype": own.dtype, "cache_dtype": own.cache_dtype}
    model = _model_config(own.path, own.revision)
    plan = GenerationPlan.of(model, MeshConfig(**axes), own.devices, _card(own), **options)
    print(report.generation_text(plan, own.device), end="")
    if own.compile:
        from dsmoe_jax.plan.compiled_generation import compile_generation

        print(report.compiled_generation_text(plan, compile_generation(plan, own.device)), end="")
