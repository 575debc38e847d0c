"""The training stream, a pure function of (seed, step, sequence), and validation batches.

Start at `test_stream_does_not_depend_on_processes_or_prefetch`.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.text.tokenizer import Tokenizer
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.data import Mixture, Stream, TokenShards, loader, tokenize, validation_batches
from tests.helpers.corpus import byte_tokenizer, hand_made_shards, write_texts

B, T = 8, 16


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenShards]:
    """Two datasets with disjoint tokens; an epoch of the second has 15 sequences."""
    folder = tmp_path_factory.mktemp("datasets")
    first = hand_made_shards(folder / "first", np.random.default_rng(0).integers(1, 60, 200).tolist(), shards=3)
    return [first, hand_made_shards(folder / "second", [3, 50, 7, 90, 90], first_id=100_000)]


def stream_of(datasets: list[TokenShards], **options: Any) -> Stream:
    usual: dict[str, Any] = {"weights": [3.0, 1.0], "sequence_length": T, "batch_size": B, "seed": 7}
    return Stream(datasets, **(usual | options))


def read(batches: Any, count: int) -> list[list]:
    """The next batches as lists; closes a loader."""
    found = [[field.tolist() for field in batch] for batch in itertools.islice(batches, count)]
    getattr(batches, "close", lambda: None)()
    return found


def joined(parts: list[list[list]]) -> list[list]:
    """Global batches from those of all processes."""
    return [
        [[*itertools.chain(*fields)] for fields in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(datasets: list[TokenShards]) -> list[list]:
    stream = stream_of(datasets)
    return read((stream.batch(step) for step in range(40)), 40)


# The stream


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_stream_does_not_depend_on_processes_or_prefetch(
    datasets: list[TokenShards], expected: list[list], processes: int, prefetch: int
):
    parts = [
        read(loader(stream_of(datasets), process_index=h, process_count=processes, prefetch=prefetch), 40)
        for h in range(processes)
    ]

    assert joined(parts) == expected


@pytest.mark.parametrize("start", [0, 1, 7, 29, 39])
def test_restart_at_any_step_continues_the_stream(datasets: list[TokenShards], expected: list[list], start: int):
    parts = [
        read(loader(stream_of(datasets), start_step=start, process_index=h, process_count=2), 40 - start)
        for h in (0, 1)
    ]

    assert joined(parts) == expected[start:]


def test_restart_with_other_process_count_continues_the_stream(datasets: list[TokenShards], expected: list[list]):
    stream = stream_of(datasets)

    found = [
        batch
        for first, last, processes in ((0, 9, 4), (9, 10, 1), (10, 40, 2))
        for batch in joined(
            [
                read(loader(stream, start_step=first, process_index=h, process_count=processes), last - first)
                for h in range(processes)
            ]
        )
    ]

    assert found == expected


def test_any_slice_of_any_batch_can_be_read(datasets: list[TokenShards], expected: list[list]):
    stream = stream_of(datasets)
    for step, sequences in ((39, slice(2, 5)), (0, slice(None)), (12, slice(7, None)), (12, slice(0, 8, 3)), (3, None)):
        found = [field.tolist() for field in stream.batch(step, sequences)]

        assert found == [field[sequences or slice(None)] for field in expected[step]]


def test_batch_is_four_int32_arrays(datasets: list[TokenShards]):
    for batch in (stream_of(datasets).batch(0), next(loader(stream_of(datasets), prefetch=0))):
        assert type(batch) is Batch
        assert {(field.shape, field.dtype, field.flags.c_contiguous) for field in batch} == {
            ((B, T), np.dtype("int32"), True)
        }


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"weights": [1.0, 1.0]}, {"sequence_length": 17}, {"batch_size": 4}, {"packing": "causal"}],
    ids=lambda options: next(iter(options)),
)
def test_identity_tells_streams_apart(datasets: list[TokenShards], expected: list[list], other: dict[str, Any]):
    stream, same = stream_of(datasets, **other), stream_of(datasets)

    assert stream_of(datasets).identity == same.identity == json.loads(json.dumps(same.identity))
    assert [name for name in same.identity if same.identity[name] != stream.identity[name]] == list(other)
    assert [field.tolist() for field in stream.batch(0)] != expected[0]


def test_digest_covers_tokens(tmp_path: Path):
    one = hand_made_shards(tmp_path / "one", [3, 4])
    same = hand_made_shards(tmp_path / "same", [3, 4])
    other = hand_made_shards(tmp_path / "other", [3, 4], first_id=2)

    assert one.digest == same.digest != other.digest


def test_batches_read_every_token_of_an_epoch_once(datasets: list[TokenShards]):
    shards = datasets[1]
    stream = stream_of([shards], weights=[])

    ids = Counter(
        token for step in range(shards.tokens // B) for token in stream.batch(step).token_ids.ravel().tolist()
    )

    assert set(ids.values()) == {T}  # T epochs end with a complete sequence
    assert len(ids) == shards.tokens


def test_global_random_state_is_unused(datasets: list[TokenShards], expected: list[list]):
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()  # pyright: ignore

    found = [field.tolist() for field in stream_of(datasets).batch(5)]

    assert found == expected[5]
    assert np.random.get_state()[1].tolist() == before  # pyright: ignore


# The mixture


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1.0, 1.0, 1.0], [1000.0, 1.0], [0.1] * 10]
)
def test_mixture_is_exact_after_every_block(weights: list[float]):
    mixture = Mixture(weights, seed=1)
    taken = np.zeros(len(weights), int)

    for block in range(12):
        places = [mixture.place(block * mixture.block + n) for n in range(mixture.block)]
        for dataset, number in places:
            assert number == taken[dataset]  # samples in order, without gaps
            taken[dataset] += 1

        share = np.array(weights) / sum(weights) * mixture.block * (block + 1)
        assert np.abs(taken - share).max() < 1
        assert taken.tolist() == mixture.taken(block + 1)


def test_small_weight_makes_longer_blocks():
    assert Mixture([0.5, 0.5], seed=0).block == 256
    assert Mixture([1.0, 999.0], seed=0).block == 1000


def test_mixture_is_a_function_of_seed_and_number():
    places = [Mixture([2.0, 1.0], seed=4).place(n) for n in range(1024)]
    mixture = Mixture([2.0, 1.0], seed=4)

    again = [mixture.place(n) for n in reversed(range(1024))][::-1]
    other = [Mixture([2.0, 1.0], seed=5).place(n) for n in range(1024)]
    orders = {tuple(dataset for dataset, _ in places[first : first + 256]) for first in range(0, 1024, 256)}

    assert places == again != other
    assert len(orders) == 4


def test_mixture_has_random_access():
    mixture = Mixture([2.0, 1.0], seed=4)

    dataset, number = mixture.place(10**15)

    assert number == pytest.approx(10**15 * (2 / 3, 1 / 3)[dataset], abs=256)


def test_stream_mixes_by_weight(datasets: list[TokenShards]):
    stream = stream_of(datasets)

    ids = np.concatenate([stream.batch(step).token_ids for step in range(64)])

    second = ids >= 100_000
    assert (second.all(axis=1) | ~second.any(axis=1)).all()  # no sequence mixes datasets
    assert second.all(axis=1).sum() == 128


# Evaluation


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("mode", ["block_causal", "causal"])
def test_validation_reads_every_token_once_in_order(datasets: list[TokenShards], mode: str, processes: int):
    parts = [
        read(
            validation_batches(
                datasets, sequence_length=T, batch_size=B, packing=mode, process_index=h, process_count=processes
            ),
            1000,
        )
        for h in range(processes)
    ]

    ids, labels, segments, positions = (np.concatenate(fields) for fields in zip(*joined(parts), strict=True))
    real = segments > 0
    for shards, some in zip(datasets, (ids < 100_000, ids >= 100_000), strict=True):
        want = np.concatenate([shards.read(d) for d in range(len(shards))])
        assert ids[real & some].tolist() == want.tolist()
    assert (len(ids) % B, {field.shape for field in (ids, labels, segments, positions)}) == (0, {(len(ids), T)})
    assert (labels[~real] == -100).all()
    # The last token of each document, or of each dataset, has no label.
    assert (labels[real] == -100).sum() == {"block_causal": 205, "causal": 2}[mode]
    assert positions.max() < T


def test_validation_takes_datasets_in_turn(datasets: list[TokenShards]):
    batches = validation_batches(datasets, sequence_length=T, batch_size=B)
    sequences = [-(-shards.tokens // T) for shards in datasets]
    assert sequences[0] > sequences[1] > B

    seen = [ids[0] >= 100_000 for batch in itertools.islice(batches, 5) for ids in batch.token_ids]

    assert seen == [False, True] * sequences[1] + [False] * (5 * B - 2 * sequences[1])


def test_empty_validation_split_gives_no_batch(datasets: list[TokenShards]):
    empty = TokenShards.open(datasets[0].folder, "validation")

    assert list(validation_batches([empty], sequence_length=T, batch_size=B)) == []
    assert list(validation_batches([], sequence_length=T, batch_size=B)) == []


def test_validation_documents_are_not_in_training(tmp_path: Path):
    texts = [f"document {n} of many" for n in range(120)]
    folder = byte_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenize(write_texts(tmp_path / "a.jsonl", texts), folder, tmp_path / "out", val_fraction=0.2)
    train, validation = (TokenShards.open(tmp_path / "out", split) for split in ("train", "validation"))
    stream = stream_of([train], weights=[], sequence_length=64)

    def seen(batches: Any) -> set[str]:
        """The complete documents in some batches."""
        found = set()
        for batch in batches:
            for ids, segments in zip(batch.token_ids, batch.segment_ids, strict=True):
                found |= {tokenizer.decode(ids[segments == s]) for s in range(1, segments.max() + 1)}
        return found & set(texts)

    trained = seen(stream.batch(step) for step in range(60))
    evaluated = seen(validation_batches([validation], sequence_length=64, batch_size=4))

    assert len(trained) == len(train)
    assert len(evaluated) > len(validation) / 2
    assert not trained & evaluated


# Bad input


BAD: dict[str, tuple[Callable[[list[TokenShards]], Any], str]] = {
    "no datasets": (lambda d: stream_of([], weights=[]), "no datasets to train on"),
    "weights": (lambda d: stream_of(d, weights=[1.0]), "got 1 weights for 2 datasets"),
    "no weight": (lambda d: stream_of(d, weights=[1.0, 0.0]), "weights must be positive and finite, got 0.0"),
    "a weight of nothing": (lambda d: stream_of(d, weights=[1.0, float("nan")]), "positive and finite, got nan"),
    "a tiny weight": (
        lambda d: stream_of(d, weights=[1.0, 1e-9]),
        "weights must be at least one sample in 1048576, got 1e-09",
    ),
    "batch size": (lambda d: stream_of(d, batch_size=0), "batch_size must be at least 1, got 0"),
    "sequence length": (lambda d: stream_of(d, sequence_length=0), "sequence_length must be at least 1, got 0"),
    "mode": (lambda d: stream_of(d, packing="padded"), "packing must be one of block_causal, causal, got 'padded'"),
    "seed": (lambda d: stream_of(d, seed=-1), "seed must be at least 0, got -1"),
    "no documents": (
        lambda d: stream_of([TokenShards.open(d[0].folder, "validation")], weights=[]),
        "first: no documents to train on",
    ),
    "processes": (
        lambda d: loader(stream_of(d), process_count=3),
        "batch_size must be divisible by 3 processes, got 8",
    ),
    "process": (
        lambda d: loader(stream_of(d), process_index=2, process_count=2),
        r"process_index must be in \[0, 2\), got 2",
    ),
    "start": (lambda d: loader(stream_of(d), start_step=-1), "start_step must be at least 0, got -1"),
    "prefetch": (lambda d: loader(stream_of(d), prefetch=-1), "prefetch must be at least 0, got -1"),
    "evaluation of nothing": (
        lambda d: validation_batches(d, sequence_length=T, batch_size=0),
        "batch_size must be at least 1, got 0",
    ),
    "evaluation": (
        lambda d: validation_batches(d, sequence_length=T, batch_size=B, process_count=3),
        "batch_size must be divisible by 3 processes, got 8",
    ),
}


@pytest.mark.parametrize(("ask", "problem"), BAD.values(), ids=BAD)
def test_bad_arguments_give_one_line(datasets: list[TokenShards], ask: Callable, problem: str):
    with pytest.raises(ValueError, match=problem) as refused:
        ask(datasets)

    assert "\n" not in str(refused.value)


def test_datasets_of_two_tokenizers_are_refused(tmp_path: Path):
    one = byte_tokenizer(tmp_path / "one")
    other = byte_tokenizer(tmp_path / "other", fill=1)
    text = write_texts(tmp_path / "a.jsonl", ["some text"])
    for tokenizer in (one, other):
        tokenize(text, tokenizer, tmp_path / f"{tokenizer.name}.out", val_fraction=0.0)

    with pytest.raises(ValueError, match=r"other.out: written with another tokenizer"):
        stream_of([TokenShards.open(tmp_path / f"{name}.out") for name in ("one", "other")])
