"""Small tasks of the three kinds with local data, for the tests of evaluation: `write_tasks`."""

import json
import random
from pathlib import Path

CHOICES, COPY, TEXTS = "local_choices", "local_copy", "local_texts"
TASKS = (CHOICES, COPY, TEXTS)
NUM_DOCS = 12
_WORDS = (
    "import",
    "return",
    "assert",
    "path",
    "model",
    "token",
    "layer",
    "expert",
    "router",
    "batch",
    "shape",
    "value",
)
_YAML = {
    CHOICES: """
task: local_choices
dataset_path: owner/choices
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: options
doc_to_target: answer
num_fewshot: 2
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
""",
    COPY: """
task: local_copy
dataset_path: owner/copy
output_type: generate_until
test_split: test
doc_to_text: "{{question}} "
doc_to_target: "{{options[0]}}"
generation_kwargs:
  until: ["\\n", "self"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
""",
    TEXTS: """
task: local_texts
dataset_path: owner/texts
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1.0
""",
}


def documents(seed: int, count: int = NUM_DOCS) -> list[dict[str, object]]:
    rng = random.Random(seed)
    return [
        {
            "question": " ".join(rng.choices(_WORDS, k=rng.randrange(2, 12))),
            "options": rng.sample(_WORDS, 3),
            "answer": rng.randrange(3),
        }
        for _ in range(count)
    ]


def write_tasks(home: Path) -> tuple[Path, Path]:
    """Return the folder of task files and that of their data."""
    tasks, data = home / "tasks", home / "data"
    tasks.mkdir(parents=True)
    for seed, (name, text) in enumerate(_YAML.items()):
        (tasks / f"{name}.yaml").write_text(text)
        for split in ("train", "test"):
            write_split(data / name / f"{split}.jsonl", documents(seed + 100 * (split == "train")))
    return tasks, data


def write_split(path: Path, docs: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
