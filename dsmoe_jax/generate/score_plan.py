"""`plan`: groups (context, continuation) pairs for scoring so that tokens they share are read once.

Pairs of one question become a `Row`: a trunk, read once, then a branch for each pair that attends to the trunk and to
itself. Rows that begin with the same few-shot examples become a `Group`, whose prefix is read once into a KV cache.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate.prefix_cache import MIN_SHARED, common_prefix
from dsmoe_jax.generate.programs import bucket, power_of_two

_MAX_CACHED: Final = 8  # cached tokens of a batch, copies of the prefix included, over the budget of `max_tokens`
_MAX_TAIL: Final = 8  # tokens of different contexts after a trunk, as in WinoGrande


class Pair(NamedTuple):
    """Token ids of a context and a continuation."""

    tokens: np.ndarray
    predicted: int  # tokens of the continuation

    @property
    def read(self) -> np.ndarray:
        """Tokens read by the model: all but the last."""
        return self.tokens[:-1]

    @property
    def length(self) -> int:
        """Number of tokens read."""
        return len(self.tokens) - 1

    @property
    def context(self) -> int:
        """Number of tokens before the continuation."""
        return len(self.tokens) - self.predicted


class Row(NamedTuple):
    """Pairs in one sequence.

    Attributes:
        pairs: Indices of the pairs.
        trunk: Tokens that all of them share, prefix included.
        length: Tokens read, prefix included.
    """

    pairs: list[int]
    trunk: int
    length: int


class Batch(NamedTuple):
    """Rows in one call of the model: a power of two, of which those beyond `rows` are idle."""

    size: int
    length: int  # of each row after the prefix, padding included
    rows: list[Row]


class Group(NamedTuple):
    """Batches of rows that share their first `prefix` tokens."""

    prefix: int
    batches: list[Batch]


def plan(
    pairs: Sequence[Pair], config: ModelConfig, *, context_length: int, max_tokens: int, share: bool = True
) -> list[Group]:
    """Group the pairs, those that need most memory first, so that running out of it fails early.

    Args:
        pairs: The pairs.
        config: Config of the model.
        context_length: Bound on the padded length of a row.
        max_tokens: Tokens of a batch after the prefix, padding included, unless a single row has more.
        share: Whether to read shared tokens once.

    Returns:
        Groups that contain every pair once.
    """
    alone = [not share or _ntk_length(pair.length, config) is not None for pair in pairs]
    order = sorted((i for i in range(len(pairs)) if not alone[i]), key=lambda i: pairs[i].read.astype(">i4").tobytes())
    rows = list(_rows(order, pairs, context_length, max_tokens))
    unshared = [Row([i], pair.length, pair.length) for i, pair in enumerate(pairs) if alone[i]]
    groups = []
    for prefix, members in _runs(rows, pairs):
        if prefix:
            groups.append(Group(prefix, _batches(members, prefix, pairs, config, context_length, max_tokens)))
        else:
            unshared += members
    groups.append(Group(0, _batches(unshared, 0, pairs, config, context_length, max_tokens)))
    needed = lambda group: group.prefix + max(batch.length for batch in group.batches)  # noqa: E731
    return sorted((group for group in groups if group.batches), key=needed, reverse=True)


def _rows(order: Sequence[int], pairs: Sequence[Pair], context_length: int, max_tokens: int) -> Iterator[Row]:
    """Merge neighbors in the order of their tokens whose trunk reaches the end of their contexts."""
    row: list[int] = []
    trunk = total = longest = context = 0
    for i in order:
        pair = pairs[i]
        if row:
            shared = min(trunk, common_prefix(pairs[row[-1]].read, pair.read))
            merged = total + pair.length, max(longest, pair.length), max(context, pair.context)
            branches = merged[0] - shared * (len(row) + 1)
            fits = shared + branches <= context_length and branches <= max_tokens
            if fits and shared >= merged[2] - _MAX_TAIL and 2 * shared >= merged[1]:
                row.append(i)
                trunk, (total, longest, context) = shared, merged
                continue
            yield Row(row, trunk, total - trunk * (len(row) - 1))
        row, trunk, total, longest, context = [i], pair.length, pair.length, pair.length, pair.context
    if row:
        yield Row(row, trunk, total - trunk * (len(row) - 1))


def _runs(rows: Sequence[Row], pairs: Sequence[Pair]) -> Iterator[tuple[int, list[Row]]]:
    """Split rows, in the order of their tokens, into runs with a prefix worth caching; prefix 0: without one."""
    run: list[Row] = []
    prefix = 0
    for row in rows:
        limit = min(row.trunk, *(pairs[i].context - 1 for i in row.pairs))
        if run:
            shared = min(common_prefix(pairs[run[-1].pairs[-1]].read, pairs[row.pairs[0]].read), limit, prefix)
            if shared >= MIN_SHARED and (len(run) == 1 or 2 * shared >= prefix):
                run, prefix = [*run, row], shared
                continue
            yield prefix if len(run) > 1 else 0, run
        run, prefix = [row], limit
    if run:
        yield prefix if len(run) > 1 else 0, run


def _batches(
    rows: Sequence[Row], prefix: int, pairs: Sequence[Pair], config: ModelConfig, context_length: int, max_tokens: int
) -> list[Batch]:
    """Batch rows of the same padded length, the longest first."""
    groups: dict[tuple[int, int | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row.length):
        padded = min(bucket(row.length - prefix), context_length)
        longest = max(pairs[i].length for i in row.pairs)
        groups.setdefault((padded, _ntk_length(longest, config)), []).append(row)
    batches = []
    for (padded, _), members in groups.items():
        tokens = min(max_tokens // padded, _MAX_CACHED * max_tokens // (prefix + padded))
        size = power_of_two(tokens // 2 + 1)  # the largest power of two within the budget, at least 1
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            batches.append(Batch(power_of_two(len(batch)), padded, batch))
    return batches


def _ntk_length(length: int, config: ModelConfig) -> int | None:
    """Return the length that determines the RoPE angles of a pair under dynamic NTK, else None (`layers.rope`)."""
    scaling = config.rope_scaling
    dynamic = scaling is not None and scaling.type == "dynamic"
    return length if dynamic and length > config.max_position_embeddings else None
