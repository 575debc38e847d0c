"""Arguments of the verbs: `ARGUMENTS`. `generate` and `chat` name flags after parameters, which set the defaults.

`pretrain` and `finetune` are not here: tyro makes their flags from configs (`train.flags`), whose modules import jax.
"""

import argparse
from collections.abc import Sequence
from typing import Any, Final

from dsmoe_jax.errors import DSMoEError, check_choice

AXES: Final = ("data", "fsdp", "expert", "tensor")  # of `MeshConfig`
Argument = tuple[tuple[str, ...], dict[str, Any]]  # flags, options of `add_argument`


def _arg(flags: str, text: str, metavar: str | None = None, **options: Any) -> Argument:
    return tuple(flags.split()), {"help": text, **({"metavar": metavar} if metavar else {}), **options}


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE") from None


def mesh_flags(argv: Sequence[str]) -> list[str]:
    """Spell `--mesh fsdp=4,expert=2` as `--mesh.fsdp 4 --mesh.expert 2`."""
    flags, rest = [], iter(argv)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if name != "--mesh":
            flags.append(flag)
            continue
        text = value if equals else next(rest, "")
        for part in text.split(","):
            axis, equals, size = part.partition("=")
            if not equals:
                raise DSMoEError(f"--mesh must be AXIS=N,…, got {text!r}")
            check_choice("--mesh axis", axis, AXES)
            flags += [f"--mesh.{axis}", size]
    return flags


def _mesh(**defaults: int) -> tuple[Argument, ...]:
    """Return a flag for each axis; the default is None unless given, for no mesh at all."""
    others = {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}  # of `MeshConfig`
    return tuple(
        _arg(
            f"--mesh.{axis}",
            f"devices of the {axis} axis, -1 for all others; default: {defaults.get(axis, others[axis])}",
            default=defaults.get(axis),
            dest=f"mesh_{axis}",
            **_INT,
        )
        for axis in AXES
    )


