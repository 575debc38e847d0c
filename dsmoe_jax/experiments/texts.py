"""Documents of texts for ablations and routing: `read_documents`."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.data import TokenShards, documents, is_token_shards
from dsmoe_jax.train.data.packing import pack

_CHARACTERS: Final = 32  # read per token of the limit; prose has about 4
_log = logging.getLogger(__name__)


def source_names(data: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one source or several as a list.

    Args:
        data: Texts or token shards.

    Raises:
        DSMoEError: There is none.
    """
    if not (found := [str(source) for source in ([data] if isinstance(data, str | Path) else data)]):
        raise DSMoEError("data must name at least one source")
    return found


def check_limits(max_tokens: int, window: int | None, config: ModelConfig | None = None) -> None:
    """Raise for limits without a predicted token, and warn of a window beyond the trained context.

    Args:
        max_tokens: Tokens of each source.
        window: Tokens read at once; None: the default.
        config: Config of the model; None: it is not read yet.

    Raises:
        DSMoEError: A limit is too low.
    """
    if max_tokens < 2:
        raise DSMoEError(f"max_tokens must be at least 2, got {max_tokens}")
    if window is not None and window < 1:
        raise DSMoEError(f"sequence length must be at least 1, got {window}")
    if config and window is not None and window > config.context_length:
        text = "sequence length %d exceeds the model's max_position_embeddings %d"
        _log.warning(text, window, config.context_length)


def read_documents(
    source: str | Path, tokenizer: Tokenizer | None, max_tokens: int, *, vocab_size: int
) -> list[list[int]]:
    """Read documents of a source, tokenized as for training: BOS (if the tokenizer adds one), tokens, EOS.

    Args:
        source: A text source (`train.data.documents`), or token shards, of which the validation split is read if it
            has documents; in a fixed random order, because shards are grouped by source.
        tokenizer: Required for texts.
        max_tokens: Maximum number of token ids; the last document is cut.
        vocab_size: That of the model.

    Raises:
        DSMoEError: The source cannot be read, there is no tokenizer for it, or no document has 2 tokens.
    """
    found, left = [], max_tokens
    for document in _documents(source, tokenizer, vocab_size, _CHARACTERS * max_tokens):
        found.append(document[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    if not any(len(document) > 1 for document in found):
        raise DSMoEError(f"{source}: a document of at least 2 tokens is needed")
    return found


def _documents(
    source: str | Path, tokenizer: Tokenizer | None, vocab_size: int, characters: int
) -> Iterator[list[int]]:
    """Yield the token ids of each document, of texts no more than some characters."""
    if is_token_shards(source):
        train, validation = TokenShards.open_splits(source)
        shards = validation if len(validation) else train
        shards.check(vocab_size=vocab_size)
        for document in np.random.default_rng(0).permutation(len(shards)):
            yield shards.read(document).tolist()
    elif tokenizer is None:
        raise DSMoEError(f"{source} is text, and the model has no tokenizer; pass token shards (`dsmoe tokenize`)")
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for document in documents(source):
            yield [*tokenizer.encode(document.text[:characters]), *end]


def sequences(found: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Pack documents into sequences as for pretraining, where tokens attend to their own document.

    Args:
        found: Token ids of documents.
        length: Tokens per sequence.

    Returns:
        int32 [sequences, 4, length]: token ids, labels, segment ids (0: padding), positions.
    """
    ids = np.array([token for document in found for token in document], np.int32)
    document = np.repeat(np.arange(len(found)), [len(one) for one in found])
    length = min(length, len(ids))
    packed = []
    for start in range(0, len(ids), length):
        place = slice(start, start + length)
        ends = np.flatnonzero(np.diff(document[place])) + 1
        packed.append(pack(np.split(ids[place], ends), length))
    return np.array(packed)
