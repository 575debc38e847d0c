"""The command `dsmoe`: parsing, exit codes, and verbs, which import lazily. Start at `main`, then `flags.py`."""

import argparse
import functools
import itertools
import logging
import math
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from dsmoe_jax import __version__
from dsmoe_jax.cli import experiments
from dsmoe_jax.cli.flags import ARGUMENTS, AXES, EVALUATE, GROUPS, MESH, MODEL, SAMPLING, SERVE, Argument, mesh_flags
from dsmoe_jax.cli.huge_pages import use_huge_pages
from dsmoe_jax.cli.interrupts import interrupts
from dsmoe_jax.cli.streams import (
    describe_error,
    flush_or_discard,
    open_standard_streams,
    print_error,
    print_status,
    reader_has_left,
)
from dsmoe_jax.errors import DSMoEError, check_choice, unknown_flag
from dsmoe_jax.progress import bar, plural
from dsmoe_jax.xla_options import set_environment

_FORCE: Final = "--force"  # of `pretrain` and `finetune`
_DEBUG: Final = "show the traceback of every error"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line instead of the usage, and exit."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, 1 for a bug or a plan that does not fit, 2 for invalid input, or 130 if interrupted."""
    open_standard_streams()
    if argv is None:
        use_huge_pages(sys.argv[1:])
    code = 0
    try:
        with interrupts() as interrupted:
            code = _run(sys.argv[1:] if argv is None else argv, interrupted)
    finally:
        flush_or_discard()
    if argv is None and (code == 130 or interrupted.is_set()):
        os._exit(code)  # XLA threads may be running, and Python crashes when it shuts down under them
    return code


def _run(argv: Sequence[str], interrupted: threading.Event) -> int:
    command, debug = "dsmoe", "--debug" in argv
    try:
        for argument in argv:
            _utf8(argument)
        argv = [argument for argument in argv if argument != "--debug"]
        command += f" {argv[0]}" if argv and argv[0] in VERBS else ""
        args = _parse(argv)
        set_environment()
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.raiseExceptions = False  # drop log lines that stderr cannot take
        for library in ("absl", "gguf", "httpx", "httpx2", "jax", "orbax"):
            logging.getLogger(library).setLevel(logging.ERROR)
        code = args.run(args) or 0
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
            print_error(f"{command}: {describe_error(error)}")
            return 2
        print_error(f"{command}: internal error, please report it with the traceback above")
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    return code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the verb and its arguments; exits on `--help` and usage errors."""
    argv = mesh_flags(argv)
    if argv and not argv[0].startswith("-"):
        check_choice("verb", argv[0], VERBS)
    if argv and argv[0] in VERBS and argv[0] not in ARGUMENTS:  # tyro parses the rest
        return argparse.Namespace(verb=argv[0], run=VERBS[argv[0]][0], flags=[*argv[1:]])
    parser, verbs = make_parser()
    if argv and argv[0] in verbs:
        _check_flags(argv[1:], verbs[argv[0]])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        verbs[args.verb].error(_unknown(unknown[0], verbs[args.verb]))
    _check_paths(parser, args)
    return args


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command, and those of its verbs by name."""
    parser = Parser(prog="dsmoe", description="DeepSeekMoE in JAX.")
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}", help="print the version")
    parser.add_argument("--debug", action="store_true", help=_DEBUG)  # `_run` removes it, before or after the verb
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, (run, help_line) in VERBS.items():
        verb = verbs.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        groups: dict[str | None, Any] = {}
        arguments = ARGUMENTS.get(name, ())
        grouped = {title: members for title, (_, members) in GROUPS.items() if members[0] in arguments}
        for argument in arguments:
            title = next((title for title, members in grouped.items() if argument in members), None)
            if title is not None and title not in groups:
                groups[title] = verb.add_argument_group(title, GROUPS[title][0])
            flags, options = argument
            groups.get(title, verb).add_argument(*flags, **options)
        verb.add_argument("--debug", action="store_true", help=_DEBUG)
        verb.set_defaults(run=run)
    return parser, verbs.choices


def _interrupted() -> int:
    print_error("")  # the terminal shows ^C without a newline
    return 130