def _ints(text: str) -> list[int]:
    try:
        return [int(value) for value in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,…") from None


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _int_or_float(text: str) -> float:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_DTYPES: Final = ("float32", "bfloat16", "float16")
_SPLIT: Final = "encode strings such as <|endoftext|> in {} as plain text, not as special tokens"
_DTYPE: Final = _arg("--dtype", "dtype of the weights; default: as stored", choices=_DTYPES)
_KEEP: Final = {"choices": (*_DTYPES, "keep"), "default": "keep"}
_CAST: Final = _arg("--dtype", "cast the weights to this dtype; default: keep, as stored", **_KEEP)
_CKPT: Final = "CKPT|HUB_ID"
_CHECKPOINT: Final = "native checkpoint, Hugging Face folder or hub id (OWNER/NAME)"
_REVISION: Final = _arg("--revision", "branch, tag or commit of a hub id; default: main", "REV")
_ADAPTER: Final = "LoRA adapter in the format of peft"
_CONTEXT: Final = "maximum tokens of prompt and output together; default: that of the model, at least 4096"
_SOURCE: Final = "folder with config.json and safetensors or pytorch_model*.bin files, or OWNER/NAME on the Hub"
_FILE: Final = (
    "prompts, a JSON object per line: prompt, token_ids or messages; optional id and sampling parameters; -: stdin"
)
_BIAS: Final = "add VALUE in [-100, 100] to the logit of token ID; repeatable"
_TEXTS: Final = "text, jsonl(.gz, .zst), parquet, arrow, folder, pattern, hf://datasets/OWNER/NAME, URL, python-stdlib"
_WHERE: Final = "keep records whose field NAME has one of the values, for example language=en; repeatable"
_WORKERS: Final = "processes that encode; default: one per core, 0 (none) for less than 32 MB of sources"
_EVALUATION: Final = (
    "results of `dsmoe evaluate` for the model card; default: scores beside CKPT, if they are of this checkpoint"
)
_FORMAT: Final = "hf: for vLLM, SGLang, transformers; gguf: for llama.cpp; default: gguf if OUT is *.gguf, else hf"
_GGUF_DTYPE: Final = {"choices": (*_DTYPES, "q8_0", "keep"), "default": "keep"}
_MODELING: Final = (
    "with hf: add PyTorch code, so that AutoModelForCausalLM opens the folder with trust_remote_code=True"
)
_STOP_ID: Final = "end the output after this token; repeatable"
_PLOT: Final = "image to write, .png, .pdf or .svg; default: RUN/plot.png, for several runs plot.png"
_INT: Final = {"type": int, "metavar": "N"}
_FLOAT: Final = {"type": float, "metavar": "X"}
_OPTIONAL: Final = {"action": "store_true", "default": None}

_LOADING: Final = (
    _REVISION,
    _arg("--adapter", _ADAPTER, "DIR"),
    _arg("--quantize", "quantize the weights while loading; default: none", choices=("int8", "int4", "nf4")),
    _DTYPE,
    _arg("--force", "load a model that exceeds the planned memory; default: refuse it", **_OPTIONAL),
)
MODEL: Final = (
    _arg("path", _CHECKPOINT, _CKPT),
    *_LOADING,
    _arg("--cache-dtype", "dtype of the KV cache; default: that of the weights", choices=(*_DTYPES, "int8")),
    _arg("--max-batch-size", "maximum outputs generated at once; default: 8 on CPU, 64 on GPU and TPU", **_INT),
    _arg("--context-length", _CONTEXT, **_INT),
    _arg("--split-special-tokens", _SPLIT.format("prompts"), **_OPTIONAL),
)
MESH: Final = _mesh()
_SAMPLING: Final = (
    _arg("--max-new-tokens", "maximum output length in tokens; default: 128", **_INT),
    _arg("--max-tokens", "alias of --max-new-tokens; default: 128", **_INT),
    _arg("--temperature", "sampling temperature; default: 0, greedy decoding", **_FLOAT),
    _arg("--top-k", "sample from the N most likely tokens; default: 0, which disables it", **_INT),
    _arg("--top-p", "sample from the smallest set with total probability X in [0, 1]; default: 1", **_FLOAT),
    _arg("--min-p", "drop tokens less likely than X in [0, 1] times the most likely one; default: 0", **_FLOAT),
    _arg(
        "--repetition-penalty",
        "multiplicative penalty on tokens already present; default: 1, which disables it",
        **_FLOAT,
    ),
    _arg("--presence-penalty", "subtract X in [-2, 2] from the logit of tokens in the output; default: 0", **_FLOAT),
    _arg("--frequency-penalty", "subtract X in [-2, 2] once per occurrence in the output; default: 0", **_FLOAT),
    _arg("--logit-bias", _BIAS, "ID=VALUE", type=_bias, action="append"),
    _arg("--seed", "seed of sampling, in [0, 2**32); default: the index of the prompt or chat turn, from 0", **_INT),
    _arg("--stop", "end the output before this string; repeatable", "TEXT", action="append"),
    _arg("--stop-token-id", _STOP_ID, "ID", type=int, dest="stop_token_ids", action="append"),
    _arg("--ignore-eos", "continue past EOS tokens and the stop strings of the model", **_OPTIONAL),
)
SAMPLING: Final = (
    *_SAMPLING,
    _arg("--n", "with --file: outputs per prompt; default: 1", **_INT),
    _arg(
        "--logprobs", "with --file: log-probabilities of every token and the N most likely ones; default: none", **_INT
    ),
)
_SERVED: Final = tuple(
    _arg(
        "--adapter", f"{_ADAPTER}, one a server, with the name of the model; default: none", "NAME=DIR", action="append"
    )
    if "--adapter" in flags
    else (flags, options)
    for flags, options in MODEL
)
SERVE: Final = (
    _arg("--host", "address to bind to; default: 127.0.0.1, this machine only", "HOST"),
    _arg("--port", "port to bind to; 0: a free one; default: 8000", **_INT),
    _arg("--api-key", "key that requests must send as a bearer token; default: $DSMOE_API_KEY, or none", "KEY"),
    _arg("--served-model-name", "name of the model in requests; default: NAME of --adapter, or of CKPT", "NAME"),
    _arg(
        "--allow-origin",
        "web origin whose pages may call the server, such as https://example.com, or *; repeatable",
        "URL",
        action="append",
    ),
    _arg("--max-queue", "outputs that may wait for a row of the batch, others get status 429; default: 1024", **_INT),
    _arg("--max-body-bytes", "maximum size of a request body; default: 4194304", **_INT),
    _arg("--request-timeout", "seconds until a request is canceled; default: 600", **_FLOAT),
    _arg("--idle-timeout", "seconds until a connection without a complete request is closed; default: 60", **_FLOAT),
    _arg("--drain-timeout", "seconds that requests in flight may take after SIGTERM; default: 120", **_FLOAT),
    _arg(
        "--parse-special-tokens",
        "encode strings such as <|endoftext|> in chat messages as special tokens; default: as plain text",
        **_OPTIONAL,
    ),
)
EVALUATE: Final = (
    _arg("model", _CHECKPOINT, _CKPT, nargs="?"),
    _arg(
        "--suite --tasks",
        "base, chat, leaderboard, or tasks of lm-evaluation-harness separated by commas; default: base",
        "NAME",
    ),
    _arg(
        "--out --output-dir",
        "folder of the report, which an interrupted evaluation resumes from; no default: required unless --list-…",
        "DIR",
    ),
    *_LOADING,
    *MESH,
    _arg("--batch-size", "sequences scored and outputs generated at once; default: as generate", **_INT),
    _arg("--limit", "documents of each task, or their fraction if less than 1; default: all", "N", type=_int_or_float),
    _arg("--max-gen-toks", "maximum output length of tasks that state none; default: 256, or half the window", **_INT),
    _arg("--num-fewshot", "examples in the context of each task; default: those of the suite or the task", **_INT),
    _arg("--seed", "seed of the examples, and of tasks that sample; default: 1234", **_INT),
    _arg("--data", "folder with local datasets: OWNER/NAME or TASK/SPLIT.jsonl; default: the Hub", "DIR"),
    _arg("--include-path", "folder with further task files; repeatable", "DIR", action="append"),
    _arg("--apply-chat-template", "render prompts as chats; default: plain text, for the suite chat, too", **_OPTIONAL),
    _arg("--confirm-run-unsafe-code", "allow HumanEval and MBPP to run generated code on this machine", **_OPTIONAL),
    _arg("--list-data", "print the commands that download the datasets of the suite, and exit", action="store_true"),
    _arg(
        "--list-tasks",
        "print the commands of lm_eval that evaluate CKPT, a PyTorch model, on the same tasks, and exit",
        action="store_true",
    ),
)
_DEVICE: Final = (
    "h100, h200, a100_80gb, a100_40gb, l40s, b200 or cpu; the flags below replace its figures; default: h100"
)
PLAN: Final = (
    _arg("--devices", "number of devices; default: 1", type=int, default=1, metavar="N"),
    _arg("--device", _DEVICE, "CARD", default="h100"),
    _arg("--device-memory", "memory of a device in GB; default: that of the card", **_FLOAT),
    _arg("--device-tflops", "dense bf16 TFLOP/s of a device; default: those of the card", **_FLOAT),
    _arg("--device-bandwidth", "memory bandwidth of a device in GB/s; default: that of the card", **_FLOAT),
    _arg("--link-bandwidth", "bandwidth within a node in GB/s and direction; default: NVLink of the card", **_FLOAT),
    _arg("--network-bandwidth", "bandwidth between nodes in GB/s per device; default: one adapter per GPU", **_FLOAT),
    _arg(
        "--search",
        "rank meshes, micro-batches and remat policies that fit, instead of those of --mesh, "
        "--step.gradient-accumulation-steps and --step.remat; default: plan one",
        action="store_true",
    ),
    _arg(
        "--compile",
        "also compile the step, with --search the fastest, for simulated devices or (extra gpu) GPUs that are absent; "
        "default: arithmetic only",
        action="store_true",
    ),
)
GENERATION_PLAN: Final = (
    _arg("path", f"preset, config.json, or {_CHECKPOINT}, of which only the config is read", f"PRESET|{_CKPT}"),
    _REVISION,
    *_mesh(data=1, fsdp=1, expert=-1, tensor=1),
    _arg("--quantize", "quantization of the weights; default: none", choices=("int8", "int4", "nf4")),
    _arg("--dtype", "dtype of the weights; default: bfloat16", choices=_DTYPES, default="bfloat16"),
    _arg("--cache-dtype", "dtype of the KV cache; default: that of the weights", choices=(*_DTYPES, "int8")),
    _arg("--max-batch-size", "outputs generated at once; default: 64", default=64, **_INT),
    _arg("--context-length", "tokens of prompt and output together; default: 4096", default=4096, **_INT),
)
_INSPECTION: Final = (
    _arg("model", _CHECKPOINT, _CKPT),
    *_LOADING,
    *MESH,
    _arg(
        "--data",
        "texts or token shards; for routes each is a domain; no default: required",
        "SOURCE",
        nargs="+",
        required=True,
    ),
    _arg("--max-tokens", "tokens of each source; default: 65536", default=65_536, **_INT),
    _arg("--sequence-length", "tokens read at once; default: the trained context length", **_INT),
    _arg("--out --output-dir", "folder for the figures, as JSON and PNG; default: print a table only", "DIR"),
)
# By title: the text below it, and its arguments; in the help of verbs that have the first of them.
GROUPS: Final[dict[str, tuple[str, tuple[Argument, ...]]]] = {
    "model options": ("What is loaded, and the memory that generation may use.", MODEL),
    "mesh options": ("The devices; one without these flags. --mesh fsdp=4,expert=2 sets several axes.", MESH),
    "sampling options": ("How the next token is chosen, and when an output ends.", SAMPLING),
}
ARGUMENTS: Final[dict[str, tuple[Argument, ...]]] = {
    "demo": (
        _arg("--out --output-dir", "keep checkpoints and plot in this new folder; default: discard them", "DIR"),
        _arg("--steps", "training steps; default: 1000", default=1000, **_INT),
    ),
    "convert": (
        _arg("source", _SOURCE, "HF_DIR|HUB_ID"),
        _arg("out", "native checkpoint to create", "OUT"),
        _CAST,
        _REVISION,
    ),
    "export": (
        _arg("source", _CHECKPOINT, _CKPT),
        _arg("out", "Hugging Face folder or GGUF file to create", "OUT"),
        _REVISION,
        _arg("--format", _FORMAT, choices=("hf", "gguf")),
        _arg("--dtype", "cast the weights to this dtype; q8_0: gguf only; default: keep, as stored", **_GGUF_DTYPE),
        _arg("--max-shard-size", "with hf: maximum size of a file; default: 5GB", "SIZE"),
        _arg("--with-modeling", _MODELING, **_OPTIONAL),
    ),
    "push": (
        _arg("checkpoint", _CHECKPOINT, _CKPT),
        _arg("repo_id", "repository to create or update, OWNER/NAME", "HUB_ID"),
        _arg("--private", "create a private repository; an existing public one is refused", **_OPTIONAL),
        _arg("--revision", "branch to upload to, created if missing; default: main", "BRANCH"),
        _DTYPE,
        _arg("--license", "license stated in the model card, such as mit; default: none", "NAME"),
        _arg(
            "--base-model",
            "hub id of the base model in the model card; default: the repository it was converted from, if any",
            "HUB_ID",
        ),
        _arg("--evaluation", _EVALUATION, "DIR"),
        _arg("--dry-run", "write the files to this new folder instead of uploading them; default: upload", "DIR"),
    ),
    "verify": (
        _arg("source", _CHECKPOINT, _CKPT),
        _arg("other", f"compare every tensor with this one: {_CHECKPOINT}", _CKPT, nargs="?"),
        _REVISION,
        _arg("--report", "JSON report to write; default: CKPT.verify.json", "FILE"),
    ),
    "generate": (
        *MODEL,
        *MESH,
        _arg("--prompt", "text to continue; default or -: read from stdin", "TEXT"),
        _arg("--chat", "make the prompt one user message of a chat; print the reply only", action="store_true"),
        _arg("--tokens", "token ids to continue, separated by spaces or commas; default: a prompt of text", "IDS"),
        _arg("--file", _FILE, "FILE.jsonl"),
        _arg("--out", "with --file: file of outputs to create; default: stdout", "FILE.jsonl"),
        *SAMPLING,
    ),
    "chat": (*MODEL, *MESH, _arg("--system", "system message; default: none", "TEXT"), *_SAMPLING),
    "serve": (*_SERVED, *SERVE),
    "evaluate": EVALUATE,
    "ablate": (
        *_INSPECTION,
        _arg(
            "--disable-top",
            "disable the N routed experts of the highest scores of each token; separated by commas: one measurement "
            "each; default: without any ablation flag, those of the paper",
            "N,…",
            type=_ints,
        ),
        _arg(
            "--active",
            "routed experts per token; separated by commas: one measurement each; default: as for --disable-top",
            "N,…",
            type=_ints,
        ),
        _arg(
            "--no-shared",
            "disable the shared experts and activate one more routed one: a measurement of its own",
            action="store_true",
        ),
        _arg(
            "--disable-experts",
            "disable these routed experts in all layers, or by layer: '1:3,5 2:0'; repeatable: one measurement each",
            "IDS",
            action="append",
        ),
    ),
    "routes": _INSPECTION,
    "reproduce": (
        _arg(
            "--out --output-dir",
            "folder of the experiment, which a killed one resumes from; no default: required",
            "DIR",
        ),
        _arg("--scale", "sizes of the models and runs; default: laptop", choices=("ci", "laptop", "2b")),
        _arg(
            "--variants",
            "variants separated by commas, or all; default: those of the paper's table 1, and gshard_x1.5",
            "NAME,…",
        ),
        _arg("--seeds", "runs of each variant, paired by seed; default: 3", **_INT),
        _arg("--data", "texts, or one folder of token shards; default: python-stdlib", "SOURCE", nargs="+"),
        _arg("--steps", "steps of each run; default: those of the scale", **_INT),
        _arg("--workers", "runs at once; default: one per GPU or, without GPUs, per core", **_INT),
        _arg("--ablation-tokens", "validation tokens of the ablations; default: 65536", **_INT),
        _arg("--report-only", "write the report of the complete runs and run nothing", **_OPTIONAL),
        _arg("--plan", "print memory and hours of a run of each variant on GPUs, and exit", action="store_true"),
        _arg("--devices", "with --plan: devices of a run; default: 8 with --scale 2b, or 1", **_INT),
        _arg("--device", "with --plan: card, as for plan; default: h100", "CARD"),
    ),
    "tokenize": (
        _arg("sources", _TEXTS, "SOURCE", nargs="*"),
        _arg("--tokenizer", "folder with a tokenizer; no default", "DIR"),
        _arg("--out --output-dir", "folder of token shards to create; no default", "OUT"),
        _arg(
            "--validation",
            "texts of the validation split; default: --val-fraction of the documents",
            "SOURCE",
            nargs="+",
            default=[],
        ),
        _arg(
            "--val-fraction", "fraction of the documents held out for validation; default: 0.01", default=0.01, **_FLOAT
        ),
        _arg("--split-special-tokens", _SPLIT.format("documents"), action="store_true"),
        _arg("--text-column", "column or JSON field of the text; default: text", "NAME", default="text"),
        _arg("--where", _WHERE, "NAME=VALUE,…", action="append", type=_assignment, default=[]),
        _arg("--min-chars", "skip texts with fewer characters; default: 0", default=0, **_INT),
        _arg("--deduplicate", "keep the first of equal texts only", action="store_true"),
        _arg("--workers", _WORKERS, **_INT),
        _arg("--task", "tokenize share I of N, from 0; default: everything", "I", type=int),
        _arg("--tasks", "with --task: number of shares, for any machines that see SOURCE and OUT; default: 1", **_INT),
        _arg("--merge", "join the shares of all tasks into OUT, without other arguments; default: do not", "OUT"),
    ),
    "plot": (
        _arg("runs", "output directories of runs", "RUN", nargs="+"),
        _arg("--out", _PLOT, "FILE"),
        _arg("--by", "horizontal axis of the plot; default: step", choices=("step", "tokens"), default="step"),
    ),
    "merge": (
        _arg("checkpoint", _CHECKPOINT, _CKPT),
        _arg("adapter", _ADAPTER, "DIR"),
        _arg("out", "checkpoint to create", "OUT"),
        _REVISION,
        _arg("--layout", "format of the output; default: native", choices=("native", "hf"), default="native"),
        _arg("--dtype", "dtype of the merged weights; default: that of the checkpoint", choices=_DTYPES),
    ),
    "info": (
        _arg(
            "model",
            f"preset, config.json, or {_CHECKPOINT}, of which only the config is read",
            f"PRESET|CONFIG.json|{_CKPT}",
        ),
        _REVISION,
    ),
}
