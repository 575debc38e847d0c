"""Packing of documents, compared with a token-by-token reference.

Start at `test_packed_sequence_matches_literals`. All tokens of the shards have different ids.
"""

import functools
import itertools
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.train.data import DocumentPacking, TokenShards
from dsmoe_jax.train.data.packing import pack
from dsmoe_jax.train.data.shuffle import shuffled
from tests.helpers.corpus import hand_made_shards

CORPORA: dict[str, tuple[list[int], int]] = {  # lengths of documents, tokens of a sequence
    "several documents per sequence": ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 16),
    "documents longer than a sequence": ([50, 7, 31], 8),
    "one document": ([23], 5),
    "sequences of one token": ([3, 1, 2], 1),
    "an epoch without remainder": ([4, 8, 12], 8),
    "an epoch of one sequence": ([5, 3], 8),
    "an epoch shorter than a sequence": ([2, 1], 10),
    "documents of one token": ([1] * 30, 7),
}
corpora = pytest.mark.parametrize(("lengths", "T"), CORPORA.values(), ids=CORPORA)
modes = pytest.mark.parametrize("mode", ["block_causal", "causal"])


def reference(shards: TokenShards, T: int, mode: str, epochs: int, seed: int) -> list[list[list[int]]]:
    """Reference: the unshuffled sequences, token by token."""
    line = []
    for epoch in range(epochs):
        for document in shuffled(len(shards), seed, 0, epoch, 0):
            line += [((epoch, document), int(token)) for token in shards.read(int(document))]
    sequences = []
    for start in range(0, len(line) - T, T):
        ids, labels, segments, positions = [], [], [], []
        for at in range(start, start + T):
            document, token = line[at]
            begins = at == start or (mode == "block_causal" and document != line[at - 1][0])
            ids.append(token)
            segments.append(1 if at == start else segments[-1] + begins)
            positions.append(0 if begins else positions[-1] + 1)
            ends = mode == "block_causal" and line[at + 1][0] != document
            labels.append(-100 if ends else line[at + 1][1])
        sequences.append([ids, labels, segments, positions])
    return sequences


def sequences_of(packing: DocumentPacking, numbers: Any) -> list[list[list[int]]]:
    return [packing.sequence(n).tolist() for n in numbers]


def test_packed_sequence_matches_literals():
    pieces = [np.array([7, 8, 9]), np.array([5]), np.array([1, 2, 3, 4])]

    assert pack(pieces, 6, "block_causal").tolist() == [
        [7, 8, 9, 5, 1, 2],
        [8, 9, -100, -100, 2, 3],
        [1, 1, 1, 2, 3, 3],
        [0, 1, 2, 0, 0, 1],
    ]
    assert pack(pieces, 6, "causal").tolist() == [
        [7, 8, 9, 5, 1, 2],
        [8, 9, 5, 1, 2, 3],
        [1, 1, 1, 1, 1, 1],
        [0, 1, 2, 3, 4, 5],
    ]


@modes
def test_short_sequence_is_padded(mode: str):
    assert pack([np.array([7, 8])], 4, mode).tolist() == [
        [7, 8, 0, 0],
        [8, -100, -100, -100],
        [1, 1, 0, 0],
        [0, 1, 0, 0],
    ]
    assert pack([], 2, mode).tolist() == [[0, 0], [-100, -100], [0, 0], [0, 0]]


@modes
@corpora
def test_sequences_match_the_reference(tmp_path: Path, lengths: list[int], T: int, mode: str):
    shards = hand_made_shards(tmp_path / "s", lengths, shards=min(3, len(lengths)))
    packing = DocumentPacking(shards, sequence_length=T, seed=3, packing=mode)
    want = reference(shards, T, mode, epochs=15, seed=3)

    for epoch in range(4):
        numbers = packing.sequences_of(epoch)
        got = sequences_of(packing, numbers)

        assert sorted(got) == sorted(want[numbers.start : numbers.stop])
        assert got[-1:] == want[numbers.start : numbers.stop][-1:]  # the last sequence is not shuffled


@modes
@corpora
def test_every_token_of_an_epoch_is_read_once(tmp_path: Path, lengths: list[int], T: int, mode: str):
    shards = hand_made_shards(tmp_path / "s", lengths)
    packing = DocumentPacking(shards, sequence_length=T, seed=0, packing=mode)

    sequences = np.stack([packing.sequence(n) for n in range(shards.tokens)])  # T epochs have that many tokens × T

    firsts = set((np.cumsum(lengths) - lengths + 1).tolist())
    labels = Counter(sequences[:, 1].ravel().tolist())
    assert Counter(sequences[:, 0].ravel().tolist()) == {token: T for token in range(1, shards.tokens + 1)}
    if mode == "block_causal":
        ignored = labels.pop(-100, 0)
        assert labels == {token: T for token in range(1, shards.tokens + 1) if token not in firsts}
        assert ignored == T * len(lengths)
    else:
        # The first token of the first epoch is no label; the first of the epoch after the last is one.
        assert sum(labels.values()) == shards.tokens * T
        assert all(labels[token] == T for token in range(1, shards.tokens + 1) if token not in firsts)


