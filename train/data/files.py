"""The files of a source: folders, patterns, the standard library. Start at `resolve_source`."""

import functools
import glob
import itertools
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import log_level
from dsmoe_jax.storage.manifest import MODEL_MANIFEST
from dsmoe_jax.storage.paths import expand_user
from dsmoe_jax.storage.remote import RemotePath, is_url
from dsmoe_jax.storage.strict_json import read_json

from .hub_datasets import HUB, find_hub_files
from .shards import MANIFEST, is_token_shards

PYTHON_STDLIB: Final = "python-stdlib"
# Not the library proper, or different between machines.
_NOT_STDLIB: Final = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_NOT_STDLIB_BEGINS: Final = ("config-", "_sysconfigdata")
_HEXADECIMAL: Final = re.compile(rb"\b0x[0-9a-fA-F]")
_TABLE: Final = 64  # hexadecimal numbers of a character table; files have fewer than 50 or more than 100
RUN: Final = "run.json"  # in the output directory of a run
# Not data in a folder with weights or a tokenizer.
_MODEL_FILES: Final = re.compile(
    r"(tokenizer|added_tokens|special_tokens_map|config|generation_config|adapter_config|vocab"
    r"|tokenizer_config|.*\.safetensors\.index|.*\.bin\.index)\.json"
    r"|tokenizer\.model|chat_template\.(jinja|json)|merges\.txt|.*\.safetensors|pytorch_model.*\.bin"
)
# Metadata of what datasets' `save_to_disk` writes: of a split, and of several splits.
_STATE: Final = "state.json"
_DATASET_DICT: Final = "dataset_dict.json"
_DATASET_FILES: Final = (_STATE, _DATASET_DICT, "dataset_info.json")
_NAMED: Final = 3  # paths per log line
_log = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    """A file of a source; `named` by the user, or found in a folder or by a pattern."""

    path: Path
    named: bool

    def identity(self) -> tuple[str, int, str]:
        """Return name, size and version: a file that changes has another identity."""
        stat = self.path.stat()
        version = str(stat.st_mtime_ns) if isinstance(self.path, Path) else self.path.version
        return str(self.path), stat.st_size, version


def source_bytes(source: str | Path, exclude: Iterable[Path] = ()) -> int:
    """Return the size of all files of a source."""
    return sum(file.path.stat().st_size for file in find_files(source, exclude))


def find_files(source: str | Path, exclude: Iterable[Path] = ()) -> list[SourceFile]:
    """Return the files of a source, each once.

    Of folders and patterns, these are left out: hidden files, output of this project (runs, token shards, checkpoints),
    files of tokenizers and models, dangling links and links to a parent folder. Other links are followed; a file with
    several hard or symbolic links is read once.

    Args:
        source: See `documents`.
        exclude: Files and folders to leave out.

    Raises:
        DSMoEError: There are none.
    """
    return resolve_source(source, exclude).files


def warn_on_overlap(sources: Sequence[str | Path], exclude: Iterable[Path] = ()) -> None:
    """Warn about a file in several sources, which is read once for each."""
    first: dict[Any, int] = {}
    for number, source in enumerate(sources if len(sources) > 1 else ()):
        for file in find_files(source, exclude):
            identity = _identity(file.path)
            if (other := first.setdefault(identity, number)) != number:
                _log.warning("%s: already in source %s; reading it twice", file.path, sources[other])
                break  # one line per source


def refuse_overlap(
    sources: Sequence[str | Path], validation: Sequence[str | Path], exclude: Iterable[Path] = ()
) -> None:
    """Raise `DSMoEError` for a file that is in the training and in the validation sources."""
    files = {_identity(file.path): file.path for source in validation for file in find_files(source, exclude)}
    for source in sources if files else ():
        for file in find_files(source, exclude):
            if _identity(file.path) in files:
                raise DSMoEError(f"{file.path}: in both the training and the validation data; leave it out of one")


def unlogged() -> AbstractContextManager[None]:
    """Log no warning about a source that is read once more."""
    return log_level(__package__ or __name__, logging.ERROR)


class SourceFiles(NamedTuple):
    """The files of a source, the paths left out, by reason, and the commit of a dataset on the Hub."""

    files: list[SourceFile]
    left_out: dict[str, list[str]]
    revision: str | None = None

    def log(self, source: str | Path) -> None:
        """Log one line per reason."""
        for reason, paths in self.left_out.items():
            more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
            _log.info("%s: left out %s: %s%s", source, reason, ", ".join(paths[:_NAMED]), more)


