"""Checks of a run's inputs, before anything is written or tokenized: `check_inputs`."""

import functools
import os
from pathlib import Path

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate import libraries as harness
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

from .config import RunConfig
from .corpus import check_tokenizer_of, tokenizer_of
from .data import TokenShards, documents, find_files
from .data.files import refuse_overlap, unlogged
from .data.megatron import is_megatron, is_tokenized, open_tokenized
from .data.sources import read_source
from .finetune import FinetuneConfig
from .sft import is_examples
from .sft.formats import parse_record
from .sft.templates import open_template
from .trackers import check_installed


def check_inputs(config: RunConfig) -> None:
    """Raise `DSMoEError` for missing, unreadable or unsuitable inputs; reads the first text or example of each source.

    Args:
        config: The config of the run.

    Raises:
        DSMoEError: A tracker's package, a source, the tokenizer, the template, the format or an adapter's module is
            missing or invalid, a file is in the training and in the validation data, or the tokenizer has more tokens
            than the model.
    """
    check_installed(config.trackers)
    if config.eval_tasks:
        harness.check_installed()
    model, out = config.model_config(), Path(config.output_dir)
    tokenizer = tokenizer_of(config)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, model)
    if isinstance(config, FinetuneConfig):
        _check_examples(config, model, tokenizer, out)
    else:
        _check_sources(config, model, tokenizer, out)


def _check_tokenizer(folder: Path, model: ModelConfig) -> None:
    if not folder.is_dir():
        raise DSMoEError(f"data.tokenizer {folder} does not exist")
    if not tokenizer_files(folder):
        raise DSMoEError(f"data.tokenizer {folder} has no tokenizer.json and no tokenizer.model")
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise DSMoEError(f"{folder}: the tokenizer has no EOS token")
    if tokenizer.vocab_size > model.vocab_size:
        least = f"the model's vocab_size must be at least {tokenizer.vocab_size}"
        raise DSMoEError(f"{folder}: {least}, got {model.vocab_size}")


def _check_sources(config: RunConfig, model: ModelConfig, tokenizer: Path | None, out: Path) -> None:
    data = config.data
    shards = [source for source in (*data.sources, *data.validation) if is_tokenized(source)]
    texts, validation = ([s for s in some if s not in shards] for some in (data.sources, data.validation))
    if examples := next(filter(is_examples, shards), None):
        raise DSMoEError(f"{examples}: holds examples for `dsmoe finetune`; pretraining ignores loss masks")
    if tokenizer is None and texts and config.init_from is not None:
        raise DSMoEError(f"{config.init_from} has no tokenizer: pass --data.tokenizer FOLDER")
    check_tokenizer_of(data, tokenizer)
    for source in shards:
        if is_megatron(source):
            open_tokenized(source, 0.0, model.vocab_size)
        else:
            TokenShards.open(source, verify=False).check(vocab_size=model.vocab_size)
    for source in (*texts, *validation):
        _check_readable(source, out)
        with unlogged():
            next(documents(source, exclude=[out]))
    refuse_overlap(texts, validation, [out])


def _check_examples(config: FinetuneConfig, model: ModelConfig, tokenizer: Path | None, out: Path) -> None:
    data = config.data
    if not data.files:
        raise DSMoEError("data.files is empty: pass --data FILE")
    if tokenizer is None:
        raise DSMoEError(f"{config.init_from} has no tokenizer: pass --data.tokenizer FOLDER")
    open_template(data.template)
    if config.lora is not None:
        make_plan(config.lora, model)
    parse = functools.partial(parse_record, format=data.format)
    for source in (*data.files, *data.validation):
        _check_readable(source, out)
        with unlogged():
            next(read_source(source, parse=parse, max_malformed_fraction=0.01, exclude=[out]))
    refuse_overlap(data.files, data.validation, [out])


def _check_readable(source: str, out: Path) -> None:
    """Raise `DSMoEError` unless all files of the source may be read."""
    for file in find_files(source, [out]):
        if isinstance(file.path, Path) and not os.access(file.path, os.R_OK):
            raise DSMoEError(f"{file.path}: cannot be read: permission denied")
