"""Find and load tasks of lm-evaluation-harness: `TaskLoader`.

`lm_eval` is imported inside functions: it takes seconds, and the names of its 14,000 tasks take seven more.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError, closest
from dsmoe_jax.evaluate.suites import SUITES, Row, Suite, named_tasks
from dsmoe_jax.evaluate.task_data import local_datasets
from dsmoe_jax.storage.paths import user_path

UNSAFE: Final = "runs generated code: needs --confirm-run-unsafe-code"
TASKS: Final = Path(__file__).parent / "tasks"
_log = logging.getLogger("dsmoe_jax")


class LoadedRow(NamedTuple):
    """A benchmark whose tasks are loaded, or the reason why they are not.

    Attributes:
        row: The benchmark.
        tasks: The harness's tasks and groups, None with a reason.
        reason: Why it cannot run; "" if it can.
    """

    row: Row
    tasks: dict[str, Any] | None
    reason: str = ""


class TaskLoader:
    """Knows the tasks of the harness, of this package and of folders with further task files."""

    def __init__(self, include_path: Sequence[str | Path] = (), data: Path | None = None):
        self._paths: list[str | Path] = [TASKS]
        for path in include_path:
            if not (folder := user_path(path, "include_path").absolute()).is_dir():
                raise DSMoEError(f"include_path must be a folder, got {path}")
            self._paths.append(folder)
        self._data = data

    def suite(self, name: str) -> Suite:
        """Return the suite of that name, or that of the tasks named, separated by commas.

        Raises:
            DSMoEError: A name is neither a suite nor a task.
        """
        names = list(dict.fromkeys(one.strip() for one in name.split(",") if one.strip()))
        if len(names) == 1 and names[0] in SUITES:
            return SUITES[names[0]]
        for one in names:
            if one in SUITES:
                raise DSMoEError(f"suite must be one suite or a list of tasks, got {name}")
            if not self._manager_for([one]):
                close = closest(one, [*SUITES, *self._manager.task_index])
                hint = (
                    f"did you mean {close}?"
                    if close
                    else f"suites: {', '.join(SUITES)}; `lm_eval ls tasks` lists tasks"
                )
                raise DSMoEError(f"unknown task {one!r}; {hint}")
        if not names:
            raise DSMoEError(f"suite must be one of {', '.join(SUITES)} or a list of tasks, got {name!r}")
        return named_tasks(names)

    def load(self, row: Row, *, unsafe_code: bool = False) -> LoadedRow:
        """Load the tasks of a benchmark and their data.

        Args:
            row: The benchmark.
            unsafe_code: Whether tasks may run generated code.

        Returns:
            The loaded tasks; what keeps them from being loaded is the `reason`.
        """
        if not unsafe_code and self.runs_code(row.task):
            return LoadedRow(row, None, UNSAFE)
        manager = self._manager_for([row.task])
        if manager is None:
            return LoadedRow(row, None, f"lm_eval has no task {row.task}")
        try:
            with local_datasets(self._data):
                return LoadedRow(row, dict(manager.load([row.task])))
        except DSMoEError as error:
            return LoadedRow(row, None, str(error))
        except Exception as error:  # of any package and of any code of a task
            return LoadedRow(row, None, describe(row.task, error))

    def leaves(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and config of each task in a task, group or tag; functions in configs are not resolved."""
        manager = self._manager_for([name])
        if manager is not None:
            yield from _leaves(manager.task_index, name)

    def runs_code(self, name: str) -> bool:
        """Return whether a task, or one of a group or tag, runs generated code."""
        return any(config.get("unsafe_code") for _, config in self.leaves(name))

    def _manager_for(self, names: Sequence[str]) -> Any | None:
        """Return the task manager if it knows the names; those of the harness are read when they are needed."""
        manager = self._manager
        if not all(_is_complete(manager.task_index, name) for name in names):
            for name, entry in _harness_tasks().items():
                manager.task_index.setdefault(name, entry)
        return manager if all(_is_complete(manager.task_index, name) for name in names) else None

    @functools.cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        return TaskManager(include_path=self._paths, include_defaults=False)


@functools.cache
def _harness_tasks() -> Mapping[str, Any]:
    """Return the tasks of the harness by name."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    _log.info("Reading the task files of lm_eval")
    return TaskManager().task_index


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entry = index[name]
    children = _children(entry)
    if not children:
        yield name, entry.cfg or {}
    for child in children:
        yield from _leaves(index, child)


def _is_complete(index: Mapping[str, Any], name: str) -> bool:
    """Return whether the index has a task, and all tasks of a group or tag."""
    return name in index and all(_is_complete(index, child) for child in _children(index[name]))


def _children(entry: Any) -> list[str]:
    """Return the names in a group or tag; those of a group defined within the group included."""
    if entry.cfg is None:
        return sorted(entry.tags)
    return _members(entry.cfg) if "group" in entry.cfg else []


def _members(group: Mapping[str, Any]) -> list[str]:
    members = group.get("task")
    names: list[str] = []
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            names.append(member)
        elif isinstance(member.get("task"), list):
            names += _members(member)
        else:
            names.append(member.get("task") or member["group"])
    return names


def describe(task: str, error: Exception) -> str:
    """Return one line for an exception of the code of a task."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"{task}: {type(error).__name__}: {reason:.300}"