def resolve_source(source: str | Path, exclude: Iterable[Path] = ()) -> SourceFiles:
    """Find the files of a source; see `find_files`."""
    source = expand_user(source, "source")
    if source == PYTHON_STDLIB:
        return SourceFiles(list(_stdlib()), {})
    if source.startswith(HUB):
        revision, found = find_hub_files(source)
        return SourceFiles([SourceFile(file, False) for file in found], {}, revision)
    if is_url(source):
        return _remote_files(source, exclude)
    walk = _Walk(exclude)
    if os.path.lexists(source):
        path = Path(source)
        if (identity := _identity(path)) in walk.excluded:
            raise DSMoEError(f"{source}: is the output of this command")
        if path.is_dir():
            _refuse_non_data(path)
            for file in (saved := _saved_dataset(path)):
                walk.add(file, _identity(file), named=True)
            if not saved:
                walk.below(path, above=_ancestors(path))
        elif not path.is_file():
            raise DSMoEError(f"{source}: is not a regular file")
        else:
            walk.add(path, identity, named=True)
    elif glob.has_magic(source):
        parts = Path(source).parts
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        if root.is_dir():
            _refuse_non_data(root)
        for match in sorted(glob.glob(source, recursive=True)):
            path = Path(match)
            folders = [path, *path.parents] if path.is_dir() else [*path.parents]
            if walk.leaves_out(folder for folder in reversed(folders) if root in folder.parents):
                continue
            walk.below(path, above=_ancestors(root)) if path.is_dir() else walk.file(path)
    else:
        raise DSMoEError(f"{source}: does not exist")
    if not walk.files:
        left_out = "; ".join(f"left out {reason}: {paths[0]}" for reason, paths in walk.left_out.items())
        raise DSMoEError(f"{source}: no files{f' ({left_out})' if left_out else ''}")
    return SourceFiles(walk.files, walk.left_out)


def _remote_files(url: str, exclude: Iterable[Any]) -> SourceFiles:
    """Find the files of an object store."""
    excluded = tuple(f"{path}/" for path in exclude if not isinstance(path, Path))
    found = [file for file in RemotePath(url).find() if not str(file).startswith(excluded)]
    if shards := next((file for file in found if file.name == MANIFEST), None):
        raise DSMoEError(f"{shards}: is of token shards, which are read in place: copy the folder to a disk")
    if not found:
        raise DSMoEError(f"{url}: does not exist, or has no files")
    return SourceFiles([SourceFile(cast(Path, file), str(file) == url) for file in found], {})


class _Walk:
    """Collects files, each once, and the paths left out."""

    def __init__(self, exclude: Iterable[Path]):
        self.excluded = {_identity(path) for path in exclude if isinstance(path, Path) and path.exists()}
        self.files: list[SourceFile] = []
        self.left_out: dict[str, list[str]] = {}
        self._seen: dict[Any, Path] = {}

    def below(self, folder: Path, above: Set[Any]) -> None:
        """Add all files below a folder, sorted by path; `above` has the identities of its parents."""
        found: list[Path] = []
        seen = {_identity(folder)}
        for home, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
            here = []
            for name in sorted(folders):
                path = Path(home) / name
                if name.startswith(".") or self.leaves_out([path]):
                    continue
                if (identity := _identity(path)) in seen or identity in above:
                    self._leave_out("links to a parent folder or one already read", path)
                else:
                    seen.add(identity)
                    here.append(name)
            folders[:] = here
            found += [Path(home) / name for name in names if not name.startswith(".")]
        for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
            self.file(path)

    def file(self, path: Path) -> None:
        """Add a file that the user has not named."""
        if path.is_symlink() and not path.exists():
            self._leave_out("dangling links", path)
        elif _MODEL_FILES.fullmatch(path.name) and _has_model(path.parent):
            self._leave_out("files of a model or tokenizer", path)
        elif path.name in _DATASET_FILES and _has_dataset(path.parent):
            self._leave_out("metadata of datasets", path)
        elif path.is_file():
            self.add(path, _identity(path), named=False)
        else:
            self._leave_out("special files", path)

    def add(self, path: Path, identity: Any, *, named: bool) -> None:
        """Add a file, unless it is excluded or was added under another name."""
        if identity in self.excluded:
            self._leave_out("the output of this command", path)
        elif identity not in self._seen:
            self._seen[identity] = path
            self.files.append(SourceFile(path, named))
        elif os.path.abspath(path) != os.path.abspath(self._seen[identity]):  # a pattern with ** finds a path twice
            self._leave_out("duplicate names of files", path)

    def leaves_out(self, folders: Iterable[Path]) -> bool:
        """Return whether one of the folders, from the outermost, is not data."""
        for folder in folders:
            kind = "the output of this command" if _identity(folder) in self.excluded else _kind_of(folder)
            if kind:
                self._leave_out(kind, folder)
                return True
        return False

    def _leave_out(self, reason: str, path: Path) -> None:
        if str(path) not in (paths := self.left_out.setdefault(reason, [])):
            paths.append(str(path))