def _check_flags(argv: Sequence[str], verb: argparse.ArgumentParser) -> None:
    """Reject unknown flags before argparse misses required ones."""
    known = [name for action in verb._actions for name in action.option_strings]
    for argument in itertools.takewhile(lambda argument: argument != "--", argv):
        flag = argument.partition("=")[0]
        if flag.startswith("--") and " " not in flag and not any(name.startswith(flag) for name in known):
            verb.error(unknown_flag(flag, known))


def _unknown(argument: str, verb: argparse.ArgumentParser) -> str:
    """Describe an argument that a verb does not have."""
    flag = argument.partition("=")[0]
    known = (name for action in verb._actions for name in action.option_strings)
    return unknown_flag(flag, known) if flag.startswith("-") else f"unexpected argument {argument!r}"


def _check_paths(parser: Parser, args: argparse.Namespace) -> None:
    """Reject empty paths and names, usually from an unset shell variable."""
    for flags, _ in ARGUMENTS[args.verb]:
        name = flags[0].strip("-").replace("-", "_")
        value = getattr(args, name, None)
        values = value if isinstance(value, list) else [value]
        if name not in ("prompt", "tokens", "system", "stop") and any(
            isinstance(v, str) and not v.strip() for v in values
        ):
            parser.exit(2, f"dsmoe {args.verb}: {flags[0]} must not be empty\n")


