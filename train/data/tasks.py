"""Tokenization on many machines: independent tasks, and the merge of their work. Start at `tokenize_task`.

Task I of N takes pieces I, I + N, … of the sources. `OUT.tasks` has `plan.json`, what determines the output, the
tokenizer, and for each piece its shards and, when they are complete, its record `000012.json`. A task that is killed
and run again takes the pieces without a record.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, plural, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, check_new_path, sync, write_json
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.manifest import hash_json
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer import tokenizer_files

from .join import Record, link
from .shards import TOKENIZER, is_token_shards, tokenizer_hash
from .tokenization import TokenizationJob, Work, finalize
from .writer import ShardStats, Sources

_PLAN: Final = "plan.json"
_NAMED: Final = 20  # missing tasks in a message


class TaskStats(NamedTuple):
    """What a task has done: `pieces` of all `total` pieces, `new` ones of them in this call."""

    out: Path
    task: int
    tasks: int
    pieces: int
    new: int
    total: int

    def __str__(self) -> str:
        """Return one line."""
        mine = f"{plural(self.pieces, 'piece')} of {self.total:,} complete, {self.new:,} of them new"
        return f"{self.out}: task {self.task} of {self.tasks}: {mine}"


def tokenize_task(
    sources: Sources,
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    task: int,
    tasks: int,
    workers: int | None = None,
    progress: Meter = silent,
    **options: Any,
) -> TaskStats:
    """Tokenize every `tasks`-th piece of the sources, for `merge`.

    All tasks need the same arguments and must see the sources and the parent folder of `out`.

    Args:
        sources: One or more sources; see `documents`.
        tokenizer_folder: Holds the tokenizer's files.
        out: Output folder of the merge; must not exist.
        task: This task, in [0, `tasks`).
        tasks: Number of tasks.
        workers: See `tokenize`.
        progress: Shows the bytes read.
        **options: Options of `TokenizationJob`.

    Raises:
        DSMoEError: As `tokenize`, or the sources or arguments differ from those of another task.
    """
    if tasks < 1:
        raise DSMoEError(f"tasks must be at least 1, got {tasks}")
    if not 0 <= task < tasks:
        raise DSMoEError(f"task must be in [0, {tasks}), got {task}")
    out = check_new_path(out)
    folder = _folder_of(out)
    exclude = [*options.pop("exclude", ()), folder]
    job = TokenizationJob(sources, tokenizer_folder, out, exclude=exclude, **options)
    try:
        with lock_name(folder, f"{task}.lock"):
            _agree(folder, json.loads(json.dumps({**job.plan, "tasks": tasks})), job.tokenizer_files)
            plan_hash, mine = hash_json(_read_plan(folder)), range(task, len(job.pieces), tasks)
            before = _finished(folder, mine)
            finished = dict(before)

            def finish(unit: str, record: Record) -> None:
                finished[unit] = {**record, "plan": plan_hash}
                write_json(_record(folder, int(unit)), finished[unit])

            job.encode(Work(folder, before, finish), numbers=mine, workers=workers, progress=progress)
    except OSError as error:
        raise DSMoEError(f"{folder} cannot be written: {error.strerror}") from None
    return TaskStats(out, task, tasks, len(mine), len(finished) - len(before), len(job.pieces))


def merge(out: str | Path) -> ShardStats:
    """Join the work of all tasks into token shards, equal to those of `tokenize`, and remove `OUT.tasks`.

    Args:
        out: Output folder of the tasks.

    Returns:
        The number of documents and tokens per split.

    Raises:
        DSMoEError: A task is not complete, the tasks had different sources, or the disk is full.
    """
    out = Path(out)
    folder = _folder_of(out)
    if not (folder / _PLAN).exists():
        raise DSMoEError(f"{out}: no tasks to merge (no {folder / _PLAN})")
    plan = _read_plan(folder)
    if is_token_shards(out):  # a merge was killed when it removed the tasks
        raise DSMoEError(f"{out} exists; remove {folder}")
    tasks, total = plan.pop("tasks"), plan["pieces"]
    plan_hash, finished = hash_json({**plan, "tasks": tasks}), _finished(folder, range(total))
    if missing := [number for number in range(total) if str(number) not in finished]:
        names = sorted({number % tasks for number in missing})
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        listed = ", ".join(map(str, names[:_NAMED])) + more
        lacking = f"{plural(len(missing), 'piece')} of {total:,} missing"
        raise DSMoEError(f"{out}: tasks {listed} of {tasks} are not complete ({lacking}): run them again")
    records = [finished[str(number)] for number in range(total)]
    if other := next((n for n, record in enumerate(records) if record["plan"] != plan_hash), None):
        raise DSMoEError(f"{folder}: piece {other} is of other sources or arguments; remove the folder and start again")
    tokenizer = folder / TOKENIZER
    if tokenizer_hash(tokenizer) != plan["manifest"]["tokenizer_sha256"]:
        raise DSMoEError(f"{tokenizer}: damaged: SHA-256 mismatch")
    try:
        with atomic_dir(out) as staging:
            files = tokenizer_files(tokenizer)
            stats = finalize(plan, records, folder, out, staging.folder, tokenizer_files=files, take=link)
        shutil.rmtree(folder)
    except OSError as error:
        raise DSMoEError(f"{out} cannot be written: {error.strerror}") from None
    return stats


def _folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.tasks")


def _record(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _finished(folder: Path, numbers: range) -> dict[str, Any]:
    """Return the records of finished pieces by number."""
    paths = {number: _record(folder, number) for number in numbers}
    return {str(number): read_json(path) for number, path in paths.items() if path.exists()}


def _read_plan(folder: Path) -> dict[str, Any]:
    return read_json(folder / _PLAN)


def _agree(folder: Path, plan: Mapping[str, Any], tokenizer: tuple[Path, ...]) -> None:
    """Write the plan of the first task; raise `DSMoEError` if it differs from this one's."""
    if not (folder / _PLAN).exists():
        (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
        for file in tokenizer:
            temporary = folder / TOKENIZER / f".{file.name}.{os.getpid()}"
            shutil.copyfile(file, temporary).replace(folder / TOKENIZER / file.name)
        temporary = folder / f".plan.{os.getpid()}"
        write_json(temporary, plan)
        with contextlib.suppress(FileExistsError):  # by another task: all write the same, or are refused below
            (folder / _PLAN).hardlink_to(temporary)
        temporary.unlink()
        sync(folder)
    first = _read_plan(folder)
    if first == plan:
        return
    if first["tasks"] != plan["tasks"]:
        raise DSMoEError(f"tasks must be {first['tasks']}, as in the other tasks of {folder}, got {plan['tasks']}")
    old, new = ({row[1]: row[2:] for row in one["files"]} for one in (first, plan))
    changed = next((path for path in [*new, *old] if old.get(path) != new.get(path)), None)
    if changed is not None:
        raise DSMoEError(f"{changed}: has changed since the first task; remove {folder} and start again")
    nested = ("selection", "manifest")
    before, now = ({**one["selection"], **one["manifest"], **one} for one in (first, plan))
    name = next((key for key in now if key not in nested and before.get(key) != now[key]), "arguments")
    was, got = before.get(name), now.get(name)
    raise DSMoEError(f"{name} must be {was!r:.80}, as in the other tasks of {folder}, got {got!r:.80}")
