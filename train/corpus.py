"""The data of a run: token shards, and batches of them. Start at `prepare`."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax

from dsmoe_jax.checkpoint.native import collective_errors
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.text.train_tokenizer import train_tokenizer

from .batch import Batch
from .config import DataConfig, RunConfig
from .data import (
    Stream,
    TokenShards,
    documents,
    is_token_shards,
    is_validation,
    loader,
    tokenize,
    tokenizer_hash,
    validation_batches,
    warn_on_overlap,
)
from .data.shards import SPLITS
from .distributed import on_process_0
from .inputs import DerivedFolders, Source
from .sft import is_examples

_SHARDS: Final = "data"  # in the output directory: token shards of the texts
_TOKENIZER: Final = "tokenizer"  # in the output directory: the tokenizer trained on them
_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """The data of a run."""

    stream: Stream
    validation: Callable[..., Iterator[Batch]]  # a function of `process_index` and `process_count`
    tokenizer: Path | None  # folder; None if there are only token shards
    prefetch: int
    eval_batches: int  # per evaluation
    inputs: Mapping[str, Any]  # JSON: hashes of `files` and `validation`, and the `options` of the datasets
    eos_token_id: int | None = None  # of the token shards

    def batches(self, step: int) -> Iterator[Batch]:
        """Iterate endlessly over this process's part of the batches, starting at `step`."""
        return loader(self.stream, start_step=step, prefetch=self.prefetch, **_share())

    def validation_batches(self) -> Iterator[Batch]:
        """Iterate over this process's part of the first validation batches."""
        return itertools.islice(self.validation(**_share()), self.eval_batches)


def prepare(config: RunConfig, model_config: ModelConfig, out: Path, *, resuming: bool = False) -> Corpus:
    """Open the token shards of every source, after training a tokenizer (if none is set) and tokenizing the texts.

    Texts are tokenized again when they change, except if `resuming`: the checkpoints were trained on the old ones.
    """
    data = config.data
    if data.weights and len(data.sources) == 1:
        _log.warning("data.weights %s has no effect with one source", data.weights)
    tokenizer = _tokenizer(config)
    folders = []
    with collective_errors():
        if examples := next((source for source in data.sources if is_examples(source)), None):
            raise DSMoEError(f"{examples}: holds examples for `dsmoe finetune`; pretraining ignores loss masks")
        if tokenizer is not None and not tokenizer_files(tokenizer):
            raise DSMoEError(f"{tokenizer}: no tokenizer found")
        folders = [Path(s) if is_token_shards(s) else out / _SHARDS / f"{i:02}" for i, s in enumerate(data.sources)]
    texts = {folder: source for source, folder in zip(data.sources, folders, strict=True) if folder != Path(source)}
    on_process_0(_derive, config, model_config, out, texts, tokenizer, resuming)
    shards, validation = [], []
    with collective_errors():
        shards, validation = ([TokenShards.open(folder, split) for folder in folders] for split in SPLITS)
        if tokenizer is None:
            trained = out / _TOKENIZER
            if tokenizer_files(trained) and tokenizer_hash(trained) == shards[0].tokenizer_hash:
                tokenizer = trained
        expected = None if tokenizer is None else tokenizer_hash(tokenizer)
        for dataset in shards:
            dataset.check(tokenizer_hash=expected, vocab_size=model_config.vocab_size)
        _check_val_fraction(data, shards, texts, validation)
    shape: dict[str, Any] = {name: getattr(data, name) for name in ("sequence_length", "batch_size", "packing")}
    stream = Stream(shards, data.weights, seed=config.seed, **shape)
    batches = functools.partial(validation_batches, validation, **shape)
    files = {source: dataset.digest for source, dataset in zip(data.sources, shards, strict=True)}
    inputs = {"files": files, "options": {}, "validation": [dataset.digest for dataset in validation]}
    eos = shards[0].eos_token_id
    return Corpus(stream, batches, tokenizer, data.prefetch, config.eval_batches, inputs, eos)


def _derive(
    config: RunConfig,
    model_config: ModelConfig,
    out: Path,
    texts: Mapping[Path, str],
    tokenizer: Path | None,
    resuming: bool,
) -> None:
    """Tokenize the texts, if any, and train the tokenizer if none is set."""
    if not texts:
        return
    derived = DerivedFolders(out, resuming=resuming)
    val_fraction, split = config.data.val_fraction, config.data.split_special_tokens
    warn_on_overlap(list(texts.values()), [out])
    sources = {folder: Source.read(text, out) for folder, text in texts.items()}

    def train(folder: Path) -> None:
        _log.info("Training a tokenizer: %d tokens, on %s", model_config.vocab_size, ", ".join(texts.values()))
        found = (document.text for text in texts.values() for document in documents(text, exclude=[out]))
        training = (text for text in found if not is_validation(text.encode(), val_fraction))
        train_tokenizer(training, folder, model_config.vocab_size)

    if tokenizer is None:
        options = {"vocab_size": model_config.vocab_size, "data.val_fraction": val_fraction}
        derived.make(_TOKENIZER, list(sources.values()), options, train, tokenizer_hash)
        tokenizer = out / _TOKENIZER
    options = {"data.val_fraction": val_fraction, "tokenizer": tokenizer_hash(tokenizer)}
    options |= {"data.split_special_tokens": True} if split else {}
    for folder, source in sources.items():
        settings = {"val_fraction": val_fraction, "split_special_tokens": split, "exclude": [out]}
        write = functools.partial(_tokenize, source.name, tokenizer, **settings)
        derived.make(folder.relative_to(out).as_posix(), [source], options, write)


def _tokenize(source: str, tokenizer: Path, folder: Path, **options: Any) -> None:
    _log.info("Tokenized %s", tokenize(source, tokenizer, folder, **options))


def _check_val_fraction(
    data: DataConfig, shards: Sequence[TokenShards], texts: Mapping[Path, str], validation: Sequence[TokenShards]
) -> None:
    """Refuse a validation fraction other than that of existing token shards."""
    for dataset in shards:
        if data.val_fraction == DataConfig.val_fraction or dataset.val_fraction in (None, data.val_fraction):
            continue
        ignored = f"data.val_fraction {data.val_fraction} has no effect on {dataset.folder}"
        problem = f"{ignored}, tokenized with {dataset.val_fraction}"
        if not texts:
            raise DSMoEError(f"{problem}; omit it or tokenize the text again")
        _log.warning("%s", problem)
    if data.val_fraction and not sum(map(len, validation)):
        _log.warning("No validation documents: evaluation is skipped; increase data.val_fraction %s", data.val_fraction)


def _tokenizer(config: RunConfig) -> Path | None:
    """Return the folder of the configured tokenizer, or of the model's, if any."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    base = config.base_folder()
    return base if base is not None and tokenizer_files(base) else None


def _share() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