def _identity(path: Path) -> tuple[Any, ...]:
    if not isinstance(path, Path):
        return (str(path),)
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _ancestors(folder: Path) -> set[tuple[Any, ...]]:
    return {_identity(parent) for parent in folder.resolve().parents}


def _refuse_non_data(folder: Path) -> None:
    if kind := _kind_of(folder):
        raise DSMoEError(f"{folder}: is {kind}, not a folder of data")


def _kind_of(folder: Path) -> str | None:
    """Return which output of this project the folder is, if any."""
    names = os.listdir(folder) if os.access(folder, os.R_OK) else ()
    if RUN in names and ("checkpoints" in names or "metrics.jsonl" in names):
        return "a training run"
    if MODEL_MANIFEST in names:
        return "a native checkpoint"
    if "_CHECKPOINT_METADATA" in names:
        return "an Orbax checkpoint"
    if MANIFEST in names and is_token_shards(folder):
        return "token shards"
    return None


def _has_model(folder: Path) -> bool:
    """Return whether the folder has the files of a model or a tokenizer."""
    names = os.listdir(folder)
    return any(name in ("tokenizer.json", "tokenizer.model") or name.endswith(".safetensors") for name in names)


def _has_dataset(folder: Path) -> bool:
    names = os.listdir(folder)
    return _DATASET_DICT in names or any(name.endswith(".arrow") for name in names)


def _saved_dataset(folder: Path) -> list[Path]:
    """Return the files of a dataset saved by datasets' `save_to_disk`, of its split `train` if it has several."""
    if (folder / _DATASET_DICT).is_file():
        splits = read_json(folder / _DATASET_DICT).get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise DSMoEError(f"{folder}: has no split 'train': append one of {splits!r:.200}")
        folder = folder / "train"
    if not (folder / _STATE).is_file():
        return []
    entries = read_json(folder / _STATE).get("_data_files")
    names = [entry.get("filename") for entry in entries or () if isinstance(entry, dict)]
    files = [folder / name for name in names if isinstance(name, str) and Path(name).name == name]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DSMoEError(f"{missing}: is missing, but listed in {_STATE}")
    return files


def _refuse(error: OSError) -> None:
    raise DSMoEError(f"{error.filename}: cannot be read ({error.strerror})")


@functools.cache
def _stdlib() -> tuple[SourceFile, ...]:
    """Find the standard library's sources that are the same on every machine with this Python.

    Non-ASCII files and character tables (and rulers, `_RULER`) are left out: they repeat tokens that are rare
    elsewhere, with gradients so large that training skips the batch as an outlier.
    """
    library = Path(sysconfig.get_paths()["stdlib"])

    def belongs(path: Path) -> bool:
        parts = path.relative_to(library).parts
        return not any(part in _NOT_STDLIB or part.startswith((".", *_NOT_STDLIB_BEGINS)) for part in parts)

    found = (Path(home) / name for home, _, names in os.walk(library) for name in names if name.endswith(".py"))
    sources = sorted((path for path in found if belongs(path)), key=lambda path: path.relative_to(library).as_posix())
    contents = ((path, path.read_bytes()) for path in sources if path.is_file())
    ascii_texts = ((path, text) for path, text in contents if text.isascii())
    return tuple(SourceFile(path, False) for path, text in ascii_texts if len(_HEXADECIMAL.findall(text)) < _TABLE)
