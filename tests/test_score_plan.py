"""Which tokens scoring reads once: rows with a trunk and branches, groups with a prefix."""

import dataclasses
import random

import numpy as np
import pytest

from dsmoe_jax.config import RopeScaling
from dsmoe_jax.generate.programs import power_of_two
from dsmoe_jax.generate.score_plan import Batch, Group, Pair, plan
from dsmoe_jax.generate.scoring import _Inputs
from tests.helpers import small
from tests.helpers.few_shot import questions

DYNAMIC = dataclasses.replace(small.SMALL, max_position_embeddings=20, rope_scaling=RopeScaling("dynamic", 2.0))


def pairs_of(ids: list[tuple[list[int], list[int]]]) -> list[Pair]:
    return [Pair(np.array([*context, *new], np.int32), len(new)) for context, new in ids]


def unrelated(lengths: list[int]) -> list[Pair]:
    """Pairs of which the model reads so many tokens, and that begin differently."""
    return [Pair(np.array([i, *range(1, n), 1], np.int32), 1) for i, n in enumerate(lengths)]


def planned(pairs: list[Pair], *, context_length: int = 4096, max_tokens: int = 2048, **options) -> list[Group]:
    return plan(pairs, small.SMALL, context_length=context_length, max_tokens=max_tokens, **options)


def batches_of(groups: list[Group]) -> list[tuple[int, Batch]]:
    return [(group.prefix, batch) for group in groups for batch in group.batches]


def tokens_read(groups: list[Group]) -> int:
    rows = [row.length - prefix for prefix, batch in batches_of(groups) for row in batch.rows]
    return sum(rows) + sum(group.prefix for group in groups)


def test_batches_respect_max_tokens_and_cover_every_pair():
    rng = random.Random(5)
    lengths = [rng.randint(1, 300) for _ in range(300)]

    batches = [one for _, one in batches_of(planned(unrelated(lengths), context_length=300, max_tokens=1024))]

    assert sorted(i for batch in batches for row in batch.rows for i in row.pairs) == list(range(300))
    assert all(batch.size * batch.length <= 1024 for batch in batches)
    assert all(batch.size // 2 < len(batch.rows) <= batch.size for batch in batches)
    assert all(max(row.length for row in batch.rows) <= batch.length <= 300 for batch in batches)
    assert [batch.length for batch in batches] == sorted((batch.length for batch in batches), reverse=True)


def test_stretched_pairs_share_batches_by_length():
    lengths = [18, 19, 20, 21, 22, 22, 24]

    groups = plan(unrelated(lengths), DYNAMIC, context_length=256, max_tokens=2048)

    found = [[lengths[i] for row in batch.rows for i in row.pairs] for _, batch in batches_of(groups)]
    assert found == [[24], [22, 22], [21], [20, 19, 18]]


def test_choices_of_a_question_share_a_row():
    question = list(range(2, 40))
    pairs = pairs_of([(question, [50]), (question, [51, 52]), (question, [51, 53, 54])])

    ((prefix, batch),) = batches_of(planned(pairs))

    (row,) = batch.rows
    assert (prefix, row.trunk, row.length) == (0, 38, 38 + 0 + 1 + 2)


def test_options_before_a_shared_ending_share_a_row():  # as in WinoGrande
    start, ending = list(range(2, 40)), [60, 61, 62]
    pairs = pairs_of([([*start, 50], ending), ([*start, 51, 52], ending)])

    ((_, batch),) = batches_of(planned(pairs))

    assert [(row.trunk, len(row.pairs)) for row in batch.rows] == [(38, 2)]


def test_long_continuations_after_a_short_context_stay_apart():
    pairs = pairs_of([([1], list(range(2, 60))), ([1], list(range(70, 90)))])  # windows of `perplexity`

    assert all(len(row.pairs) == 1 for _, batch in batches_of(planned(pairs)) for row in batch.rows)


def test_few_shot_examples_are_read_once():
    pairs = pairs_of(questions(200, shots=5))

    shared, alone = planned(pairs), planned(pairs, share=False)

    assert [group.prefix > 0 for group in shared] == [True]
    assert tokens_read(alone) == sum(pair.length for pair in pairs)
    assert tokens_read(shared) <= tokens_read(alone) / 15  # 6,393 of 119,820


def test_shots_of_each_question_are_read_once_per_question():
    pairs = pairs_of(questions(50, shots=5, same_shots=False))

    assert tokens_read(planned(pairs)) <= sum(pair.length for pair in pairs) / 3.5  # four choices


def test_each_subject_has_its_own_prefix():
    subjects = [questions(20, shots=3, seed=seed) for seed in range(4)]

    groups = planned(pairs_of([pair for subject in subjects for pair in subject]))

    assert sum(group.prefix > 0 for group in groups) == 4


def test_copies_of_a_prefix_are_bounded():
    pairs = pairs_of(questions(64, shots=80))

    for group in planned(pairs, max_tokens=512):
        assert all((group.prefix + one.length) * one.size <= 8 * 512 or one.size == 1 for one in group.batches)


@pytest.mark.parametrize("seed", range(20))
def test_layout_of_random_pairs_reads_every_pair(seed: int):
    rng = random.Random(seed)
    stems = [[rng.randrange(9) for _ in range(rng.choice([3, 30, 90]))] for _ in range(4)]
    ids = []
    for _ in range(30):
        context = [*rng.choice(stems), *(rng.randrange(9) for _ in range(rng.randrange(12)))]
        new = [rng.randrange(9) for _ in range(rng.randint(1, 10))]
        ids += [(context, new)] * rng.randint(1, 2) + [(context, [*new, 1])] * rng.randrange(2)
    pairs = pairs_of(ids)

    seen = []
    for prefix, batch in batches_of(planned(pairs, max_tokens=256)):
        first = pairs[batch.rows[0].pairs[0]]
        inputs = _Inputs.of(batch, pairs, prefix)
        at, targets = np.asarray(inputs.positions).ravel(), np.asarray(inputs.targets).ravel()
        end = 0
        assert batch.size == power_of_two(len(batch.rows))
        for i in [i for row in batch.rows for i in row.pairs]:
            pair = pairs[i]
            seen.append(i)
            assert prefix < pair.context
            assert (pair.tokens[:prefix] == first.tokens[:prefix]).all()
            start, end = end, end + pair.predicted
            assert targets[start:end].tolist() == pair.tokens[pair.context :].tolist()
            for offset, place in enumerate(at[start:end]):
                # What the position attends to, by the rule of the mask, is the pair up to there.
                row, column = divmod(int(place), batch.length)
                branch = inputs.branches[row, column]
                visible = [c for c in range(column + 1) if inputs.branches[row, c] in (0, branch)]
                read = [*first.tokens[:prefix].tolist(), *(int(inputs.token_ids[row, c]) for c in visible)]
                assert read == pair.tokens[: pair.context + offset].tolist()
                expected = list(range(prefix, len(read)))
                assert [int(inputs.position_ids[row, c]) for c in visible] == expected
    assert sorted(seen) == list(range(len(pairs)))