def _info(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert.hub import is_repo_id, resolve_config
    from dsmoe_jax.info import describe

    resolved = is_repo_id(args.model) or args.revision or Path(args.model).is_dir()
    model = resolve_config(args.model, args.revision) if resolved else args.model
    print(describe(model), end="")


def _convert(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli.terminal import example_command
    from dsmoe_jax.convert import import_hf

    print_status(import_hf(args.source, args.out, dtype=_cast(args), revision=args.revision, progress=bar))
    print_status(f"  try `{example_command(args.out)}`")


def _export(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert import export_gguf, export_hf

    options = {"dtype": _cast(args), "revision": args.revision, "progress": bar}
    hf_options = {name: value for name in ("max_shard_size", "with_modeling") if (value := getattr(args, name))}
    if (args.format or ("gguf" if args.out.endswith(".gguf") else "hf")) == "hf":
        if args.dtype == "q8_0":
            raise DSMoEError("--dtype q8_0 needs --format gguf")
        print_status(export_hf(args.source, args.out, **options, **hf_options))
    elif hf_options:
        raise DSMoEError(f"--{next(iter(hf_options)).replace('_', '-')} needs --format hf")
    else:
        print_status(export_gguf(args.source, args.out, **options))


def _push(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert import push

    names = ("private", "revision", "dtype", "license", "base_model", "evaluation", "dry_run")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    print_status(push(args.checkpoint, args.repo_id, **options, progress=bar))


def _verify(args: argparse.Namespace) -> None:
    from dsmoe_jax.checkpoint.manifest import TensorDamage
    from dsmoe_jax.convert import verify
    from dsmoe_jax.convert.verify import check_report_path
    from dsmoe_jax.storage.atomic_dir import write_json
    from dsmoe_jax.storage.locks import lock_name
    from dsmoe_jax.storage.paths import user_path

    source = Path(args.source)
    folder = source.absolute().parent if source.exists() else Path.cwd()  # of a hub id
    file = user_path(args.report or folder / f"{source.absolute().name}.verify.json", "--report")
    check_report_path(file, args.source, args.other)
    with lock_name(file):
        report = verify(args.source, args.other, revision=args.revision, progress=bar)
        write_json(file, report.to_dict())
    print_status(f"{report}; {file} has the SHA-256 of each")
    for found in report.mismatches[1:20]:
        print_status(f"  {TensorDamage(**found)}")
    if report.mismatches:
        raise DSMoEError(str(TensorDamage(**report.mismatches[0])))


def _tokenize(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli.tokenize import run

    print_status(run(args))


def _pretrain(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.flags import parse_pretraining

    _train(parse_pretraining(_without_force(args)), args)


def _finetune(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.finetune import show_examples
    from dsmoe_jax.train.flags import parse_finetuning

    config, shown = parse_finetuning(_without_force(args))
    if shown:
        show_examples(config, shown)
    else:
        _train(config, args)


def _plan(args: argparse.Namespace) -> int:
    from dsmoe_jax.cli.plan import run

    return run(args.flags)


def _inspect(run: Callable[..., None]) -> Callable[[argparse.Namespace], None]:
    return lambda args: run(args, functools.partial(_loaded, args))


def _without_force(args: argparse.Namespace) -> list[str]:
    """Return the flags of a config."""
    return [flag for flag in args.flags if flag != _FORCE]


def _merge(args: argparse.Namespace) -> None:
    from dsmoe_jax.convert import merge_to

    options = {"layout": args.layout, "dtype": args.dtype, "revision": args.revision}
    print_status(merge_to(args.checkpoint, args.adapter, args.out, **options))


def _generate(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli import terminal

    load = functools.partial(_generator, args)
    prompt = None if args.prompt is None else _utf8(args.prompt)
    source = {"prompt": prompt, "tokens": args.tokens, "file": args.file}
    terminal.generate(load, _provided(args, SAMPLING), **source, out=args.out, chat=args.chat)


def _chat(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli import terminal

    terminal.chat(functools.partial(_generator, args), _provided(args, SAMPLING), system=args.system)


def _serve(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli.serve import run

    run(_provided(args, MODEL), _provided(args, SERVE), _check_devices)


def _evaluate(args: argparse.Namespace) -> None:
    from dsmoe_jax.evaluate import libraries

    libraries.set_environment()
    if args.list_data or args.list_tasks:
        from dsmoe_jax.evaluate.listing import dataset_commands, harness_commands
        from dsmoe_jax.evaluate.task_loading import TaskLoader

        with libraries.quiet():
            libraries.check_installed()
            loader = TaskLoader(args.include_path or ())
            suite = loader.suite(args.suite or "base")
            if args.list_data:
                lines = dataset_commands(loader, suite, args.data or "DIR")
            else:
                lines = harness_commands(
                    loader, suite, args.model or "MODEL", unsafe=bool(args.confirm_run_unsafe_code)
                )
        print("\n".join(lines))
        return
    for name, value in (("CKPT", args.model), ("--out", args.out)):
        if value is None:
            raise DSMoEError(f"{name} is required")
    from dsmoe_jax.evaluate import evaluate
    from dsmoe_jax.train.config import DistributedConfig
    from dsmoe_jax.train.distributed import initialize

    options = {name: value for name, value in _on_mesh(args, EVALUATE).items() if not name.startswith("list_")}
    initialize(DistributedConfig())
    _check_devices()
    print_status(evaluate(**options))


def _demo(args: argparse.Namespace) -> None:
    from dsmoe_jax.cli.demo import run

    run(args.out, steps=args.steps)


def _plot(args: argparse.Namespace) -> None:
    from dsmoe_jax.train.plotting import draw
    from dsmoe_jax.train.run_records import run_folder, summarize
    from dsmoe_jax.train.trackers import PLOT

    out = args.out or (run_folder(args.runs[0]) / PLOT if len(args.runs) == 1 else Path(PLOT))
    draw(args.runs, out, by=args.by)
    print(summarize(args.runs))
    print_status(f"Saved plot: {out}")


def _train(config: Any, args: argparse.Namespace) -> None:
    from dsmoe_jax.plan.check import check_memory
    from dsmoe_jax.train.loop import run

    command, force = [args.verb, *_without_force(args)], _FORCE in args.flags
    result = run(config, check=functools.partial(check_memory, force=force, command=command))
    if result.stopped:
        command = shlex.join(["dsmoe", args.verb, *args.flags])
        print_status(f"Stopped after step {result.steps} of {result.total_steps}; resume with `{command}`")
        return
    done = "Run already complete: " if result.resumed_from == result.steps else "Trained "
    loss = "" if math.isnan(result.loss) else f", loss {result.loss:.4f}"
    validation = "" if result.eval_loss is None else f", eval/loss {result.eval_loss:.4f}"
    steps, skips = plural(result.steps, "step"), plural(result.total_skips, "update")
    print_status(f"{done}{steps}{loss}{validation}, {skips} skipped: {result.model}")


def _cast(args: argparse.Namespace) -> str | None:
    return None if args.dtype == "keep" else args.dtype


def _generator(args: argparse.Namespace) -> Any:
    from dsmoe_jax.generate import Generator

    _check_devices()
    return Generator.from_pretrained(args.path, **_on_mesh(args, (*MODEL[1:], *MESH)))


def _loaded(args: argparse.Namespace, path: str) -> tuple[Any, Any]:
    """Return the model and its tokenizer, if any."""
    from dsmoe_jax.generate.loading import check_memory
    from dsmoe_jax.loading import load, resolve
    from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

    _check_devices()
    options = _on_mesh(args, (*MODEL[1:], *MESH))
    folder, force = resolve(path, options.pop("revision", None)), options.pop("force", False)
    check_memory(folder, options.get("dtype"), options.get("quantize"), options.get("mesh"), {}, force=force)
    tokenizer = Tokenizer.from_pretrained(folder) if tokenizer_files(folder) else None
    return load(folder, **options), tokenizer


def _check_devices() -> None:
    import jax

    from dsmoe_jax.kernels.environment import check_environment

    check_environment()
    try:
        jax.devices()
    except RuntimeError as error:
        raise DSMoEError(f"JAX has no device: {error}") from None


def _provided(args: argparse.Namespace, arguments: Sequence[Argument]) -> dict[str, Any]:
    """Return the values of those arguments that were passed, keyed by parameter."""
    names = [options.get("dest", flags[0].strip("-").replace("-", "_")) for flags, options in arguments]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _on_mesh(args: argparse.Namespace, arguments: Sequence[Argument]) -> dict[str, Any]:
    """Return the values of those arguments that were passed, with one `mesh` instead of its axes."""
    from dsmoe_jax.sharding import MeshConfig

    options = _provided(args, arguments)
    axes = {axis: options.pop(name) for axis in AXES if (name := f"mesh_{axis}") in options}
    return options | ({"mesh": MeshConfig(**axes)} if axes else {})


def _utf8(argument: str) -> str:
    """Decode an argument as UTF-8 whatever the locale: array storage and tokenizers need valid UTF-8."""
    if argument.isascii():
        return argument
    try:
        return argument.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except UnicodeError:
        raise DSMoEError(f"argument {argument!r} is not UTF-8") from None


# fmt: off
VERBS: Final[dict[str, tuple[Callable[[argparse.Namespace], int | None], str]]] = {
    "demo":     (_demo,     "train a small model on Python's standard library, export, import and generate, offline"),
    "convert":  (_convert,  "convert a PyTorch checkpoint in the Hugging Face layout to a native one"),
    "export":   (_export,   "export a checkpoint for transformers, vLLM or SGLang, or to GGUF for llama.cpp"),
    "push":     (_push,     "export a checkpoint and upload it with a model card to the Hugging Face Hub"),
    "verify":   (_verify,   "verify a checkpoint, alone or bit by bit against another one"),
    "generate": (_generate, "stream the completion of a prompt, or complete a file of prompts"),
    "chat":     (_chat,     "chat with a model"),
    "serve":    (_serve,    "serve a model over HTTP with the OpenAI API, and a page to chat with it"),
    "evaluate": (_evaluate, "evaluate a model on the benchmarks of the paper, or on tasks of lm-evaluation-harness"),
    "ablate":   (_inspect(experiments.ablate), "measure the loss of a model with experts switched off"),
    "routes":   (_inspect(experiments.routes), "show which experts serve which texts, and how specialized they are"),
    "reproduce": (experiments.reproduce, "train the paper's baselines and DeepSeekMoE on one text and compare them"),
    "tokenize": (_tokenize, "tokenize text into token shards"),
    "pretrain": (_pretrain, "pretrain a model from a recipe, or resume a run"),
    "finetune": (_finetune, "fine-tune a model on examples, all weights or LoRA"),
    "plan":     (_plan,     "print memory, communication and estimated speed of a run, without devices"),
    "plot":     (_plot,     "plot the metrics of a run, or compare the losses of several"),
    "merge":    (_merge,    "merge a LoRA adapter into a checkpoint"),
    "info":     (_info,     "print parameter counts, sizes and layers of a model"),
}
# fmt: on
