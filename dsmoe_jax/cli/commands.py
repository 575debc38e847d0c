"""The verbs of `dsmoe`. Each is a thin shell over a public function and imports its room only when it runs.

Start at `VERBS`. A user's mistake gets one line on stderr and exit code 2.
"""

import _thread
import argparse
import contextlib
import functools
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final, NoReturn

from dsmoe_jax import __version__
from dsmoe_jax.cli.streams import flush_or_discard, open_standard_streams, print_error, print_status, reader_has_left
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.xla_options import set_environment


class Parser(argparse.ArgumentParser):
    """One that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 2 for a user's mistake, 130 if interrupted."""
    open_standard_streams()
    code = 0
    try:
        with _interrupts() as interrupted:
            code = _run(argv, interrupted)
    finally:
        flush_or_discard()
    if argv is None and code == 130:
        os._exit(code)  # XLA's threads may be at work, and Python crashes when it shuts down under them
    return code


def _run(argv: Sequence[str] | None, interrupted: threading.Event) -> int:
    verb = "dsmoe"
    try:
        argv = sys.argv[1:] if argv is None else argv
        for argument in argv:
            _utf8(argument)
        asked = _parse(argv)
        verb = f"dsmoe {asked.verb}"
        set_environment()
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        logging.raiseExceptions = False  # where stderr cannot be written, a log line is lost and nothing else
        for library in ("absl", "jax", "orbax"):
            logging.getLogger(library).setLevel(logging.ERROR)
        asked.run(asked)
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():  # head, say; a pipe of ours is a failure
            return 0
        if interrupted.is_set():  # an import that is interrupted fails in its own way
            return _interrupted()
        if not isinstance(error, (ValueError, OSError)):
            raise
        print_error(f"{verb}: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The verb and its arguments; exits for `--help` and for what argparse refuses."""
    parser = Parser(prog="dsmoe", description="DeepSeekMoE in JAX.")
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    for name, (run, arguments, help_line) in VERBS.items():
        verb = verbs.add_parser(name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}.")
        for flags, options in arguments:
            verb.add_argument(*flags, **options)
        verb.set_defaults(run=run)
    asked = parser.parse_args(argv)
    _refuse_empty_paths(parser, asked)
    return asked


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set once Ctrl-C is pressed, which raises `KeyboardInterrupt` where that ends the job.

    Within an import it is put off, since extension modules print it or go on half initialized; within a callback of the
    garbage collector Python only reports it, so it is raised again. A job that ignores SIGINT goes on doing so.
    """
    pressed = threading.Event()

    def press(_: int, frame: FrameType | None) -> None:
        pressed.set()
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return _interrupt_soon()
            frame = frame.f_back
        raise KeyboardInterrupt

    def unraisable(report: Any) -> None:
        if issubclass(report.exc_type, KeyboardInterrupt):
            _interrupt_soon()
        else:
            hook(report)

    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield pressed
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, press)
    sys.unraisablehook = unraisable
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def _interrupt_soon() -> None:
    again = threading.Timer(0.1, _thread.interrupt_main)
    again.daemon = True
    again.start()


def _interrupted() -> int:
    print_error("")
    return 130


def _refuse_empty_paths(parser: Parser, asked: argparse.Namespace) -> None:
    """All texts but these are paths or names; an unset shell variable makes an empty one."""
    for flags, _ in VERBS[asked.verb][1]:
        name = flags[0].strip("-").replace("-", "_")
        value = getattr(asked, name, None)
        values = value if isinstance(value, list) and name != "flags" else [value]
        if name not in ("prompt", "system", "stop") and any(isinstance(v, str) and not v.strip() for v in values):
            parser.exit(2, f"dsmoe {asked.verb}: {flags[0]} must not be empty\n")


def info(asked: argparse.Namespace) -> None:
    """`dsmoe info`."""
    from dsmoe_jax.info import describe

    print(describe(asked.model), end="")


def convert(asked: argparse.Namespace) -> None:
    """`dsmoe convert`."""
    from dsmoe_jax.convert import import_hf
    from dsmoe_jax.progress import bar

    dtype = None if asked.dtype == "keep" else asked.dtype
    print_status(import_hf(asked.source, asked.out, dtype=dtype, revision=asked.revision, progress=bar))
    print_status(f"  ready for `dsmoe generate {asked.out}`")


def export(asked: argparse.Namespace) -> None:
    """`dsmoe export`."""
    from dsmoe_jax.convert import export_hf
    from dsmoe_jax.progress import bar

    dtype = None if asked.dtype == "keep" else asked.dtype
    print_status(export_hf(asked.native, asked.out, max_shard_size=asked.max_shard_size, dtype=dtype, progress=bar))


def verify(asked: argparse.Namespace) -> None:
    """`dsmoe verify`."""
    from pathlib import Path

    from dsmoe_jax.checkpoint.manifest import Damage
    from dsmoe_jax.convert import verify
    from dsmoe_jax.progress import bar
    from dsmoe_jax.storage.atomic_dir import write_json
    from dsmoe_jax.storage.locks import lock_name

    native = Path(asked.native).absolute()
    file = Path(asked.report or native.parent / f"{native.name}.verify.json")
    with lock_name(file):
        report = verify(asked.native, asked.hf, progress=bar)
        write_json(file, report.to_dict())
    print_status(f"{report}; {file} has the SHA-256 of each")
    for found in report.mismatches[1:20]:
        print_status(f"  {Damage(**found)}")
    if report.mismatches:
        raise DSMoEError(str(Damage(**report.mismatches[0])))


def tokenize(asked: argparse.Namespace) -> None:
    """`dsmoe tokenize`."""
    from dsmoe_jax.progress import bar
    from dsmoe_jax.train.data import tokenize

    split = asked.split_special_tokens
    print_status(tokenize(asked.sources, asked.tokenizer, asked.out, split_special_tokens=split, progress=bar))


def pretrain(asked: argparse.Namespace) -> None:
    """`dsmoe pretrain`."""
    from dsmoe_jax.train.flags import parse
    from dsmoe_jax.train.recipes import RECIPES

    if asked.recipe not in RECIPES:
        raise DSMoEError(f"recipe {asked.recipe!r} does not exist, only {', '.join(RECIPES)}")
    _train(parse(RECIPES[asked.recipe](), asked.flags, prog=f"dsmoe pretrain {asked.recipe}"), asked.recipe, asked)


def finetune(asked: argparse.Namespace) -> None:
    """`dsmoe finetune`."""
    from dsmoe_jax.train.finetune import show_examples
    from dsmoe_jax.train.flags import parse_finetuning

    config, shown = parse_finetuning(asked.checkpoint, asked.flags)
    if shown:
        show_examples(config, shown)
    else:
        _train(config, asked.checkpoint, asked)


def merge(asked: argparse.Namespace) -> None:
    """`dsmoe merge`."""
    from dsmoe_jax.convert import merge_to

    print_status(merge_to(asked.checkpoint, asked.adapter, asked.out, layout=asked.layout, dtype=asked.dtype))


def generate(asked: argparse.Namespace) -> None:
    """`dsmoe generate`."""
    from dsmoe_jax.cli import terminal

    load = functools.partial(_generator, asked)
    prompt = None if asked.prompt is None else _utf8(asked.prompt)
    terminal.generate(load, _sampling(asked), prompt=prompt, file=asked.file, out=asked.out)


def chat(asked: argparse.Namespace) -> None:
    """`dsmoe chat`."""
    from dsmoe_jax.cli import terminal

    terminal.chat(functools.partial(_generator, asked), _sampling(asked), system=asked.system)


def demo(asked: argparse.Namespace) -> None:
    """`dsmoe demo`."""
    from dsmoe_jax.cli.demo import run

    run(asked.out, steps=asked.steps)


def _train(config: Any, what: str, asked: argparse.Namespace) -> None:
    from dsmoe_jax.train.loop import run

    result = run(config)
    if result.stopped:
        again = " ".join([f"dsmoe {asked.verb}", what, *asked.flags])
        print_status(f"stopped after step {result.steps} of {result.total_steps}; `{again}` goes on from there")
        return
    done = "run is complete: " if result.resumed_from == result.steps else ""
    loss = "" if math.isnan(result.loss) else f", loss {result.loss:.4f}"
    held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out text"
    print_status(f"{done}{result.steps} steps{loss}{held_out}, {result.total_skips} updates skipped: {result.model}")


def _generator(asked: argparse.Namespace) -> Any:
    from dsmoe_jax.generate import Generator

    return Generator.from_pretrained(**_given(asked, _MODEL))


def _sampling(asked: argparse.Namespace) -> dict[str, Any]:
    return _given(asked, (*_SAMPLING, *_SEVERAL))


def _given(asked: argparse.Namespace, arguments: Sequence["_Argument"]) -> dict[str, Any]:
    """What was given of these arguments, by the names that the functions have for it."""
    names = [options.get("dest", flags[0].strip("-").replace("-", "_")) for flags, options in arguments]
    return {name: value for name in names if (value := getattr(asked, name, None)) is not None}


def _utf8(argument: str) -> str:
    """The text of an argument, whatever the encoding of the terminal; `ValueError` if it is not UTF-8.

    Array storage cannot open a path that is not UTF-8, and a tokenizer cannot read such a text.
    """
    if argument.isascii():
        return argument
    try:
        return argument.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except UnicodeError:
        raise DSMoEError(f"argument {argument!r} is not UTF-8") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE") from None


# fmt: off
_Argument = tuple[tuple[str, ...], dict[str, Any]]
_DTYPE: Final[_Argument] = (
    ("--dtype",), {"metavar": "DTYPE", "help": "float32, bfloat16 or float16; default: as stored"})
_KEEP: Final[_Argument] = (
    ("--dtype",), {"metavar": "DTYPE", "default": "keep", "help": "float32, bfloat16, float16 or keep, the default"})
_CACHE: Final = ("float32", "bfloat16", "float16", "int8")
_SPLIT: Final = "encode strings such as <|endoftext|> in prompts and messages as text, not as special tokens"
# Flags are called as the parameters of `Generator` and `SamplingParams` are; what is not given keeps its default there.
_MODEL: Final[tuple[_Argument, ...]] = (
    (("path",), {"metavar": "PATH", "help": "a native checkpoint or a Hugging Face folder"}),
    (("--adapter",), {"metavar": "DIR", "help": "a LoRA adapter as the peft library stores it"}),
    (("--quantize",), {"metavar": "SCHEME", "help": "the weights as they are read: int8, int4 or nf4"}),
    _DTYPE,
    (("--cache-dtype",), {"choices": _CACHE, "metavar": "DTYPE",
                          "help": f"of keys and values: {', '.join(_CACHE)}; default: the model's"}),
    (("--max-batch-size",), {"type": int, "metavar": "N", "help": "answers at once, default 8 on CPU, 64 elsewhere"}),
    (("--context-length",), {"type": int, "metavar": "N", "help": "prompt and answer together, in tokens"}),
    (("--split-special-tokens",), {"action": "store_true", "default": None, "help": _SPLIT}),
)
_SAMPLING: Final[tuple[_Argument, ...]] = (
    (("--max-new-tokens",), {"type": int, "metavar": "N", "help": "default 128"}),
    (("--temperature",), {"type": float, "metavar": "T", "help": "0, the default, is greedy"}),
    (("--top-k",), {"type": int, "metavar": "K", "help": "sample from the K likeliest tokens; -1 or 0: all"}),
    (("--top-p",), {"type": float, "metavar": "P", "help": "sample from the likeliest that reach P"}),
    (("--min-p",), {"type": float, "metavar": "P", "help": "drop what is less likely than P times the likeliest"}),
    (("--repetition-penalty",), {"type": float, "metavar": "X", "help": "above 1: against what was there, default 1"}),
    (("--presence-penalty",), {"type": float, "metavar": "X", "help": "against what was answered, default 0"}),
    (("--frequency-penalty",), {"type": float, "metavar": "X", "help": "the same, each time anew, default 0"}),
    (("--logit-bias",), {"action": "append", "type": _bias, "metavar": "ID=VALUE",
                         "help": "added to the logit of a token; may be given again"}),
    (("--seed",), {"type": int, "metavar": "SEED", "help": "of the sampling; default: how many prompts came before"}),
    (("--stop",), {"action": "append", "metavar": "TEXT", "help": "an answer ends before it; may be given again"}),
    (("--stop-token-id",), {"dest": "stop_token_ids", "action": "append", "type": int, "metavar": "ID",
                            "help": "an answer ends with it; may be given again"}),
    (("--ignore-eos",), {"action": "store_true", "default": None, "help": "the end-of-sequence token ends nothing"}),
)
_SEVERAL: Final[tuple[_Argument, ...]] = (
    (("--n",), {"type": int, "metavar": "N", "help": "answers to each prompt of the file, default 1"}),
    (("--logprobs",), {"type": int, "metavar": "N",
                       "help": "log-probabilities in the answers of a file: of each token and of the N likeliest"}),
)
VERBS: Final[dict[str, tuple[Callable[[argparse.Namespace], None], tuple[_Argument, ...], str]]] = {
    "demo": (demo, (
        (("--out",), {"metavar": "DIR", "help": "keep everything in this new folder"}),
        (("--steps",), {"type": int, "default": 150, "metavar": "N", "help": "of training, default 150"}),
    ), "train a small model on Python's sources, export it, import it, generate: no network, no weights needed"),
    "convert": (convert, (
        (("source",), {"metavar": "HF_DIR|REPOSITORY",
                       "help": "config.json with safetensors or pytorch_model*.bin; or OWNER/NAME on the hub"}),
        (("out",), {"metavar": "OUT", "help": "the new native checkpoint"}),
        _KEEP,
        (("--revision",), {"metavar": "REV", "help": "branch, tag or commit of the repository"}),
    ), "convert a PyTorch checkpoint in the Hugging Face layout to a native one"),
    "export": (export, (
        (("native",), {"metavar": "NATIVE", "help": "a native checkpoint"}),
        (("out",), {"metavar": "OUT", "help": "the new folder in the Hugging Face layout"}),
        (("--max-shard-size",), {"metavar": "SIZE", "default": "5GB", "help": "of one file, default 5GB"}),
        _KEEP,
    ), "write a native checkpoint in the Hugging Face layout, for vLLM, SGLang, llama.cpp"),
    "verify": (verify, (
        (("native",), {"metavar": "NATIVE", "help": "a native checkpoint"}),
        (("hf",), {"metavar": "HF_DIR", "nargs": "?", "help": "compare every tensor with this folder's"}),
        (("--report",), {"metavar": "FILE", "help": "of the JSON report, default NATIVE.verify.json"}),
    ), "check every bit of a native checkpoint, alone or against a Hugging Face folder"),
    "generate": (generate, (
        *_MODEL,
        (("--prompt",), {"metavar": "TEXT", "help": "the text to continue; - or none: from stdin"}),
        (("--file",), {"metavar": "FILE.jsonl",
                       "help": "prompts, a line each: prompt, tokens or messages, id, and parameters by name"}),
        (("--out",), {"metavar": "FILE.jsonl", "help": "the new file of their answers; default: stdout"}),
        *_SAMPLING, *_SEVERAL,
    ), "continue a prompt, printed as it comes, or answer a file of them"),
    "chat": (chat, (
        *_MODEL,
        (("--system",), {"metavar": "TEXT", "help": "the system's message, before all others"}),
        *_SAMPLING,
    ), "talk to a chat model"),
    "tokenize": (tokenize, (
        (("sources",), {"metavar": "SOURCE", "nargs": "+",
                        "help": "text, jsonl(.gz, .zst), parquet, a folder, or python-stdlib"}),
        (("--tokenizer",), {"required": True, "metavar": "DIR", "help": "a folder with a tokenizer"}),
        (("--out",), {"required": True, "metavar": "OUT", "help": "the new folder of token shards"}),
        (("--split-special-tokens",), {"action": "store_true", "help": "encode strings of special tokens as text"}),
    ), "write texts as token shards, once"),
    "pretrain": (pretrain, (
        (("recipe",), {"metavar": "RECIPE",
                       "help": "tiny, bench, deepseek_moe_2b, deepseek_moe_16b, deepseek_moe_145b"}),
        (("flags",), {"nargs": argparse.REMAINDER, "metavar": "--FLAG VALUE",
                      "help": "any field of the recipe; `dsmoe pretrain RECIPE --help` lists them"}),
    ), "train a model from a recipe, or go on with it"),
    "finetune": (finetune, (
        (("checkpoint",), {"metavar": "CKPT", "help": "a native checkpoint"}),
        (("flags",), {"nargs": argparse.REMAINDER, "metavar": "--data FILE … [--recipe NAME] [--lora] [--show N]",
                      "help": "any field of the recipe; `dsmoe finetune CKPT --help` lists them"}),
    ), "train a model further on examples, all of it or by low-rank adapters"),
    "merge": (merge, (
        (("checkpoint",), {"metavar": "CKPT", "help": "a native checkpoint or a Hugging Face folder"}),
        (("adapter",), {"metavar": "ADAPTER", "help": "a folder with a LoRA adapter as the peft library stores it"}),
        (("out",), {"metavar": "OUT", "help": "the new folder"}),
        (("--layout",), {"metavar": "LAYOUT", "default": "native", "help": "native, the default, or hf"}),
        _DTYPE,
    ), "write a checkpoint with an adapter multiplied into its weights"),
    "info": (info, (
        (("model",), {"metavar": "PRESET|PATH", "help": "a preset's name, a config.json or a checkpoint"}),
    ), "print parameter counts, bytes and the layer plan of a model"),
}
# fmt: on
