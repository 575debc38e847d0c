"""What a run reads: the sources of its config as token shards, and the batches of this process. Start at `prepare`."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax

from dsmoe_jax.checkpoint import together
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.tokenizer import tokenizer_files
from dsmoe_jax.vocabulary import train_tokenizer

from .batch import Batch
from .config import RunConfig
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
)
from .examples import is_examples

_SHARDS: Final = "data"  # below the run's folder: what was tokenized for it
_TOKENIZER: Final = "tokenizer"  # and the tokenizer that was trained for it
_log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """The data of a run."""

    stream: Stream
    held_out: Callable[..., Iterator[Batch]]  # of process_index and process_count: the batches to evaluate on
    tokenizer: Path | None  # its folder; None where only shards are known
    prefetch: int
    evaluate_batches: int

    @property
    def identity(self) -> dict[str, Any]:
        """All that the stream of tokens depends on, as JSON."""
        return self.stream.identity

    def batches(self, step: int) -> Iterator[Batch]:
        """This process's rows of the batches from number `step` on, without end."""
        return loader(self.stream, start_step=step, prefetch=self.prefetch, **_share())

    def evaluation(self) -> Iterator[Batch]:
        """This process's rows of the first batches of what is held out, the same every time."""
        return itertools.islice(self.held_out(**_share()), self.evaluate_batches)


def prepare(config: RunConfig, model_config: ModelConfig, out: Path) -> Corpus:
    """Open the token shards of every source; what is text is tokenized first, once, below `out`.

    Where no tokenizer is known a vocabulary is trained on the same texts, those that are held out left out.

    Raises `ValueError` for a source that is empty, broken or of examples, for shards made with another tokenizer,
    and for a vocabulary that is larger than the model's.
    """
    data = config.data
    if examples := next((source for source in data.sources if is_examples(source)), None):
        raise ValueError(f"{examples}: holds examples for `dsmoe finetune`; here their answers could not be told apart")
    homes = [
        Path(source) if is_token_shards(source) else out / _SHARDS / f"{i:02}" for i, source in enumerate(data.sources)
    ]
    texts = {source: home for source, home in zip(data.sources, homes, strict=True) if home != Path(source)}
    tokenizer, trained = _tokenizer(config), out / _TOKENIZER
    with together():
        if jax.process_index() == 0 and texts:
            if tokenizer is None and not trained.exists():
                _log.info("training a vocabulary of %d tokens on %s", model_config.vocab_size, ", ".join(texts))
                found = (document.text for source in texts for document in documents(source, exclude=[out]))
                seen = (text for text in found if not is_held_out(text.encode(), data.holdout))
                train_tokenizer(seen, trained, model_config.vocab_size)
            for source, home in texts.items():
                if not home.exists():
                    options = {"holdout": data.holdout, "split_special_tokens": data.split_special_tokens}
                    _log.info("%s", tokenize(source, tokenizer or trained, home, exclude=[out], **options))
    if tokenizer is None and trained.exists():
        tokenizer = trained
    shards, heldout = ([TokenShards.open(home, split) for home in homes] for split in ("train", "heldout"))
    expected = None if tokenizer is None else tokenizer_hash(tokenizer)
    for one in shards:
        one.check(tokenizer_hash=expected, vocab_size=model_config.vocab_size)
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
    return Corpus(stream, held_out, tokenizer, data.prefetch, config.evaluate_batches)


def _tokenizer(config: RunConfig) -> Path | None:
    """The folder of the tokenizer that is named, or of the model's; None where there is neither."""
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    if config.init_from is not None and tokenizer_files(config.init_from):
        return Path(config.init_from)
    return None


def _share() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
