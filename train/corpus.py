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
from dsmoe_jax.progress import plural
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.text.train_tokenizer import train_tokenizer

from .batch import Batch
from .config import DataConfig, RunConfig
from .data import (
    PYTHON_STDLIB,
    Stream,
    TokenShards,
    loader,
    shards_tokenizer,
    tokenize,
    tokenizer_hash,
    training_texts,
    unique_names,
    validation_batches,
    warn_on_overlap,
)
from .data.files import refuse_overlap, unlogged
from .data.megatron import is_megatron, is_tokenized, open_tokenized
from .distributed import on_process_0
from .inputs import WAY_OUT, DerivedFolders, Source

_SHARDS: Final = "data"  # in the output directory: token shards of the texts
_VALIDATION: Final = "validation"  # in the output directory: token shards of `data.validation`
_TOKENIZER: Final = "tokenizer"  # in the output directory: the tokenizer trained on them
VAL_FRACTION: Final = 0.01
STDLIB_VAL_FRACTION: Final = 0.05  # 0.01 selects two files
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
    validation_tokens: int = 0  # in all validation documents
    val_fraction: float | None = None  # if texts were split by it
    # Of several sources, by name: as `validation`.
    validation_by_source: Mapping[str, Callable[..., Iterator[Batch]]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the data that the config may leave open, resolved."""
        shape = {"sequence_length": self.stream.sequence_length, "batch_size": self.stream.batch_size}
        return shape if self.val_fraction is None else {**shape, "val_fraction": self.val_fraction}

    def batches(self, step: int) -> Iterator[Batch]:
        """Iterate endlessly over this process's part of the batches, starting at `step`."""
        return loader(self.stream, start_step=step, prefetch=self.prefetch, **_share())

    def validation_batches(self) -> Iterator[Batch]:
        """Iterate over this process's part of the first validation batches."""
        return itertools.islice(self.validation(**_share()), self.eval_batches)

    def batches_by_source(self) -> dict[str, Iterator[Batch]]:
        """Return iterators over the first validation batches of each source, together about `eval_batches`."""
        count = -(-self.eval_batches // max(len(self.validation_by_source), 1))
        found = self.validation_by_source.items()
        return {name: itertools.islice(batches(**_share()), count) for name, batches in found}


def prepare(config: RunConfig, model_config: ModelConfig, out: Path, *, resuming: bool = False) -> Corpus:
    """Open the token shards of every source, after training a tokenizer (if none is set) and tokenizing the texts.

    Texts are tokenized again when they change, except if `resuming`: the checkpoints were trained on the old ones.
    """
    data = config.data
    if data.weights and len(data.sources) == 1:
        _log.warning("data.weights %s has no effect with one source", data.weights)
    tokenizer = tokenizer_of(config)
    with collective_errors():  # process 0 has checked it
        if tokenizer is not None and not tokenizer_files(tokenizer):
            raise DSMoEError(f"{tokenizer}: no tokenizer found")
    derived = DerivedFolders(out, resuming=resuming)
    recorded = derived.option(_SHARDS, "data.val_fraction") if resuming else None
    val_fraction = _val_fraction(data, recorded)
    with collective_errors():
        if recorded and data.validation:
            change = f"--data.validation: none -> {', '.join(data.validation)}"
            raise DSMoEError(f"{out}: cannot resume on changed data: {change}; {WAY_OUT}")
    folders, own = _folders(data.sources, out / _SHARDS), _folders(data.validation, out / _VALIDATION)
    texts = _Texts(_texts_of(data.sources, folders), _texts_of(data.validation, own))
    on_process_0(_derive, derived, config, model_config, out, texts, tokenizer, val_fraction)
    shards: list[TokenShards] = []
    validation: list[TokenShards] = []
    with collective_errors():
        splits = [open_tokenized(folder, val_fraction, model_config.vocab_size) for folder in folders]
        shards = [train for train, _ in splits]
        validation = [split for _, split in splits]
        if tokenizer is None:
            trained = out / _TOKENIZER
            if tokenizer_files(trained) and tokenizer_hash(trained) == shards[0].tokenizer_hash:
                tokenizer = trained
        if own:
            opened = (open_tokenized(folder, 0.0, model_config.vocab_size) for folder in own)
            validation = [split for splits in opened for split in splits if len(split)]
        expected = None if tokenizer is None else tokenizer_hash(tokenizer)
        for dataset in (*shards, *validation):
            dataset.check(tokenizer_hash=expected, vocab_size=model_config.vocab_size)
        _check_validation(data, shards, validation, texts)
    shape: dict[str, Any] = {name: getattr(data, name) for name in ("sequence_length", "batch_size", "packing")}
    stream = Stream(shards, data.weights, seed=config.seed, names=[Path(name).name for name in data.sources], **shape)
    batches = functools.partial(validation_batches, validation, **shape)
    by_source = _by_source(data.validation or stream.names, validation, shape)
    files = {source: dataset.digest for source, dataset in zip(data.sources, shards, strict=True)}
    inputs = {"files": files, "options": {}, "validation": [dataset.digest for dataset in validation]}
    eos, applied = shards[0].eos_token_id, val_fraction if texts.sources and not own else None
    held_out = sum(dataset.tokens for dataset in validation)
    sizes = data.prefetch, config.eval_batches, inputs, eos, held_out, applied, by_source
    return Corpus(stream, batches, tokenizer, *sizes)


def _by_source(
    names: Sequence[str], validation: Sequence[TokenShards], shape: Mapping[str, Any]
) -> dict[str, Callable[..., Iterator[Batch]]]:
    """Return the validation batches of each source; nothing if there is one, or if a source has several splits."""
    if len(names) != len(validation) or sum(map(bool, map(len, validation))) < 2:
        return {}
    named = zip(unique_names([Path(name).name for name in names]), validation, strict=True)
    return {name: functools.partial(validation_batches, [split], **shape) for name, split in named if len(split)}


class _Texts(NamedTuple):
    """The texts to tokenize, by folder of their token shards."""

    sources: Mapping[Path, str]
    validation: Mapping[Path, str]


def _folders(sources: Sequence[str], out: Path) -> list[Path]:
    """Return the folder of token shards of each source, in `out` for texts."""
    return [Path(source) if is_tokenized(source) else out / f"{i:02}" for i, source in enumerate(sources)]


def _texts_of(sources: Sequence[str], folders: Sequence[Path]) -> dict[Path, str]:
    return {folder: source for source, folder in zip(sources, folders, strict=True) if folder != Path(source)}


def _val_fraction(data: DataConfig, recorded: float | None) -> float:
    """Return the fraction of the documents to hold out; by default that of the run so far."""
    if data.validation:
        if data.val_fraction and data.val_fraction != recorded:
            _log.info("data.val_fraction %s is not applied: data.validation is set", data.val_fraction)
        return 0.0
    default = STDLIB_VAL_FRACTION if PYTHON_STDLIB in data.sources else VAL_FRACTION
    return next(value for value in (data.val_fraction, recorded, default) if value is not None)


def _derive(
    derived: DerivedFolders,
    config: RunConfig,
    model_config: ModelConfig,
    out: Path,
    texts: _Texts,
    tokenizer: Path | None,
    val_fraction: float,
) -> None:
    """Tokenize the texts, if any, and train the tokenizer if none is set."""
    split = config.data.split_special_tokens
    refuse_overlap(list(texts.sources.values()), list(texts.validation.values()), [out])
    warn_on_overlap(list(texts.sources.values()), [out])
    sources, validation = ({folder: Source.read(s, out) for folder, s in one.items()} for one in texts)

    def train(folder: Path) -> None:
        names = list(texts.sources.values())
        _log.info("Training a tokenizer: %s tokens, on %s", f"{model_config.vocab_size:,}", ", ".join(names))
        with unlogged():
            found = itertools.chain.from_iterable(training_texts([name], val_fraction, exclude=[out]) for name in names)
            train_tokenizer(found, folder, model_config.vocab_size)

    check_tokenizer_of(config.data, tokenizer)
    if sources and tokenizer is None:
        options = {"vocab_size": model_config.vocab_size, "data.val_fraction": val_fraction}
        derived.make(_TOKENIZER, list(sources.values()), options, train, tokenizer_hash)
        tokenizer = out / _TOKENIZER
    for fraction, field, some in ((val_fraction, "sources", sources), (0.0, "validation", validation)):
        for folder, source in some.items():
            if tokenizer is None:
                raise DSMoEError(f"data.tokenizer must be set to tokenize {source.name}: the sources are token shards")
            options = {"data.val_fraction": fraction, "tokenizer": tokenizer_hash(tokenizer)}
            options |= {"data.split_special_tokens": True} if split else {}
            settings = {"val_fraction": fraction, "split_special_tokens": split, "exclude": [out]}
            write = functools.partial(_tokenize, source.name, tokenizer, field, **settings)
            derived.make(folder.relative_to(out).as_posix(), [source], options, write, field=f"data.{field}")


def check_tokenizer_of(data: DataConfig, tokenizer: Path | None) -> None:
    """Raise `DSMoEError` if texts need a tokenizer that Megatron's files cannot name."""
    sources = (*data.sources, *data.validation)
    known = next(filter(is_megatron, sources), None)
    if tokenizer is None and known is not None and not all(map(is_tokenized, sources)):
        raise DSMoEError(f"data.tokenizer must be set, to the tokenizer of {known}")


def _tokenize(source: str, tokenizer: Path, split: str, folder: Path, **options: Any) -> None:
    stats = tokenize(source, tokenizer, folder, **options)
    size = f"{plural(stats.train.tokens, 'token')} of {plural(stats.train.documents, 'document')}"
    _log.info("Tokenized %s", stats if split == "sources" else f"{folder}: {split}: {size}")


def _check_validation(
    data: DataConfig, shards: Sequence[TokenShards], validation: Sequence[TokenShards], texts: _Texts
) -> None:
    """Refuse validation data that are trained on, and a fraction other than that of existing token shards."""
    if both := {dataset.digest for dataset in shards} & {dataset.digest for dataset in validation}:
        folder = next(dataset.folder for dataset in validation if dataset.digest in both)
        raise DSMoEError(f"{folder}: in both data.sources and data.validation")
    for dataset in shards if data.val_fraction is not None and not data.validation else ():
        if dataset.val_fraction in (None, data.val_fraction):
            continue
        ignored = f"data.val_fraction {data.val_fraction} has no effect on {dataset.folder}"
        problem = f"{ignored}, tokenized with {dataset.val_fraction}"
        if not texts.sources:
            raise DSMoEError(f"{problem}; omit it, pass --data.validation FILES, or run `dsmoe tokenize` again")
        _log.warning("%s", problem)
    warn_without_validation(validation, data.val_fraction)


def warn_without_validation(validation: Sequence[TokenShards], val_fraction: float | None) -> None:
    """Warn about empty validation data, unless `val_fraction` 0 requests it."""
    if val_fraction != 0 and not sum(map(len, validation)):
        _log.warning("No validation data: evaluation is skipped; pass --data.validation FILES")


def tokenizer_of(config: RunConfig) -> Path | None:
    """Return the folder of the configured tokenizer, or else of the base model's, or that of token shards, if any."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    base = config.base_folder()
    if base is not None and tokenizer_files(base):
        return base
    sources = config.data.sources if isinstance(config.data, DataConfig) else ()
    return next(filter(None, map(shards_tokenizer, sources)), None)


def _share() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
