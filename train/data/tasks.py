"""Tokenization on many machines: independent tasks, and the merge of their work. Start at `tokenize_task`.

Task I of N takes pieces I, I + N, … of the sources. `OUT.tasks` has `plan.json`, what determines the output, the
tokenizer, and for each piece its shards and, when they are complete, its record `000012.json`. A task that is killed
and run again takes the pieces without a record.
"""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, plural, silent
from dsmoe_jax.storage.atomic_dir import atomic_dir, sync
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.manifest import hash_json
from dsmoe_jax.storage.remote import any_path, link_file, load_json, remove_tree, save_json
from dsmoe_jax.text.tokenizer import tokenizer_files

from .join import Record
from .shards import MANIFEST, TOKENIZER, tokenizer_hash
from .tokenization import TokenizationJob, Work, finalize
from .writer import ShardStats, Sources

_PLAN: Final = "plan.json"
_FILES: Final = "files.txt"  # the files of the sources, to name one that changes
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
    path = check_new(out)
    folder = folder_of(path)
    exclude = [*options.pop("exclude", ()), folder]
    job = TokenizationJob(sources, tokenizer_folder, path, exclude=exclude, **options)
    # An object store has no locks; two copies of a task write the same.
    lock = lock_name(folder, f"{task}.lock") if isinstance(folder, Path) else contextlib.nullcontext()
    try:
        with lock:
            _agree(folder, json.loads(json.dumps({**job.plan, "tasks": tasks})), job)
            plan_hash, mine = hash_json(load_json(folder / _PLAN)), range(task, len(job.pieces), tasks)
            before = _finished(folder, mine)
            finished = dict(before)

            def finish(unit: str, record: Record) -> None:
                finished[unit] = {**record, "plan": plan_hash}
                save_json(_record(folder, int(unit)), finished[unit])

            job.encode(Work(folder, before, finish), numbers=mine, workers=workers, progress=progress)
    except ChildProcessError as error:
        raise DSMoEError(str(error)) from None
    except OSError as error:
        raise DSMoEError(f"{folder} cannot be written: {error.strerror}") from None
    return TaskStats(path, task, tasks, len(mine), len(finished) - len(before), len(job.pieces))


def merge(out: str | Path) -> ShardStats:
    """Join the work of all tasks into token shards, equal to those of `tokenize`, and remove `OUT.tasks`.

    Args:
        out: Output folder of the tasks.

    Returns:
        The number of documents and tokens per split.

    Raises:
        DSMoEError: A task is not complete, the tasks had different sources, or the disk is full.
    """
    path = any_path(out, "out")
    folder = folder_of(path)
    if not (folder / _PLAN).exists():
        raise DSMoEError(f"{out}: no tasks to merge (no {folder / _PLAN})")
    plan = load_json(folder / _PLAN)
    check_new(out, hint=f"; if it is complete, remove {folder}")
    tasks, total, plan_hash = plan["tasks"], plan["pieces"], hash_json(plan)
    finished = _finished(folder, range(total))
    if missing := [number for number in range(total) if str(number) not in finished]:
        names = sorted({number % tasks for number in missing})
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        listed = ", ".join(map(str, names[:_NAMED])) + more
        lacking = f"{plural(len(missing), 'piece')} of {total:,} missing"
        raise DSMoEError(f"{out}: tasks {listed} of {tasks} are not complete ({lacking}): run them again")
    records = [finished[str(number)] for number in range(total)]
    if other := next((n for n, record in enumerate(records) if record["plan"] != plan_hash), None):
        raise DSMoEError(f"{folder}: piece {other} is of other sources or arguments; remove the folder and start again")
    try:
        with contextlib.ExitStack() as stack:
            tokenizer = _local_tokenizer(folder, plan, stack)
            if tokenizer_hash(tokenizer) != plan["manifest"]["tokenizer_sha256"]:
                raise DSMoEError(f"{folder / TOKENIZER}: damaged: SHA-256 mismatch")
            staging = stack.enter_context(atomic_dir(path)).folder if isinstance(path, Path) else path
            options: dict[str, Any] = {"tokenizer_files": tokenizer_files(tokenizer), "take": link_file}
            stats = finalize(plan, records, folder, path, staging, **options)
        remove_tree(folder)
    except OSError as error:
        raise DSMoEError(f"{out} cannot be written: {error.strerror}") from None
    return stats


def folder_of(out: Any) -> Any:
    """Return the folder of the work of the tasks."""
    return out.with_name(f"{out.name}.tasks")


def check_new(out: str | Path, hint: str = "") -> Any:
    """Return the path of an output; raise `DSMoEError` if it exists."""
    path = any_path(out, "output path")
    path = path.absolute() if isinstance(path, Path) else path
    if (path if isinstance(path, Path) else path / MANIFEST).exists():  # a merge that was killed is repeated
        raise DSMoEError(f"{path} exists; nothing is overwritten{hint}")
    return path


def _local_tokenizer(folder: Any, plan: Mapping[str, Any], stack: contextlib.ExitStack) -> Path:
    """Return a folder with the files of the tokenizer."""
    if isinstance(folder, Path):
        return folder / TOKENIZER
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in plan["tokenizer_files"]:
        (copy / name).write_bytes((folder / TOKENIZER / name).read_bytes())
    return copy


def _record(folder: Any, number: int) -> Any:
    return folder / f"{number:06d}.json"


def _finished(folder: Any, numbers: range) -> dict[str, Any]:
    """Return the records of finished pieces by number."""
    paths = {number: _record(folder, number) for number in numbers}
    return {str(number): load_json(path) for number, path in paths.items() if path.exists()}


def _agree(folder: Any, plan: dict[str, Any], job: TokenizationJob) -> None:
    """Write the plan of the first task; raise `DSMoEError` if it differs from this one's."""
    plan["tokenizer_files"] = [file.name for file in job.tokenizer_files]
    if not (folder / _PLAN).exists():
        if isinstance(folder, Path):
            (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
        for file in job.tokenizer_files:
            _write(folder / TOKENIZER / file.name, file.read_bytes())
        _write(folder / _FILES, "\n".join(job.files).encode())
        _write(folder / _PLAN, json.dumps(plan, indent=2, sort_keys=True).encode(), replace=False)
    first = load_json(folder / _PLAN)
    if first == plan:
        return
    if first["tasks"] != plan["tasks"]:
        raise DSMoEError(f"tasks must be {first['tasks']}, as in the other tasks of {folder}, got {plan['tasks']}")
    if first["files"] != plan["files"]:
        lines = (folder / _FILES).read_bytes().decode().split("\n")
        changed = next(iter(sorted(set(job.files) ^ set(lines))), "")
        path = changed.split(" ", 3)[-1]
        raise DSMoEError(f"{path}: has changed since the first task; remove {folder} and start again")
    nested = ("selection", "manifest")
    before, now = ({**one["selection"], **one["manifest"], **one} for one in (first, plan))
    name = next((key for key in now if key not in nested and before.get(key) != now[key]), "arguments")
    was, got = before.get(name), now.get(name)
    raise DSMoEError(f"{name} must be {was!r:.80}, as in the other tasks of {folder}, got {got!r:.80}")


def _write(path: Any, data: bytes, *, replace: bool = True) -> None:
    """Write a small file atomically, while other tasks do the same."""
    if not isinstance(path, Path):
        return path.write_bytes(data)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_bytes(data)
    sync(temporary)
    if replace:
        temporary.replace(path)
    else:
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
        temporary.unlink()
    sync(path.parent)
