"""Datasets on the Hugging Face Hub: `hf://datasets/OWNER/NAME[@REVISION][/CONFIG][:SPLIT]`. Start at `find_hub_files`.

Files are downloaded into the Hub's cache when they are read, so that each of many tasks fetches its own.
"""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Final
from urllib.parse import unquote

from dsmoe_jax.errors import DSMoEError

from .formats import FORMATS

HUB: Final = "hf://"
_SOURCE: Final = re.compile(r"hf://datasets/([^/@:]+/[^/@:]+)(?:@([^/:]+))?(?:/([^:]+))?(?::([^/:]+))?/?")
_CARD: Final = "README.md"
_CONVERTED: Final = "refs/convert/parquet"  # where the Hub keeps a copy in parquet of every dataset
_SPLITS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT: Final = re.compile(rf"(?:^|[/_.-])({'|'.join(_SPLITS)})(?=[/_.-])")
_NUMBERED: Final = re.compile(r"-(\d+)-of-(\d+)(?=[-.])")


class HubFile:
    """A file of a dataset on the Hub; like a path, it has a name and a size. `version` identifies its content."""

    def __init__(self, repo_id: str, file: str, revision: str, size: int, version: str):
        self._repo_id, self._file, self._revision, self._size = repo_id, file, revision, size
        self.name, self.version = file.rpartition("/")[2], version

    def __str__(self) -> str:
        """Return its address, without the revision."""
        return f"{HUB}datasets/{self._repo_id}/{self._file}"

    def stat(self) -> SimpleNamespace:
        """Return its size as `st_size`."""
        return SimpleNamespace(st_size=self._size)

    def local(self) -> Path:
        """Download the file unless cached; return its path in the cache."""
        from dsmoe_jax.convert.hub import download_dataset_file, hub_of

        with hub_of(self._repo_id):
            return download_dataset_file(self._repo_id, self._file, self._revision)

    def open(self, mode: str) -> BinaryIO:
        """Open the downloaded file."""
        return self.local().open(mode)  # pyright: ignore[reportReturnType]


@functools.lru_cache(maxsize=64)  # all steps of a command read one commit
def find_hub_files(source: str) -> tuple[str, list[Any]]:
    """Return the commit and the files of a dataset's configuration and split, by default `train`.

    Raises:
        DSMoEError: The source is malformed, cannot be listed, or has no such configuration or split.
    """
    if not (match := _SOURCE.fullmatch(source)):
        raise DSMoEError(f"{source}: must be hf://datasets/OWNER/NAME[@REVISION][/CONFIG][:SPLIT]")
    from dsmoe_jax.convert.hub import hub_of  # it imports jax

    repo_id, revision, config, split = match.groups()
    with hub_of(repo_id, needed_by="a dataset of the Hub") as constants:
        get = _from_cache if constants.HF_HUB_OFFLINE else _from_hub
        sha, files = get(repo_id, unquote(revision or constants.DEFAULT_REVISION))
        if revision is None and not constants.HF_HUB_OFFLINE and not _readable(files):
            with contextlib.suppress(DSMoEError):  # there is no such branch
                sha, files = get(repo_id, _CONVERTED)
        card = _read_card(repo_id, sha) if _CARD in files else {}
        names = select_files(files, card, config, split or "train")
        return sha, [HubFile(repo_id, name, sha, *files[name]) for name in names]


def _from_hub(repo_id: str, revision: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """Return the commit, and size and content hash of each file."""
    from dsmoe_jax.convert.hub import download_dataset_file, list_files

    sha, listed = list_files(repo_id, revision, purpose="dataset")
    hashes = {name: str(file.lfs.sha256 if file.lfs else file.blob_id) for name, file in listed.items()}
    files = {name: (file.size or 0, hashes[name]) for name, file in listed.items()}
    if files and revision != sha:  # by branch, so that the cache records the branch's commit for offline runs
        smallest = _CARD if _CARD in files else min(files, key=lambda name: files[name][0])
        download_dataset_file(repo_id, smallest, revision)
    return sha, files


def _from_cache(repo_id: str, revision: str) -> tuple[str, dict[str, tuple[int, str]]]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = f"HF_HUB_OFFLINE is set and the cache, {constants.HF_HUB_CACHE},"
    try:
        folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise DSMoEError(f"{where} has no revision {revision!r} of this dataset") from None
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {p.relative_to(folder).as_posix(): (p.stat().st_size, p.resolve().name) for p in paths}
    numbered = Counter((name[: match.start()], match[2]) for name in files if (match := _NUMBERED.search(name)))
    for (name, count), cached in numbered.items():
        if cached < int(count):
            raise DSMoEError(f"{where} has {cached} of the {int(count)} files {name}-*-of-{count}*")
    return folder.name, files


def _read_card(repo_id: str, revision: str) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load

    from dsmoe_jax.convert.hub import download_dataset_file

    card = download_dataset_file(repo_id, _CARD, revision)
    try:
        return metadata_load(card) or {}
    except Exception:  # YAML's errors have no base class here: the names of the files decide
        return {}


def _readable(files: Collection[str]) -> list[str]:
    """Return the files in parquet, or else those of other formats, sorted."""
    parquet = sorted(name for name in files if name.lower().endswith(".parquet"))
    return parquet or sorted(name for name in files if name.lower().endswith(tuple(FORMATS)))


def select_files(files: Collection[str], card: Mapping[str, Any], config: str | None, split: str) -> list[str]:
    """Return the files of a configuration and split: by the card's `configs`, or else by folder and file names."""
    if not (readable := _readable(files)):
        raise DSMoEError(f"has no files in a format that can be read: {', '.join(FORMATS)}")
    declared = card.get("configs")
    if isinstance(declared, list) and all(isinstance(one, dict) and one.get("data_files") for one in declared):
        by_config = {str(one.get("config_name", "default")): _declared(one["data_files"], readable) for one in declared}
        default = next((str(one.get("config_name")) for one in declared if one.get("default") is True), "default")
    else:
        by_config, default = _by_folder(readable), "default"
    if config is None:
        config = default if default in by_config else next(iter(by_config)) if len(by_config) == 1 else None
    if config not in by_config:
        problem = "has several configurations" if config is None else f"has no configuration {config!r}"
        raise DSMoEError(f"{problem}: append /CONFIG, one of {', '.join(sorted(by_config))}")
    if not (found := by_config[config].get(split)):
        raise DSMoEError(f"has no split {split!r}: append :SPLIT, one of {', '.join(sorted(by_config[config]))}")
    return found


def _declared(data_files: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split that a card declares."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = entry.get("path", ())
        patterns = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
        matching = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        found.setdefault(str(entry.get("split", "train")), []).extend(matching)
    return found


def _by_folder(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return files by configuration, the top folder except for `data`, and by split, a word of the path."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        top, slash, _ = name.partition("/")
        is_config = slash and top != "data" and top not in _SPLITS
        word = _SPLIT.search(name)
        splits = found.setdefault(top if is_config else "default", {})
        splits.setdefault(_SPLITS[word[1]] if word else "train", []).append(name)
    return found
