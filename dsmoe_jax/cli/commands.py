"""The command `dsmoe`: parsing, exit codes, and verbs, which import lazily. Start at `main`, then `flags.py`."""

import argparse
import functools
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from dsmoe_jax import __version__
from dsmoe_jax.cli.flags import ARGUMENTS, MODEL, SAMPLING, Argument
from dsmoe_jax.cli.interrupts import interrupts
from dsmoe_jax.cli.streams import flush_or_discard, open_standard_streams, print_error, print_status, reader_has_left
from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.progress import bar
from dsmoe_jax.xla_options import set_environment

_DEBUG: Final = "show the traceback of every error"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line instead of the usage, and exit."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 for a bug, 2 for invalid input, 130 if interrupted."""
    open_standard_streams()
    code = 0
    try:
        with interrupts() as interrupted:
            code = _run(sys.argv[1:] if argv is None else argv, interrupted)
    finally:
        flush_or_discard()
    if argv is None and code == 130:
        os._exit(code)  # XLA threads may be running, and Python crashes when it shuts down under them
    return code


def _run(argv: Sequence[str], interrupted: threading.Event) -> int:
    command, debug = "dsmoe", "--debug" in argv
    try:
        for argument in argv:
            _utf8(argument)
        args = _parse([argument for argument in argv if argument != "--debug"])
        command = f"dsmoe {args.verb}"
        set_environment()
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        logging.raiseExceptions = False  # drop log lines that stderr cannot take
        for library in ("absl", "jax", "orbax"):
            logging.getLogger(library).setLevel(logging.ERROR)
        args.run(args)
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():  # `| head`; any other broken pipe is an error
            return 0
        if interrupted.is_set():  # Ctrl-C during an import may raise any exception
            return _interrupted()
        expected = isinstance(error, (DSMoEError, OSError))
        if debug or not expected:
            print_error(traceback.format_exc().rstrip())
        if expected:
            print_error(f"{command}: {' '.join(str(error).split())}")
            return 2
        print_error(f"{command}: internal error, please report it with the traceback above")
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the verb and its arguments; exits on `--help` and usage errors."""
    parser = Parser(prog="dsmoe", description="DeepSeekMoE in JAX.")
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    parser.add_argument("--debug", action="store_true", help=_DEBUG)  # `_run` removes it, before or after the verb
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, (run, help_line) in VERBS.items():
        verb = verbs.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        for flags, options in ARGUMENTS[name]:
            verb.add_argument(*flags, **options)
        verb.add_argument("--debug", action="store_true", help=_DEBUG)
        verb.set_defaults(run=run)
    args = parser.parse_args(argv)
    _check_paths(parser, args)
    return args


def _interrupted() -> int:
    print_error("")  # the terminal shows ^C without a newline
    return 130


def _check_paths(parser: Parser, args: argparse.Namespace) -> None:
    """Reject empty paths and names, usually from an unset shell variable."""
    for flags, _ in ARGUMENTS[args.verb]:
        name = flags[0].strip("-").replace("-", "_")
        value = getattr(args, name, None)
        values = value if isinstance(value, list) and name != "flags" else [value]
        if name not in ("prompt", "system", "stop") and any(isinstance(v, str) and not v.strip() for v in values):
            parser.exit(2, f"dsmoe {args.verb}: {flags[0]} must not be empty\n")


def _info(args: argparse.Namespace) -> None:
    from dsmoe_jax.info import describe

    print(describe(args.model), end="")


def _convert(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert import import_hf

    print_status(import_hf(args.source, args.out, dtype=_cast(args), revision=args.revision, progress=bar))
    print_status(f"  try `dsmoe generate {args.out}`")


def _export(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert import export_hf

    print_status(export_hf(args.native, args.out, max_shard_size=args.max_shard_size, dtype=_cast(args), progress=bar))


def _verify(args: argparse.Namespace) -> None:
    from dsmoe_jax.checkpoint.manifest import TensorDamage
    from dsmoe_jax.convert import verify
    from dsmoe_jax.storage.atomic_dir import write_json
    from dsmoe_jax.storage.locks import lock_name

    native = Path(args.native).absolute()
    file = Path(args.report or native.parent / f"{native.name}.verify.json")
    with lock_name(file):
        report = verify(args.native, args.hf, progress=bar)
        write_json(file, report.to_dict())
    print_status(f"{report}; {file} has the SHA-256 of each")
    for found in report.mismatches[1:20]:
        print_status(f"  {TensorDamage(**found)}")
    if report.mismatches:
        raise DSMoEError(str(TensorDamage(**report.mismatches[0])))


def _tokenize(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.data import tokenize

    split = args.split_special_tokens
    print_status(tokenize(args.sources, args.tokenizer, args.out, split_special_tokens=split, progress=bar))


def _pretrain(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.flags import parse
    from dsmoe_jax.train.recipes import RECIPES

    check_choice("recipe", args.recipe, RECIPES)
    _train(parse(RECIPES[args.recipe](), args.flags, prog=f"dsmoe pretrain {args.recipe}"), args.recipe, args)


def _finetune(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.finetune import show_examples
    from dsmoe_jax.train.flags import parse_finetuning

    config, shown = parse_finetuning(args.checkpoint, args.flags)
    if shown:
        show_examples(config, shown)
    else:
        _train(config, args.checkpoint, args)


def _merge(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert import merge_to

    print_status(merge_to(args.checkpoint, args.adapter, args.out, layout=args.layout, dtype=args.dtype))


def _generate(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli import terminal

    load = functools.partial(_generator, args)
    prompt = None if args.prompt is None else _utf8(args.prompt)
    terminal.generate(load, _provided(args, SAMPLING), prompt=prompt, file=args.file, out=args.out)


def _chat(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli import terminal

    terminal.chat(functools.partial(_generator, args), _provided(args, SAMPLING), system=args.system)


def _demo(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli.demo import run

    run(args.out, steps=args.steps)


def _plot(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.plotting import draw
    from dsmoe_jax.train.run_records import summarize
    from dsmoe_jax.train.trackers import PLOT

    out = args.out or (Path(args.runs[0]) / PLOT if len(args.runs) == 1 else Path(PLOT))
    draw(args.runs, out, by=args.by)
    print(summarize(args.runs))
    print_status(f"Saved plot: {out}")


def _train(config: Any, source: str, args: argparse.Namespace) -> None:
    from dsmoe_jax.train.loop import run

    result = run(config)
    if result.stopped:
        command = " ".join([f"dsmoe {args.verb}", source, *args.flags])
        print_status(f"Stopped after step {result.steps} of {result.total_steps}; resume with `{command}`")
        return
    done = "Run already complete: " if result.resumed_from == result.steps else "Trained "
    loss = "" if math.isnan(result.loss) else f", loss {result.loss:.4f}"
    validation = "" if result.eval_loss is None else f", eval/loss {result.eval_loss:.4f}"
    print_status(f"{done}{result.steps} steps{loss}{validation}, {result.total_skips} updates skipped: {result.model}")


def _cast(args: argparse.Namespace) -> str | None:
    return None if args.dtype == "keep" else args.dtype


def _generator(args: argparse.Namespace) -> Any:
    import jax

    from dsmoe_jax.generate import Generator

    try:
        jax.devices()
    except RuntimeError as error:
        raise DSMoEError(f"JAX has no device: {error}") from None
    return Generator.from_pretrained(**_provided(args, MODEL))


def _provided(args: argparse.Namespace, arguments: Sequence[Argument]) -> dict[str, Any]:
    """Return the values of those arguments that were passed, keyed by parameter."""
    names = [options.get("dest", flags[0].strip("-").replace("-", "_")) for flags, options in arguments]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _utf8(argument: str) -> str:
    """Decode an argument as UTF-8 whatever the locale: array storage and tokenizers need valid UTF-8."""
    if argument.isascii():
        return argument
    try:
        return argument.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except UnicodeError:
        raise DSMoEError(f"argument {argument!r} is not UTF-8") from None


# fmt: off
VERBS: Final[dict[str, tuple[Callable[[argparse.Namespace], None], str]]] = {
    "demo":     (_demo,     "train a small model on Python's standard library, export, import and generate, offline"),
    "convert":  (_convert,  "convert a PyTorch checkpoint in the Hugging Face layout to a native one"),
    "export":   (_export,   "export a native checkpoint to the Hugging Face layout, for vLLM, SGLang or llama.cpp"),
    "verify":   (_verify,   "verify a native checkpoint bit by bit, alone or against a Hugging Face folder"),
    "generate": (_generate, "stream the completion of a prompt, or complete a file of prompts"),
    "chat":     (_chat,     "chat with a model"),
    "tokenize": (_tokenize, "tokenize text into token shards"),
    "pretrain": (_pretrain, "pretrain a model from a recipe, or resume a run"),
    "finetune": (_finetune, "fine-tune a model on examples, all weights or LoRA"),
    "plot":     (_plot,     "plot the metrics of a run, or compare the losses of several"),
    "merge":    (_merge,    "merge a LoRA adapter into a checkpoint"),
    "info":     (_info,     "print parameter counts, sizes and layers of a model"),
}
# fmt: on
