"""What a suite consists of, as shell commands: `dataset_commands` download it, `harness_commands` run it with torch."""

import shlex
from collections.abc import Iterator
from typing import Any

from dsmoe_jax.evaluate.suites import Row, Suite
from dsmoe_jax.evaluate.task_data import used_splits
from dsmoe_jax.evaluate.task_loading import TASKS, TaskLoader
from dsmoe_jax.progress import plural


def dataset_commands(loader: TaskLoader, suite: Suite, data: str) -> list[str]:
    """Return the shell commands that download every dataset of a suite to `data`, once each.

    Comments name the files that can replace them: the splits that each task uses.
    """
    leaves = {row.task: list(loader.leaves(row.task)) for row in suite.rows}
    paths = [config.get("dataset_path") for found in leaves.values() for _, config in found]
    repositories = sorted({path for path in paths if isinstance(path, str) and path.count("/") == 1})
    commands = [f"hf download --repo-type dataset {name} --local-dir {data}/{name}" for name in repositories]
    return [*commands, "# or files of your own, .jsonl or .parquet:", *dict.fromkeys(_files(leaves, data))]


def _files(leaves: dict[str, list[tuple[str, dict[str, Any]]]], data: str) -> Iterator[str]:
    for row, found in leaves.items():
        name, config = found[0]
        others = f" and those of {plural(len(found) - 1, 'more task')} of {row}" if len(found) > 1 else ""
        splits = used_splits(config)
        files = splits[0] if len(splits) == 1 else f"{{{','.join(splits)}}}"
        yield f"# {data}/{name}/{files}.jsonl{others}"


def harness_commands(loader: TaskLoader, suite: Suite, model: str, *, unsafe: bool = False) -> list[str]:
    """Return the commands of lm-evaluation-harness that evaluate a PyTorch model on the tasks of a suite.

    Args:
        loader: Knows the tasks.
        suite: The tasks; those with equal shots share a command.
        model: Its `pretrained` argument.
        unsafe: Whether to include tasks that run generated code.

    Returns:
        Shell commands.
    """
    commands = []
    rows = [row for row in suite.rows if unsafe or not loader.runs_code(row.task)]
    for shots in dict.fromkeys(row.shots for row in rows):
        tasks = [row for row in rows if row.shots == shots]
        commands.append(_harness_command(tasks, model, shots, any(loader.runs_code(row.task) for row in tasks)))
    return commands


def _harness_command(rows: list[Row], model: str, shots: int | None, unsafe: bool) -> str:
    options = ["--include_path", str(TASKS)]
    options += [] if shots is None else ["--num_fewshot", str(shots)]
    options += ["--confirm_run_unsafe_code"] if unsafe else []
    tasks = ",".join(row.task for row in rows)
    command = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", tasks, *options]
    return ("HF_ALLOW_CODE_EVAL=1 " if unsafe else "") + shlex.join(command)