@corpora
def test_epochs_are_contiguous(tmp_path: Path, lengths: list[int], T: int):
    packing = DocumentPacking(hand_made_shards(tmp_path / "s", lengths), sequence_length=T, seed=0)

    numbers = [n for epoch in range(20) for n in packing.sequences_of(epoch)]

    assert numbers == list(range(len(numbers)))
    assert sum(lengths) * 20 <= len(numbers) * T < sum(lengths) * 20 + T


@modes
def test_long_document_continues_in_another_sequence(tmp_path: Path, mode: str):
    packing = DocumentPacking(hand_made_shards(tmp_path / "s", [20]), sequence_length=8, seed=0, packing=mode)

    first, second = sorted(sequences_of(packing, range(2)))

    assert first == [list(range(1, 9)), list(range(2, 10)), [1] * 8, list(range(8))]
    assert second == [list(range(9, 17)), list(range(10, 18)), [1] * 8, list(range(8))]


@modes
def test_document_repeated_across_epochs_is_a_new_segment(tmp_path: Path, mode: str):
    packing = DocumentPacking(hand_made_shards(tmp_path / "s", [3]), sequence_length=7, seed=0, packing=mode)

    labels, segments, positions = packing.sequence(0)[1:].tolist()

    apart = mode == "block_causal"
    assert segments == ([1, 1, 1, 2, 2, 2, 3] if apart else [1] * 7)
    assert positions == ([0, 1, 2, 0, 1, 2, 0] if apart else list(range(7)))
    assert labels == ([2, 3, -100, 2, 3, -100, 2] if apart else [2, 3, 1, 2, 3, 1, 2])


def test_sequences_do_not_depend_on_access_order_or_threads(tmp_path: Path):
    shards = hand_made_shards(tmp_path / "s", CORPORA["several documents per sequence"][0])
    make = functools.partial(DocumentPacking, shards, sequence_length=4, seed=5)
    numbers = [*range(100)]
    want = sequences_of(make(), numbers)

    backwards = sequences_of(make(), numbers[::-1])[::-1]
    alone = [make().sequence(n).tolist() for n in numbers]
    shared = make()
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda n: shared.sequence(n).tolist(), numbers))

    assert want == backwards == alone == threads


def test_seed_dataset_and_epoch_determine_the_order(tmp_path: Path):
    shards = hand_made_shards(tmp_path / "s", [4] * 50)
    keys = itertools.product((0, 1), (0, 1))
    packings = [DocumentPacking(shards, sequence_length=8, seed=seed, dataset=dataset) for seed, dataset in keys]

    orders = [sequences_of(packing, packing.sequences_of(epoch)) for packing in packings for epoch in (0, 1)]

    assert len({str(order) for order in orders}) == 8


def test_sequences_are_shuffled(tmp_path: Path):
    shards = hand_made_shards(tmp_path / "s", [1000])
    sequences = sequences_of(DocumentPacking(shards, sequence_length=10, seed=0), range(100))

    firsts = [ids[0] for ids, *_ in sequences]

    assert firsts != sorted(firsts)
    assert sorted(firsts) == list(range(1, 1001, 10))


GOLDEN = (
    [0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 4],
    [4, 8, 0, 10, 1, 11, 3, 9, 2, 6, 5, 7],
    [8, 7, 2, 9, 0, 10, 11, 3, 1, 4, 5, 6],
)


def test_shuffle_matches_golden_values():
    assert shuffled(12, 0).tolist() == GOLDEN[0]
    assert shuffled(12, 7, 1, 2, 3).tolist() == GOLDEN[1]
    assert shuffled(12, 2**63, 1 << 31).tolist() == GOLDEN[2]
    assert shuffled(0, 0).tolist() == []


def test_shuffle_is_uniform():
    places = np.stack([shuffled(5, seed) for seed in range(5000)])

    counts = np.stack([np.bincount(column, minlength=5) for column in places.T])

    np.testing.assert_allclose(counts, 1000, atol=150)


def test_index_of_a_million_documents_is_small_and_fast(tmp_path: Path):
    shards = hand_made_shards(tmp_path / "s", [1, 2, 3, 2] * 250_000)
    packing = DocumentPacking(shards, sequence_length=256, seed=0)
    tracemalloc.start()
    started = time.perf_counter()

    packing.sequence(5)

    seconds, (current, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10  # measured: 0.2
    assert current < 2.2 * 8 * len(shards)
    assert peak < 4 * 8 * len(shards)


def test_bad_shapes_are_refused(tmp_path: Path):
    shards = hand_made_shards(tmp_path / "s", [3, 4])

    with pytest.raises(ValueError, match="sequence_length must be at least 1, got 0"):
        DocumentPacking(shards, sequence_length=0, seed=0)
    with pytest.raises(ValueError, match="packing must be one of block_causal, causal, got 'padded'"):
        DocumentPacking(shards, sequence_length=4, seed=0, packing="padded")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        DocumentPacking(shards, sequence_length=4, seed=-1).sequence(0)
    with pytest.raises(ValueError, match="s: no documents to train on"):
        DocumentPacking(TokenShards.open(tmp_path / "s", "validation"), sequence_length=4, seed=0)
