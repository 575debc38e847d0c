"""Packing of examples, and batches of them.

Start at `test_packed_sequence_matches_literals`.
"""

import functools
import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.train.data import Stream, loader, validation_batches
from dsmoe_jax.train.sft import ExamplePacking, Examples, write_examples
from dsmoe_jax.train.sft.examples import Example
from dsmoe_jax.train.sft.packing import best_fit, pack_examples
from tests.helpers.corpus import byte_tokenizer

T = 32
BEST_FIT: dict[str, Any] = {"packer": ExamplePacking, "packing": "best_fit"}
modes = pytest.mark.parametrize("mode", ["best_fit", "none"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def write(home: Path, name: str, lengths: list[int], **options: Any) -> Path:
    """Examples of these lengths; the first two tokens encode the number of the example."""
    rng = np.random.default_rng(len(lengths))
    lines = []
    for number, size in enumerate(lengths):
        ids = [2 + number // 250, 2 + number % 250, *rng.integers(2, 250, size - 2).tolist()]
        learned = rng.random(size) < 0.5
        learned[-1] = True
        labels = [token if target else -100 for token, target in zip(ids, learned, strict=True)]
        lines.append(json.dumps({"input_ids": ids, "labels": labels}))
    (home / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer = home / "tokenizer"
    if not tokenizer.exists():
        byte_tokenizer(tokenizer)
    write_examples(home / f"{name}.jsonl", tokenizer, home / name, sequence_length=T, **options)
    return home / name


@pytest.fixture(scope="module")
def examples(home: Path) -> Examples:
    return Examples.open(write(home, "many", np.random.default_rng(0).integers(2, T + 1, 300).tolist()))


@pytest.fixture(scope="module")
def few(home: Path) -> Examples:
    return Examples.open(write(home, "few", [3, 32, 7, 20, 12]))


def unpack(sequences: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the examples in sequences, [sequences, 4, T]."""
    found = []
    for ids, labels, segments, positions in sequences:
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            found.append((ids[here].tolist(), labels[here].tolist()))
        padding = segments == 0
        assert not ids[padding].any()
        assert (labels[padding] == -100).all()
        assert (np.diff(padding.astype(int)) >= 0).all()  # at the end
    return found


def reference(examples: Examples) -> list[tuple[list[int], list[int]]]:
    """Reference: token ids and labels of each example, token by token."""
    found = []
    for number in range(len(examples)):
        tokens, loss_mask = (field.tolist() for field in examples.example(number))
        labels = [tokens[n + 1] if n + 1 < len(tokens) and loss_mask[n + 1] else -100 for n in range(len(tokens))]
        found.append((tokens, labels))
    return found


def epoch_of(packing: ExamplePacking, epoch: int) -> np.ndarray:
    return np.stack([packing.sequence(n) for n in packing.sequences_of(epoch)])


def test_packed_sequence_matches_literals():
    first = Example(np.array([0, 7, 8, 9], np.int32), np.array([False, False, True, True]))
    second = Example(np.array([0, 5, 6], np.int32), np.array([False, True, False]))

    assert pack_examples([first, second], 8).tolist() == [
        [0, 7, 8, 9, 0, 5, 6, 0],
        [-100, 8, 9, -100, 5, -100, -100, -100],
        [1, 1, 1, 1, 2, 2, 2, 0],
        [0, 1, 2, 3, 0, 1, 2, 0],
    ]
    assert pack_examples([], 2).tolist() == [[0, 0], [-100, -100], [0, 0], [0, 0]]


def test_best_fit_matches_literals():
    sizes = [6, 5, 4, 5, 3, 10, 1]

    assert best_fit(sizes, 10, 8).tolist() == [0, 1, 0, 1, 2, 3, 2]  # best fit
    assert best_fit(sizes, 10, 1).tolist() == [0, 1, 1, 2, 2, 3, 4]  # in order
    assert best_fit(sizes, 10, 0).tolist() == [0, 1, 2, 3, 4, 5, 6]


@modes
def test_every_example_is_in_every_epoch_once(examples: Examples, mode: str):
    packing = ExamplePacking(examples, sequence_length=T, seed=3, packing=mode)

    epochs = [epoch_of(packing, epoch) for epoch in range(3)]

    assert all(sorted(unpack(sequences)) == sorted(reference(examples)) for sequences in epochs)
    assert len({str(unpack(sequences)) for sequences in epochs}) == 3  # each in another order
    if mode == "none":
        assert all(sequences[:, 2].max() == 1 for sequences in epochs)
    else:
        assert all((sequences[:, 2] > 0).mean() > 0.93 for sequences in epochs)
        assert len({len(sequences) for sequences in epochs}) > 1


def test_epochs_are_contiguous(examples: Examples):
    packing = ExamplePacking(examples, sequence_length=T, seed=3)

    numbers = [n for epoch in (3, 0, 1, 2) for n in packing.sequences_of(epoch)]

    assert sorted(numbers) == list(range(len(numbers)))


@modes
def test_sequences_do_not_depend_on_access_order_or_threads(few: Examples, mode: str):
    make = functools.partial(ExamplePacking, few, sequence_length=T, seed=5, packing=mode)
    numbers = [*range(60)]
    want = [make().sequence(n).tolist() for n in numbers]

    shared = make()
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda n: shared.sequence(n).tolist(), numbers))
    backwards = make()

    assert want == threads
    assert want == [backwards.sequence(n).tolist() for n in numbers[::-1]][::-1]


def test_seed_and_dataset_determine_the_order(examples: Examples):
    keys = itertools.product((0, 1), (0, 1))
    packings = [ExamplePacking(examples, sequence_length=T, seed=seed, dataset=dataset) for seed, dataset in keys]

    assert len({str(epoch_of(packing, 0)) for packing in packings}) == 4


def test_emptier_sequences_are_spread_over_an_epoch(examples: Examples):
    packing = ExamplePacking(examples, sequence_length=T, seed=0)
    emptiest = [(epoch_of(packing, epoch)[:, 2] == 0).sum(axis=1).argmax() for epoch in range(8)]

    places = np.array(emptiest) / len(packing.sequences_of(0))

    assert places.min() < 0.5


def test_longer_sequence_holds_more_examples(few: Examples):
    packing = ExamplePacking(few, sequence_length=80, seed=0)

    assert len(packing.sequences_of(0)) == 1
    assert sorted(unpack(epoch_of(packing, 0))) == sorted(reference(few))


def test_stream_of_examples_does_not_depend_on_processes(examples: Examples, few: Examples):
    def stream(**options: Any) -> Stream:
        usual: dict[str, Any] = {"sequence_length": T, "batch_size": 4, "seed": 7, "packing": "best_fit"}
        return Stream([examples, few], [3.0, 1.0], packer=ExamplePacking, **(usual | options))

    expected = [[field.tolist() for field in stream().batch(step)] for step in range(20)]
    halves = [loader(stream(), process_index=h, process_count=2) for h in (0, 1)]
    joined = [
        [np.concatenate(fields).tolist() for fields in zip(*(next(half) for half in halves), strict=True)]
        for _ in range(20)
    ]
    for half in halves:
        half.close()  # pyright: ignore

    assert joined == expected
    same, other = stream().identity, stream(packing="none").identity
    assert same["datasets"] == [examples.digest, few.digest]
    assert [name for name in same if same[name] != other[name]] == ["packing"]
    assert json.loads(json.dumps(same)) == same


def test_examples_of_two_tokenizers_are_refused(tmp_path: Path, few: Examples):
    byte_tokenizer(tmp_path / "tokenizer", fill=1)
    other = Examples.open(write(tmp_path, "other", [4, 5]))

    with pytest.raises(ValueError, match="other: written with another tokenizer"):
        Stream([few, other], sequence_length=T, batch_size=2, seed=0, packing="best_fit", packer=ExamplePacking)


@modes
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_validation_reads_every_example_once_in_order(examples: Examples, few: Examples, mode: str, processes: int):
    parts = [
        [
            np.stack(batch, axis=1)
            for batch in validation_batches(
                [examples, few],
                sequence_length=T,
                batch_size=8,
                packing=mode,
                packer=ExamplePacking,
                process_index=h,
                process_count=processes,
            )
        ]
        for h in range(processes)
    ]

    sequences = np.concatenate([np.concatenate(batches) for batches in zip(*parts, strict=True)])
    found, want = unpack(sequences), reference(examples)
    assert len(sequences) % 8 == 0
    assert Counter(map(str, found)) == Counter(map(str, want + reference(few)))
    assert [one for one in found if one in want] == want
    assert reference(few)[0] in found[:30]  # datasets are interleaved


def test_empty_validation_split_gives_no_batch(examples: Examples):
    empty = Examples.open(examples.folder, "validation", verify=True)

    assert list(validation_batches([empty], **BEST_FIT, sequence_length=T, batch_size=2)) == []
    assert list(validation_batches([], **BEST_FIT, sequence_length=T, batch_size=2)) == []
    with pytest.raises(ValueError, match="many: no examples to train on"):
        ExamplePacking(empty, sequence_length=T, seed=0)


def test_bad_shapes_are_refused(examples: Examples):
    with pytest.raises(ValueError, match="many: sequence_length must be at least 32, the longest example, got 31"):
        ExamplePacking(examples, sequence_length=31, seed=0)
    with pytest.raises(ValueError, match="packing must be one of best_fit, none, got 'block_causal'"):
        ExamplePacking(examples, sequence_length=T, seed=0, packing="block_causal")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        ExamplePacking(examples, sequence_length=T, seed=-1).sequence(0)
    with pytest.raises(ValueError, match="the longest example, got 31"):
        validation_batches([examples], **BEST_FIT, sequence_length=31, batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be divisible by 2 processes, got 3"):
        validation_batches([examples], **BEST_FIT, sequence_length=T, batch_size=3, process_count=2)
