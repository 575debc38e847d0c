"""Examples that are too long for a row, cut so that there is something left to learn: `shorten`."""

import numpy as np

from .templates import Example


def shorten(example: Example, length: int, bos: int | None) -> Example:
    """At most `length` tokens of the example, of them at least min(first run of targets, length // 2) targets.

    The end is cut off. Where that leaves fewer targets than promised, the start of the prompt goes instead, but for
    its BOS, and what is left ends with the last promised target.
    """
    tokens, is_target = example
    if len(tokens) <= length:
        return example
    first = int(is_target.argmax())
    run = int(np.append(is_target[first:], False).argmin())
    promised = min(run, length // 2)
    if is_target[:length].sum() >= promised:
        return Example(tokens[:length], is_target[:length])
    stop = first + promised
    kept = np.arange(stop - length, stop)
    if tokens[0] == bos:
        kept[0] = 0
    return Example(tokens[kept], is_target[kept])
