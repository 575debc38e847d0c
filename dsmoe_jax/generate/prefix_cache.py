"""`PrefixCache`: keys and values of token prefixes, reused by chats, scoring and prompts that share their beginning."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from dsmoe_jax.kv_cache import KVCache

_MIN_REUSED: Final = 16  # tokens of a match, or half the prompt; reading fewer again costs less than a copy
MIN_SHARED: Final = 64  # tokens that waiting prompts must share for the first one to be retained


class Prefix(NamedTuple):
    """Tokens with a one-row cache of all but the last, reused by prompts that start with them."""

    token_ids: tuple[int, ...]
    cache: KVCache

    def match(self, token_ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are cached; the last is excluded, as its logits are needed."""
        limit = min(len(self.token_ids), len(token_ids)) - 1
        return common_prefix(self.token_ids[:limit], token_ids[:limit])


class PrefixCache:
    """Prefixes within a bound on their bytes; the least recently used are evicted."""

    def __init__(self, max_bytes: int):
        """Create an empty cache of at most `max_bytes` per device."""
        self.max_bytes = max_bytes
        self._prefixes: list[Prefix] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Bytes of all prefixes per device."""
        return sum(map(_device_bytes, self._prefixes))

    def find(self, token_ids: Sequence[int], dtype: Any) -> Prefix | None:
        """Return the prefix with the longest match, in `dtype`; None if the match is too short to pay."""
        matches = [(one.match(token_ids), one) for one in self._prefixes if one.cache.dtype == dtype]
        length, best = max(matches, key=lambda match: match[0], default=(0, None))
        if best is None or length < min(_MIN_REUSED, len(token_ids) / 2):
            return None
        self._remove(best)
        self._prefixes.append(best)
        return best

    def add(self, prefix: Prefix) -> None:
        """Add a prefix, which replaces those that it extends; one larger than the bound is dropped."""
        size, dtype = len(prefix.token_ids), prefix.cache.dtype
        for one in [*self._prefixes]:
            if one.cache.dtype != dtype:
                continue
            shared = common_prefix(one.token_ids, prefix.token_ids)
            if shared == size < len(one.token_ids):
                return
            if shared == len(one.token_ids):
                self._remove(one)
        if _device_bytes(prefix) > self.max_bytes:
            return
        self._prefixes.append(prefix)
        while self.nbytes > self.max_bytes:
            del self._prefixes[0]

    def clear(self) -> None:
        """Remove every prefix."""
        self._prefixes.clear()

    def __len__(self) -> int:
        """Return the number of prefixes."""
        return len(self._prefixes)

    def _remove(self, prefix: Prefix) -> None:
        self._prefixes = [one for one in self._prefixes if one is not prefix]


def common_prefix(a: Any, b: Any) -> int:
    """Return the number of tokens with which two sequences begin alike."""
    size = min(len(a), len(b))
    differ = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differ.argmax()) if differ.any() else size


def _device_bytes(prefix: Prefix) -> int:
    arrays = jax.tree.leaves(prefix.cache.layers)
    return sum(np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize for x in arrays)
