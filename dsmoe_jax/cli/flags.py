"""Arguments of the verbs: `ARGUMENTS`, one tuple per verb.

Flags of `generate` and `chat` have the names of `Generator` and `SamplingParams` parameters; an absent flag keeps the
default there.
"""

import argparse
from typing import Any, Final

Argument = tuple[tuple[str, ...], dict[str, Any]]  # flags, options of `add_argument`


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE") from None


_DTYPES: Final = ("float32", "bfloat16", "float16")
_SPLIT: Final = "encode strings such as <|endoftext|> in {} as plain text, not as special tokens"

# fmt: off
_DTYPE: Final[Argument] = (("--dtype",), {"choices": _DTYPES, "help": "dtype of the weights; default: as stored"})
_CAST: Final[Argument] = (("--dtype",), {"choices": (*_DTYPES, "keep"), "default": "keep",
                                         "help": "cast the weights to this dtype; default: keep, as stored"})
MODEL: Final[tuple[Argument, ...]] = (
    (("path",), {"metavar": "PATH", "help": "native checkpoint or Hugging Face folder"}),
    (("--adapter",), {"metavar": "DIR", "help": "LoRA adapter in the format of peft"}),
    (("--quantize",), {"choices": ("int8", "int4", "nf4"),
                       "help": "quantize the weights while loading; default: no quantization"}),
    _DTYPE,
    (("--cache-dtype",), {"choices": (*_DTYPES, "int8"),
                          "help": "dtype of the KV cache; default: that of the weights"}),
    (("--max-batch-size",), {"type": int, "metavar": "N",
                             "help": "maximum outputs generated at once; default: 8 on CPU, 64 on GPU and TPU"}),
    (("--context-length",), {"type": int, "metavar": "N",
                             "help": "maximum tokens of prompt and output together; default: that of the model, "
                                     "at least 4096"}),
    (("--split-special-tokens",), {"action": "store_true", "default": None, "help": _SPLIT.format("prompts")}),
)
_SAMPLING: Final[tuple[Argument, ...]] = (
    (("--max-new-tokens", "--max-tokens"), {"type": int, "metavar": "N",
                                            "help": "maximum output length in tokens; default: 128"}),
    (("--temperature",), {"type": float, "metavar": "T", "help": "sampling temperature; default: 0, greedy decoding"}),
    (("--top-k",), {"type": int, "metavar": "K",
                    "help": "sample from the K most likely tokens; default: 0, which disables it"}),
    (("--top-p",), {"type": float, "metavar": "P",
                    "help": "sample from the smallest set of most likely tokens with total probability P in [0, 1]; "
                            "default: 1"}),
    (("--min-p",), {"type": float, "metavar": "P",
                    "help": "drop tokens less likely than P in [0, 1] times the most likely one; default: 0"}),
    (("--repetition-penalty",), {"type": float, "metavar": "X",
                                 "help": "multiplicative penalty on tokens already present; default: 1.0, which "
                                         "disables it"}),
    (("--presence-penalty",), {"type": float, "metavar": "X",
                               "help": "subtract X in [-2, 2] from the logit of tokens in the output; default: 0"}),
    (("--frequency-penalty",), {"type": float, "metavar": "X",
                                "help": "subtract X in [-2, 2] once per occurrence in the output; default: 0"}),
    (("--logit-bias",), {"action": "append", "type": _bias, "metavar": "ID=VALUE",
                         "help": "add VALUE in [-100, 100] to the logit of token ID; repeatable"}),
    (("--seed",), {"type": int, "metavar": "N", "help": "sampling seed; default: index of the prompt"}),
    (("--stop",), {"action": "append", "metavar": "TEXT", "help": "end the output before this string; repeatable"}),
    (("--stop-token-id",), {"dest": "stop_token_ids", "action": "append", "type": int, "metavar": "ID",
                            "help": "end the output after this token; repeatable"}),
    (("--ignore-eos",), {"action": "store_true", "default": None,
                         "help": "continue past EOS tokens and the stop strings of the model"}),
)
SAMPLING: Final[tuple[Argument, ...]] = (
    *_SAMPLING,
    (("--n",), {"type": int, "metavar": "N", "help": "outputs per prompt of --file; default: 1"}),
    (("--logprobs",), {"type": int, "metavar": "N",
                       "help": "with --file: log-probabilities of every token and of the N most likely ones"}),
)
ARGUMENTS: Final[dict[str, tuple[Argument, ...]]] = {
    "demo": (
        (("--out",), {"metavar": "DIR", "help": "keep checkpoints and plot in this new folder; default: discard them"}),
        (("--steps",), {"type": int, "default": 150, "metavar": "N", "help": "training steps; default: 150"}),
    ),
    "convert": (
        (("source",), {"metavar": "HF_DIR|REPOSITORY",
                       "help": "folder with config.json and safetensors or pytorch_model*.bin files, or OWNER/NAME on "
                               "the Hugging Face Hub"}),
        (("out",), {"metavar": "OUT", "help": "native checkpoint to create"}),
        _CAST,
        (("--revision",), {"metavar": "REV", "help": "branch, tag or commit of the repository; default: main"}),
    ),
    "export": (
        (("native",), {"metavar": "NATIVE", "help": "native checkpoint"}),
        (("out",), {"metavar": "OUT", "help": "Hugging Face folder to create"}),
        (("--max-shard-size",), {"metavar": "SIZE", "default": "5GB", "help": "maximum size of a file; default: 5GB"}),
        _CAST,
    ),
    "verify": (
        (("native",), {"metavar": "NATIVE", "help": "native checkpoint"}),
        (("hf",), {"metavar": "HF_DIR", "nargs": "?", "help": "Hugging Face folder to compare every tensor with"}),
        (("--report",), {"metavar": "FILE", "help": "JSON report to write; default: NATIVE.verify.json"}),
    ),
    "generate": (
        *MODEL,
        (("--prompt",), {"metavar": "TEXT", "help": "text to continue; default or -: read from stdin"}),
        (("--file",), {"metavar": "FILE.jsonl",
                       "help": "prompts, a JSON object per line: prompt, token_ids or messages; optional id and "
                               "sampling parameters"}),
        (("--out",), {"metavar": "FILE.jsonl", "help": "with --file: file of outputs to create; default: stdout"}),
        *SAMPLING,
    ),
    "chat": (
        *MODEL,
        (("--system",), {"metavar": "TEXT", "help": "system message; default: none"}),
        *_SAMPLING,
    ),
    "tokenize": (
        (("sources",), {"metavar": "SOURCE", "nargs": "+",
                        "help": "text, jsonl(.gz, .zst), parquet, a folder, or python-stdlib"}),
        (("--tokenizer",), {"required": True, "metavar": "DIR", "help": "folder with a tokenizer"}),
        (("--out",), {"required": True, "metavar": "OUT", "help": "folder of token shards to create"}),
        (("--split-special-tokens",), {"action": "store_true", "help": _SPLIT.format("documents")}),
    ),
    "pretrain": (
        (("recipe",), {"metavar": "RECIPE",
                       "help": "tiny, bench, deepseek_moe_2b, deepseek_moe_16b or deepseek_moe_145b"}),
        (("flags",), {"nargs": argparse.REMAINDER, "metavar": "--FLAG VALUE",
                      "help": "fields of the config; `dsmoe pretrain RECIPE --help` lists them"}),
    ),
    "finetune": (
        (("checkpoint",), {"metavar": "CKPT", "help": "native checkpoint"}),
        (("flags",), {"nargs": argparse.REMAINDER, "metavar": "--data FILE … [--recipe NAME] [--lora] [--show N]",
                      "help": "fields of the config; `dsmoe finetune CKPT --help` lists them"}),
    ),
    "merge": (
        (("checkpoint",), {"metavar": "CKPT", "help": "native checkpoint or Hugging Face folder"}),
        (("adapter",), {"metavar": "ADAPTER", "help": "LoRA adapter in the format of peft"}),
        (("out",), {"metavar": "OUT", "help": "checkpoint to create"}),
        (("--layout",), {"choices": ("native", "hf"), "default": "native",
                         "help": "format of the output; default: native"}),
        _DTYPE,
    ),
    "info": (
        (("model",), {"metavar": "PRESET|PATH", "help": "preset, config.json or checkpoint"}),
    ),
}
# fmt: on
