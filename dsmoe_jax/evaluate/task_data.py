"""Datasets of tasks from local files, without network where there is none: `local_datasets`.

`lm_eval` and `datasets` are imported inside functions: they take seconds.
"""

import contextlib
import functools
import json
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.paths import user_path

_READERS: Final = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of `datasets`, by suffix
_LOCAL: Final = ("arrow", "csv", "json", "parquet", "text")  # a `dataset_path` that names a reader of files
_OF_THE_HUB: Final = ("trust_remote_code", "revision", "token")  # options that a copy does not have
_CONNECT_SECONDS: Final = 5.0
_log = logging.getLogger("dsmoe_jax")


class MissingDataError(DSMoEError):
    """The dataset of a task is neither in the folder nor available from the hub."""


def data_folder(path: str | Path | None) -> Path | None:
    """Return the folder of local datasets.

    Raises:
        DSMoEError: It does not exist.
    """
    if path is None:
        return None
    folder = user_path(path, "data")
    if not folder.is_dir():
        raise DSMoEError(f"data must be a folder, got {path}")
    return folder


def local_source(folder: Path | None, task: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of `datasets.load_dataset` for a task whose dataset is in the folder, else None.

    Args:
        folder: Holds `TASK/SPLIT.jsonl` (or .json, .parquet), or copies of dataset repositories as `owner/name`.
        task: Name of the task.
        config: Its `dataset_path`, `dataset_name` and `dataset_kwargs`; files in the latter are relative to the copy.
    """
    if folder is None:
        return None
    files = [file for file in sorted((folder / task).glob("*")) if file.suffix in _READERS]
    if files:
        readers = {_READERS[file.suffix] for file in files}
        if len(readers) > 1 or len({file.stem for file in files}) < len(files):
            raise DSMoEError(f"{folder / task} must have one file per split, all .jsonl or all .parquet")
        return {"path": readers.pop(), "data_files": {file.stem: str(file) for file in files}}
    name = config.get("dataset_path")
    if name and (folder / name).is_dir():
        options = {key: one for key, one in (config.get("dataset_kwargs") or {}).items() if key not in _OF_THE_HUB}
        return {"path": str(folder / name), "name": config.get("dataset_name"), **options}
    return None


def missing(folder: Path | None, task: str, config: Mapping[str, Any]) -> MissingDataError:
    """Return the error of a task without a dataset, which names where it was looked for."""
    name = config.get("dataset_path")
    if folder is None:
        return MissingDataError(f"{task}: no network and no local data for dataset {name}: pass --data DIR")
    places = f"{folder / str(name)} or {folder / task}/SPLIT.jsonl"
    return MissingDataError(f"{task}: no data: expected {places}, and the hub cannot be reached")


@contextlib.contextmanager
def local_datasets(folder: Path | None) -> Iterator[None]:
    """Load the datasets of tasks from local files within the context; others from the hub or its cache.

    Raises:
        MissingDataError: In the context, for a task whose dataset is not available.
    """
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]

        config = {
            "dataset_path": task.DATASET_PATH,
            "dataset_name": task.DATASET_NAME,
            "dataset_kwargs": dataset_kwargs,
        }
        name = str(task.config.task)
        if callable(task.config.custom_dataset):
            return original(task, dataset_kwargs, **options)
        if (source := local_source(folder, name, config)) is not None:
            with offline():
                task.dataset = _load(name, source)
            _check_splits(name, used_splits(task.config), task.dataset)
            return None
        if config["dataset_path"] in _LOCAL or hub_is_reachable():
            return original(task, dataset_kwargs, **options)
        try:
            with offline():  # what an earlier run has downloaded
                return original(task, dataset_kwargs, **options)
        except (OSError, ValueError, DatasetsError) as error:
            raise missing(folder, name, config) from error

    with mock.patch.object(ConfigurableTask, "download", download):
        yield


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make `datasets` and `huggingface_hub` use no network within the context."""
    import datasets.config  # pyright: ignore[reportMissingImports]
    import huggingface_hub.constants

    with (
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the hub accepts connections; False if `HF_HUB_OFFLINE` or `HF_DATASETS_OFFLINE` is set."""
    import datasets.config  # pyright: ignore[reportMissingImports]
    import huggingface_hub.constants

    if datasets.config.HF_HUB_OFFLINE or huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if {"http", "https", "all"} & urllib.request.getproxies().keys():  # a direct connection may be blocked
        return True
    endpoint = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        _log.info("No connection to %s (%s): using local datasets only", endpoint.netloc, error.strerror or error)
        return False
    return True


def used_splits(config: Any) -> list[str]:
    """Return the splits that a task reads: that of its documents, then that of its examples.

    Args:
        config: `TaskConfig` of the harness, or a mapping.
    """
    training, validation, test = (_get(config, f"{name}_split") for name in ("training", "validation", "test"))
    fewshot = _get(config, "fewshot_config")
    examples = _get(config, "fewshot_split") or _get(fewshot, "split")
    if not examples and _get(fewshot, "samples") is None:
        examples = training or validation or test
    return [split for split in dict.fromkeys((test or validation, examples)) if split]


def _get(config: Any, name: str) -> Any:
    return vars(config).get(name) if hasattr(config, "__dict__") else (config or {}).get(name)  # `TaskConfig` is a dict


def _check_splits(task: str, used: Sequence[str], found: Mapping[str, Any]) -> None:
    for split in used:
        if split not in found:
            raise DSMoEError(f"{task}: needs the splits {', '.join(used)}, found {', '.join(found)}")


def _load(task: str, source: dict[str, Any]) -> Any:
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        return datasets.load_dataset(**source)
    except Exception as error:
        raise DSMoEError(f"{task}: {_fault(source, error)}") from error


def _fault(source: Mapping[str, Any], error: BaseException) -> str:
    """Return what is wrong with local files: file, line and cause where they can be found."""
    path = Path(source["path"])
    files = source.get("data_files") if source["path"] in _LOCAL else None
    for file in map(Path, files.values()) if isinstance(files, Mapping) else sorted(path.rglob("*.jsonl")):
        where = f"{file.parent.name}/{file.name}"
        if not file.stat().st_size:
            return f"{where} is empty"
        if file.suffix == ".jsonl" and (line := _invalid_line(file)):
            return f"{where}{line}"
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{_name(source)} cannot be read: {reason:.300}"


def _invalid_line(file: Path) -> str:
    """Return ` line N: CAUSE` for the first line that is no JSON, "" if there is none."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line.strip() or b"null")
            except ValueError as error:
                return f" line {number}: {getattr(error, 'msg', error)}"
    return ""


def _name(source: Mapping[str, Any]) -> str:
    files = source.get("data_files")
    if source["path"] in _LOCAL and isinstance(files, Mapping):
        return ", ".join(f"{Path(file).parent.name}/{Path(file).name}" for file in files.values())
    return source["path"]
