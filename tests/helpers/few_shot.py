"""Multiple-choice questions of token ids, after few-shot examples."""

import random


def questions(
    count: int, *, shots: int, same_shots: bool = True, vocab: int = 300, seed: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Return four (context, continuation) per question; each example and question has 20 to 30 tokens."""
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(2, vocab) for _ in range(rng.randint(low, high))]  # noqa: E731
    pairs = []
    examples = [token for _ in range(shots) for token in draw(20, 30)]
    for _ in range(count):
        examples = examples if same_shots else [token for _ in range(shots) for token in draw(20, 30)]
        context = [1, *examples, *draw(20, 30)]
        pairs += [(context, draw(1, 4)) for _ in range(4)]
    return pairs
