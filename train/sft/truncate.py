"""Truncation of examples that exceed the sequence length: `truncate`."""

import numpy as np

from .examples import Example


def truncate(example: Example, length: int, bos: int | None) -> Example:
    """Truncate an example to `length` tokens at the end.

    If that left fewer loss tokens than min(first run of them, length // 2), the start of the prompt except `bos` is cut
    instead, and the example ends with the last of that number.
    """
    tokens, loss_mask = example
    if len(tokens) <= length:
        return example
    first = int(loss_mask.argmax())
    run = int(np.append(loss_mask[first:], False).argmin())
    required = min(run, length // 2)
    if loss_mask[:length].sum() >= required:
        return Example(tokens[:length], loss_mask[:length])
    stop = first + required
    indices = np.arange(stop - length, stop)
    if tokens[0] == bos:
        indices[0] = 0
    return Example(tokens[indices], loss_mask[indices])
