"""A task from your own texts, to follow a training run: `write_continuations`."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import write_text
from dsmoe_jax.storage.paths import user_path

_TASK: Final = """\
# Which of several passages continues a text? The others come from elsewhere in the same texts.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc_mutual_info  # probability after the context over that without it: some passages are likely anywhere
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_continuations(
    texts: Iterable[str],
    out: str | Path,
    *,
    name: str = "continuations",
    questions: int = 200,
    choices: int = 4,
    context_chars: int = 400,
    choice_chars: int = 80,
    seed: int = 0,
) -> Path:
    """Write a multiple-choice task for `--include-path` and `--eval-tasks-include`.

    Args:
        texts: Held-out texts; each gives a question per `context_chars` and `choice_chars` characters.
        out: Folder of the task file and its data.
        name: Name of the task.
        questions: Maximum number of questions, drawn at random.
        choices: Passages to choose from; chance is 1 / `choices`.
        context_chars: Characters of a context.
        choice_chars: Characters of a passage.
        seed: Seed of the questions.

    Returns:
        The task file.

    Raises:
        DSMoEError: An argument is out of range, or the texts are too short for one question.
    """
    for argument, value, least in (("questions", questions, 1), ("choices", choices, 2)):
        if value < least:
            raise DSMoEError(f"{argument} must be at least {least}, got {value}")
    size = context_chars + choice_chars
    passages = [
        _split(text[at : at + size], context_chars) for text in texts for at in range(0, len(text) - size + 1, size)
    ]
    if len(passages) < choices:
        raise DSMoEError(f"texts must have at least {choices} passages of {size} characters, got {len(passages)}")
    rng = random.Random(seed)
    lines = []
    for context, true in rng.sample(passages, min(questions, len(passages))):
        others = {other for _, other in rng.sample(passages, min(4 * choices, len(passages)))} - {true}
        options = [true, *sorted(others)[: choices - 1]]
        if len(options) < choices:
            continue
        rng.shuffle(options)
        question = {"context": context, "choices": options, "answer": options.index(true)}
        lines.append(json.dumps(question, ensure_ascii=False) + "\n")
    folder = user_path(out, "out").absolute()
    data, task = folder / name / "test.jsonl", folder / f"{name}.yaml"  # where `--data` finds it, too
    data.parent.mkdir(parents=True, exist_ok=True)
    write_text(data, "".join(lines))
    write_text(task, _TASK.format(name=name, data=json.dumps(str(data))))
    return task


def _split(passage: str, at: int) -> tuple[str, str]:
    """Split a passage between words if there is a space: the continuation starts with it and ends with a word."""
    start = passage.rfind(" ", 1, at + 1)
    end = passage.rfind(" ", at + 1)
    start, end = (start if start > 0 else at), (end if end > 0 else len(passage))
    return passage[:start], passage[start:end]
