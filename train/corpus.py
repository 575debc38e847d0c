"""What a run reads: the sources of its config as token shards, and the batches of this process. Start at `prepare`."""

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
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.text.train_tokenizer import train_tokenizer

from .batch import Batch
from .config import DataConfig, RunConfig
from .data import (
    Stream,
    TokenShards,
    documents,
    evaluation_batches,
    is_held_out,
    is_token_shards,
    loader,
    tokenize,
    tokenizer_hash,
    warn_of_overlap,
)
from .data.shards import MANIFEST as SHARDS_MANIFEST
from .inputs import Derived, Source
from .sft import is_examples

_SHARDS: Final = "data"  # below the run's folder: what was tokenized for it
_TOKENIZER: Final = "tokenizer"  # and the tokenizer that was trained for it
_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """The data of a run."""

    stream: Stream
    held_out: Callable[..., Iterator[Batch]]  # of process_index and process_count: the batches to evaluate on
    tokenizer: Path | None  # its folder; None where only shards are known
    prefetch: int
    eval_batches: int
    # What the datasets were made from, as JSON: `files` and their hashes, `options`, hashes of what is `heldout`.
    inputs: Mapping[str, Any]
    eos_token_id: int | None = None  # that ends a document, where no tokenizer says

    @property
    def identity(self) -> dict[str, Any]:
        """All that the stream of tokens depends on, as JSON."""
        return self.stream.identity

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's rows of the batches from number `step` on, without end."""
        return loader(self.stream, start_step=step, prefetch=self.prefetch, **_share())

    def evaluation(self) -> Iterator[Batch]:
        """This process's rows of the first batches of what is held out, the same every time."""
        return itertools.islice(self.held_out(**_share()), self.eval_batches)


def prepare(config: RunConfig, model_config: ModelConfig, out: Path, *, resuming: bool = False) -> Corpus:
    """Open the token shards of every source; what is text is tokenized first, once, below `out`.

    Where no tokenizer is known a vocabulary is trained on the same texts, those that are held out left out. Shards and
    tokenizer of an earlier start are made again when the texts or the options have changed; with `resuming`, where
    checkpoints were trained on them, a change is refused.

    Raises `ValueError` for a source that is empty, broken or of examples, for shards made with another tokenizer,
    and for a vocabulary that is larger than the model's.
    """
    data = config.data
    if data.weights and len(data.sources) == 1:
        _log.warning("data.weights %s has no effect: there is one source", data.weights)
    tokenizer = _tokenizer(config)
    homes = []
    with collective_errors():
        if examples := next((source for source in data.sources if is_examples(source)), None):
            raise DSMoEError(
                f"{examples}: holds examples for `dsmoe finetune`; here their answers could not be told apart"
            )
        if tokenizer is not None and not tokenizer_files(tokenizer):
            raise DSMoEError(f"{tokenizer}: holds no tokenizer")
        homes = [Path(s) if is_token_shards(s) else out / _SHARDS / f"{i:02}" for i, s in enumerate(data.sources)]
    texts = {home: source for source, home in zip(data.sources, homes, strict=True) if home != Path(source)}
    with collective_errors():
        if jax.process_index() == 0 and texts:
            _derive(config, model_config, out, texts, tokenizer, resuming)
    shards, heldout = [], []
    with collective_errors():
        shards, heldout = ([TokenShards.open(home, split) for home in homes] for split in ("train", "heldout"))
        if tokenizer is None:
            tokenizer = _trained(out, shards)
        expected = None if tokenizer is None else tokenizer_hash(tokenizer)
        for one in shards:
            one.check(tokenizer_hash=expected, vocab_size=model_config.vocab_size)
        _check_holdout(data, homes, texts, heldout)
    stream = Stream(
        shards,
        data.weights,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        seed=config.seed,
        mode=data.packing,
    )
    held_out = functools.partial(
        evaluation_batches,
        heldout,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        mode=data.packing,
    )
    files = {source: one.digest for source, one in zip(data.sources, shards, strict=True)}
    inputs = {"files": files, "options": {}, "heldout": [one.digest for one in heldout]}
    eos = shards[0].eos_token_id
    return Corpus(stream, held_out, tokenizer, data.prefetch, config.eval_batches, inputs, eos)


def _derive(
    config: RunConfig,
    model_config: ModelConfig,
    out: Path,
    texts: Mapping[Path, str],
    tokenizer: Path | None,
    resuming: bool,
) -> None:
    """Make the tokenizer, if none is given, and the token shards of the texts, by their folder."""
    val_fraction = config.data.val_fraction
    derived = Derived(out, resuming=resuming)
    split = config.data.split_special_tokens
    warn_of_overlap(list(texts.values()), [out])
    sources = {home: Source.read(text, out) for home, text in texts.items()}

    def train(home: Path) -> None:
        _log.info("training a vocabulary of %d tokens on %s", model_config.vocab_size, ", ".join(texts.values()))
        found = (document.text for text in texts.values() for document in documents(text, exclude=[out]))
        seen = (text for text in found if not is_held_out(text.encode(), val_fraction))
        train_tokenizer(seen, home, model_config.vocab_size)

    if tokenizer is None:
        options = {"vocab_size": model_config.vocab_size, "data.val_fraction": val_fraction}
        derived.make(_TOKENIZER, list(sources.values()), options, train, tokenizer_hash)
        tokenizer = out / _TOKENIZER
    made_by = {"data.val_fraction": val_fraction, "tokenizer": tokenizer_hash(tokenizer)}
    made_by |= {"data.split_special_tokens": True} if split else {}
    for home, source in sources.items():
        write = functools.partial(
            _tokenize, source.name, tokenizer, val_fraction=val_fraction, split_special_tokens=split, exclude=[out]
        )
        derived.make(home.relative_to(out).as_posix(), [source], made_by, write)


def _tokenize(source: str, tokenizer: Path, home: Path, **options: Any) -> None:
    _log.info("%s", tokenize(source, tokenizer, home, **options))


def _trained(out: Path, shards: Sequence[TokenShards]) -> Path | None:
    """The tokenizer that was trained in this run's folder, if it made the shards."""
    trained = out / _TOKENIZER
    if tokenizer_files(trained) and tokenizer_hash(trained) == shards[0].tokenizer_hash:
        return trained
    return None


def _check_holdout(
    data: DataConfig, homes: Sequence[Path], texts: Mapping[Path, str], heldout: Sequence[TokenShards]
) -> None:
    """Refuse a validation share that the shards do not have; warn where nothing is held out at all."""
    asked = data.val_fraction != DataConfig.val_fraction
    for home in homes:
        share = read_json(home / SHARDS_MANIFEST).get("val_fraction", data.val_fraction)
        if asked and share != data.val_fraction:
            problem = (
                f"data.val_fraction {data.val_fraction} has no effect on {home}: its shards were made with {share}"
            )
            if not texts:
                raise DSMoEError(f"{problem}; leave it out, or tokenize the text again")
            _log.warning("%s", problem)
    if data.val_fraction and not sum(map(len, heldout)):
        _log.warning("no document is held out: nothing to evaluate on; raise data.val_fraction (%s)", data.val_fraction)


def _tokenizer(config: RunConfig) -> Path | None:
    """The folder of the tokenizer that is named, or of the model's; None where there is neither."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    if config.init_from is not None and tokenizer_files(config.init_from):
        return Path(config.init_from)
    return None


def _share() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
