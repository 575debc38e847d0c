"""`PrefixCache`: keys and values of token prefixes, reused by chats, scoring and prompts that share their beginning."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsmoe_jax.kv_cache import KVCache

_MIN_REUSED: Final = 16  # tokens of a match, or half the prompt; reading fewer again costs less than a copy
_MAX_PREFIXES: Final = 64  # they are searched one by one
MIN_SHARED: Final = 64  # tokens that waiting prompts must share for the first one to be retained


class Prefix(NamedTuple):
    """Tokens with a one-row cache of all but the last, reused by prompts that start with them."""

    token_ids: tuple[int, ...]
    cache: KVCache

    def match(self, token_ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are cached; the last is excluded, as its logits are needed."""
        limit = min(len(self.token_ids), len(token_ids)) - 1
        return common_prefix(self.token_ids[:limit], token_ids[:limit])


class _Entry(NamedTuple):
    prefix: Prefix
    token_ids: np.ndarray
    nbytes: int  # per device


class PrefixCache:
    """Prefixes within a bound on their bytes and number; the least recently used are evicted."""

    def __init__(self, max_bytes: int):
        """Create an empty cache of at most `max_bytes` per device."""
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Bytes of all prefixes per device."""
        return sum(entry.nbytes for entry in self._entries)

    def find(self, token_ids: Sequence[int], dtype: Any) -> Prefix | None:
        """Return the prefix with the longest match, in `dtype`; None if the match is too short to pay."""
        tokens, length, best = np.asarray(token_ids), 0, None
        for entry in self._entries:
            if entry.prefix.cache.dtype == dtype:
                shared = min(common_prefix(entry.token_ids, tokens), len(entry.token_ids) - 1, len(tokens) - 1)
                if shared > length:
                    length, best = shared, entry
        if best is None or length < min(_MIN_REUSED, len(tokens) / 2):
            return None
        self._entries = [*(entry for entry in self._entries if entry is not best), best]
        return best.prefix

    def add(self, prefix: Prefix) -> None:
        """Add a prefix, which replaces those that it extends; one larger than the bound is dropped."""
        new = _Entry(prefix, np.asarray(prefix.token_ids), _device_bytes(prefix))
        kept = []
        for entry in self._entries:
            if entry.prefix.cache.dtype == prefix.cache.dtype:
                shared = common_prefix(entry.token_ids, new.token_ids)
                if shared == len(new.token_ids) < len(entry.token_ids):
                    return
                if shared == len(entry.token_ids):
                    continue
            kept.append(entry)
        self._entries = kept
        if new.nbytes <= self.max_bytes:
            self._entries.append(new)
        while self.nbytes > self.max_bytes or len(self._entries) > _MAX_PREFIXES:
            del self._entries[0]

    def __len__(self) -> int:
        """Return the number of prefixes."""
        return len(self._entries)


def common_prefix(a: Any, b: Any) -> int:
    """Return the number of tokens with which two sequences begin alike."""
    size = min(len(a), len(b))
    differ = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differ.argmax()) if differ.any() else size


def _device_bytes(prefix: Prefix) -> int:
    arrays = jax.tree.leaves(prefix.cache.layers)
    return sum(np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize for x in arrays)
