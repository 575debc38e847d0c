"""`Prefiller`: reads prompts in chunks, starting after the tokens whose keys and values are cached."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe_jax.axes import Array
from dsmoe_jax.generate import programs
from dsmoe_jax.generate.prefix_cache import Prefix, PrefixCache
from dsmoe_jax.generate.programs import bucket, power_of_two
from dsmoe_jax.generate.request import Stats
from dsmoe_jax.kv_cache import KVCache

Tokens = Sequence[int]


@dataclasses.dataclass
class Prefill:
    """Prompts being read: several short ones at once, or one long one in chunks.

    Attributes:
        prompts: Their token ids.
        num_cached: Tokens of each in the cache.
        chunk: Tokens of a prompt per call of the model.
        max_length: Slots of the cache.
        cache: A row per prompt, and idle ones up to a power of two.
        logits: Of the last token of each prompt, [rows, V], once done.
    """

    prompts: list[Tokens]
    num_cached: list[int]
    chunk: int
    max_length: int
    cache: KVCache | None = None
    logits: Array | None = None

    @property
    def done(self) -> bool:
        """Whether all tokens are in the cache."""
        return self.num_cached == [len(prompt) for prompt in self.prompts]


class Prefiller:
    """Reads prompts with a model; several that take more than one chunk cannot be read at once."""

    def __init__(
        self,
        graph: Any,
        params: Mapping[str, Any],
        *,
        dtype: Any,
        chunk: int,
        prefix_cache: PrefixCache,
        stats: Stats,
    ):
        """Create a prefiller that keeps keys and values in `dtype` and counts tokens in `stats`."""
        self._graph, self._params, self._dtype, self._chunk = graph, dict(params), np.dtype(dtype), chunk
        self._prefix_cache, self._stats = prefix_cache, stats

    def find_prefix(self, prompt: Tokens) -> Prefix | None:
        """Return the cached prefix with the longest match."""
        return self._prefix_cache.find(prompt, self._dtype)

    def start(self, prompts: Sequence[Tokens], prefix: Prefix | None = None, *, whole: bool = False) -> Prefill:
        """Prepare to read prompts, from the cached tokens of a prefix on; `whole`: in one chunk of any length."""
        known = [0 if prefix is None else prefix.match(prompt) for prompt in prompts]
        new = [len(prompt) - start for prompt, start in zip(prompts, known, strict=True)]
        chunk = max(new) if whole else self._chunk
        last = [(count - 1) % chunk + 1 for count in new]  # tokens of the last chunk
        starts = [len(prompt) - count for prompt, count in zip(prompts, last, strict=True)]
        prefill = Prefill([*prompts], known, chunk, bucket(max(starts) + bucket(max(last))))
        if prefix is not None:
            lengths = np.pad(np.array(known, np.int32), (0, power_of_two(len(known)) - len(known)))
            prefill.cache = programs.copy_rows(prefill.max_length, prefix.cache, np.zeros_like(lengths), lengths)
            self._stats.reused_tokens += sum(known)
        return prefill

    def step(self, prefill: Prefill) -> None:
        """Read the next chunk of each prompt."""
        starts = zip(prefill.prompts, prefill.num_cached, strict=True)
        pieces = [prompt[start : start + prefill.chunk] for prompt, start in starts]
        counts = np.array([len(ids) for ids in pieces], np.int32)
        padded = np.zeros((power_of_two(len(pieces)), bucket(int(counts.max()))), np.int32)
        for row, ids in zip(padded, pieces, strict=False):
            row[: len(ids)] = ids
        prefill.num_cached = [start + len(ids) for start, ids in zip(prefill.num_cached, pieces, strict=True)]
        counts = np.pad(counts, (0, len(padded) - len(counts)))
        if prefill.cache is None:
            read = programs.prefill(self._graph, prefill.max_length, self._dtype, self._params, padded, counts)
        else:
            read = programs.extend(self._graph, self._params, prefill.cache, padded, counts)
        prefill.logits, prefill.cache = read
        self._stats.prompt_tokens += int(counts.sum())

    def read(self, tokens: Tokens) -> Prefix:
        """Read tokens, from the longest cached prefix on, into a prefix that joins the prefix cache."""
        prefill = self.start([tokens], self.find_prefix(tokens))
        while not prefill.done:
            self.step(prefill)
        assert prefill.cache is not None
        prefix = Prefix(tuple(tokens), prefill.cache)
        self._prefix_cache.add(prefix)
        return prefix
