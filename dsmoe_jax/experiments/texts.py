"""Token ids of texts for ablations and routing: `read_tokens`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.data import TokenShards, documents, is_token_shards


def read_tokens(source: str | Path, tokenizer: Tokenizer | None, max_tokens: int, *, vocab_size: int) -> list[int]:
    """Read the first token ids of a source, each document followed by EOS.

    Args:
        source: A text source (`train.data.documents`), or token shards, of which the validation split is read if it
            has documents.
        tokenizer: Required for texts.
        max_tokens: Maximum number of token ids.
        vocab_size: That of the model.

    Raises:
        DSMoEError: The source cannot be read, there is no tokenizer for it, or it has fewer than 2 tokens.
    """
    if max_tokens < 2:
        raise DSMoEError(f"max_tokens must be at least 2, got {max_tokens}")
    ids: list[int] = []
    if is_token_shards(source):
        train, validation = TokenShards.open_splits(source)
        shards = validation if len(validation) else train
        shards.check(vocab_size=vocab_size)
        for document in range(len(shards)):
            ids += shards.read(document, 0, max_tokens - len(ids)).tolist()
            if len(ids) >= max_tokens:
                break
    elif tokenizer is None:
        raise DSMoEError(f"{source} is text, and the model has no tokenizer; pass token shards (`dsmoe tokenize`)")
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for document in documents(source):
            ids += [*tokenizer.encode(document.text), *end]
            if len(ids) >= max_tokens:
                break
    if len(ids) < 2:
        raise DSMoEError(f"{source}: at least 2 tokens are needed, got {len(ids)}")
    return ids[:max_tokens]


def windows(ids: Sequence[int], length: int) -> np.ndarray:
    """Cut token ids into sequences; the last incomplete one is dropped unless it is the only one.

    Args:
        ids: Token ids.
        length: Tokens per sequence.

    Returns:
        int32 [sequences, tokens].
    """
    length = min(length, len(ids))
    count = len(ids) // length
    return np.array(ids[: count * length], np.int32).reshape(count, length)
