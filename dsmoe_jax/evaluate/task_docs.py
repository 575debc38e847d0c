"""Functions that the task files in `tasks/` apply to their documents."""

import re
from typing import Any

_BLANK = re.compile(r"#idiom\d+#")


def split_blanks(dataset: Any) -> Any:
    """Make a document of every blank of ChID: `before`, `choices` (idiom and what follows) and `answer`.

    A document of the dataset has several texts, whose blanks `#idiom000123#` are answered in order of appearance. Other
    blanks of the same text are filled with their answers.
    """
    return dataset.map(_blanks_of_batch, batched=True, remove_columns=dataset.column_names)


def _blanks_of_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"before": [], "choices": [], "answer": []}
    for candidates, texts, answers in zip(batch["candidates"], batch["content"], batch["answers"], strict=True):
        ids = answers["candidate_id"] if isinstance(answers, dict) else [answer["candidate_id"] for answer in answers]
        answer_of = iter(ids)
        for text in texts:
            pieces = _BLANK.split(text)
            right = [next(answer_of) for _ in pieces[1:]]
            for i, answer in enumerate(right):
                filled = [candidates[one] for one in right]
                before = _join(pieces[: i + 1], filled[:i])
                after = _join(pieces[i + 1 :], filled[i + 1 :])
                found["before"].append(before)
                found["choices"].append([idiom + after for idiom in candidates])
                found["answer"].append(answer)
    return found


def _join(pieces: list[str], filled: list[str]) -> str:
    """Return the pieces with what fills the blanks between them."""
    return "".join(part for pair in zip(pieces, [*filled, ""], strict=True) for part in pair)
