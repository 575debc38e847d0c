"""Where text comes from: files, folders, patterns, Python's own sources. Start at `documents`."""

import glob
import itertools
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.checkpoint.manifest import MODEL_MANIFEST
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Advance
from dsmoe_jax.storage.paths import expand_user

from .formats import Entry, read_file, read_text, reader_of
from .shards import MANIFEST, is_token_shards

PYTHON_STDLIB: Final = "python-stdlib"
# Not of the library itself, or not the same on every machine.
_NOT_STDLIB: Final = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_NOT_STDLIB_BEGINS: Final = ("config-", "_sysconfigdata")
# A line of one character over and over, like "# ------", in a comment or not.
_RULER: Final = re.compile(r"^[ \t]*#?[ \t]*([^\w\s])\1{7,}.*\n", re.MULTILINE)
_HEXADECIMAL: Final = re.compile(rb"\b0x[0-9a-fA-F]")
_TABLE: Final = 64  # such numbers: files of the library have fewer than 50, or more than 100
RUN: Final = "run.json"  # a run's folder has it
# Beside weights or a tokenizer these are theirs, and no data.
_MODEL_FILES: Final = re.compile(
    r"(tokenizer|added_tokens|special_tokens_map|config|generation_config|adapter_config|vocab"
    r"|tokenizer_config|.*\.safetensors\.index|.*\.bin\.index)\.json"
    r"|tokenizer\.model|chat_template\.(jinja|json)|merges\.txt|.*\.safetensors|pytorch_model.*\.bin"
)
_NAMED: Final = 3  # paths that a line of the log names
_NAMED_LINES: Final = 10  # broken lines of a file that the log names
_HOPELESS: Final = 1000  # lines from the start without a text: the rest need not be read

_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text and where it came from: FILE, FILE:LINE of a .jsonl, FILE:ROW of a .parquet."""

    where: str
    text: str


class TextFile(NamedTuple):
    """A file of a source. One that the user named must be text; among those that were found, others are passed over."""

    path: Path
    named: bool


def documents(
    source: str | Path,
    *,
    field: str = "text",
    most_broken: float = 0.01,
    exclude: Iterable[Path] = (),
    advance: Advance = lambda step: None,
) -> Iterator[Document]:
    """The texts of a source, always in the same order.

    `source` is a file, a folder (with all below it, in the order of the relative paths), a pattern like
    `data/*.parquet`, or `python-stdlib`; see `find_files` for what is left out. Of a .jsonl, .jsonl.gz, .jsonl.zst or
    .parquet each line or row is a document, its text in `field`; every other file is one, if it is UTF-8. Blank texts
    are none.

    Broken lines (not JSON, or without that field) are counted and named in the log. Raises `ValueError` in one line
    where more than the share `most_broken` of a file's lines are, or all; where a file cannot be read to its end; and
    where the source holds no text at all. `advance` is told of the bytes of the files as they are read.
    """
    count = blank = passed = 0
    clean = _without_rulers if str(source) == PYTHON_STDLIB else str
    found = find(source, exclude)
    found.log(source)
    for file in found.files:
        lines = Lines(file.path, most_broken)
        done, as_text = 0, reader_of(file.path) is read_text
        for entry in read_file(file.path, field):
            advance(entry.done - done)
            done = entry.done
            if entry.value is None and as_text:
                if file.named:
                    raise DSMoEError(f"{file.path}: {entry.problem}")
                passed += 1
            elif lines.whole(entry) and entry.value is not None:
                if (text := clean(entry.value)) and not text.isspace():
                    count += 1
                    yield Document(f"{file.path}{entry.place}", text)
                else:
                    blank += 1
        lines.end()
    if blank or passed:
        _log.info("%s: passed over %d blank texts and %d files that are not UTF-8 text", source, blank, passed)
    if not count:
        raise DSMoEError(f"{source}: holds no text")


def source_bytes(source: str | Path, exclude: Iterable[Path] = ()) -> int:
    """The size of all files of a source."""
    return sum(file.path.stat().st_size for file in find_files(source, exclude))


def find_files(source: str | Path, exclude: Iterable[Path] = ()) -> list[TextFile]:
    """The files of a source, each once; `ValueError` if there are none.

    Below a folder, and where a pattern leads, some are left out: hidden ones; those in `exclude`, files or folders;
    what this project wrote (runs, token shards, checkpoints); the files of tokenizers and models; links that lead
    nowhere or back up. Other links are followed. A file with several names, by links of either kind, is read once.
    """
    return find(source, exclude).files


def warn_of_overlap(sources: Sequence[str | Path], exclude: Iterable[Path] = ()) -> None:
    """Say where a file is in several of the sources: each of them is read."""
    first: dict[Any, int] = {}
    for number, source in enumerate(sources if len(sources) > 1 else ()):
        for file in find_files(source, exclude):
            identity = _identity(file.path)
            if (other := first.setdefault(identity, number)) != number:
                _log.warning("%s: is in source %s already; it is read twice", file.path, sources[other])
                break  # one line a source


class Found(NamedTuple):
    """The files of a source, and what was left out, by reason."""

    files: list[TextFile]
    left_out: dict[str, list[str]]

    def log(self, source: str | Path) -> None:
        """A line for each reason."""
        for reason, paths in self.left_out.items():
            more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
            _log.info("%s: left out %s: %s%s", source, reason, ", ".join(paths[:_NAMED]), more)


def find(source: str | Path, exclude: Iterable[Path] = ()) -> Found:
    """What `find_files` finds, and what it leaves out."""
    source = expand_user(source, "source")
    if source == PYTHON_STDLIB:
        return Found(_stdlib(), {})
    walk = _Walk(exclude)
    if os.path.lexists(source):
        path = Path(source)
        if (identity := _identity(path)) in walk.excluded:
            raise DSMoEError(f"{source}: is what this command writes to")
        if path.is_dir():
            _refuse_no_data(path)
            walk.below(path, above=_ancestors(path))
        elif not path.is_file():
            raise DSMoEError(f"{source}: is not a regular file")
        else:
            walk.add(path, identity, named=True)
    elif glob.has_magic(source):
        parts = Path(source).parts
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        if root.is_dir():
            _refuse_no_data(root)
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
    return Found(walk.files, walk.left_out)


class _Walk:
    """Collects files, each once, and says what it leaves out."""

    def __init__(self, exclude: Iterable[Path]):
        self.excluded = {_identity(path) for path in exclude if path.exists()}
        self.files: list[TextFile] = []
        self.left_out: dict[str, list[str]] = {}
        self._seen: dict[Any, Path] = {}

    def below(self, folder: Path, above: Set[Any]) -> None:
        """All files below the folder, in the order of their paths; `above` are the folders that contain it."""
        found: list[Path] = []
        visited = {_identity(folder)}
        for home, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
            here = []
            for name in sorted(folders):
                path = Path(home) / name
                if name.startswith(".") or self.leaves_out([path]):
                    continue
                if (identity := _identity(path)) in visited or identity in above:
                    self._leave_out("links to folders that contain them or are read already", path)
                else:
                    visited.add(identity)
                    here.append(name)
            folders[:] = here
            found += [Path(home) / name for name in names if not name.startswith(".")]
        for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
            self.file(path)

    def file(self, path: Path) -> None:
        """A file that was found, not named."""
        if path.is_symlink() and not path.exists():
            self._leave_out("links that lead nowhere", path)
        elif _MODEL_FILES.fullmatch(path.name) and _has_model(path.parent):
            self._leave_out("files of a model or tokenizer", path)
        elif path.is_file():
            self.add(path, _identity(path), named=False)
        else:
            self._leave_out("what is no regular file", path)

    def add(self, path: Path, identity: Any, *, named: bool) -> None:
        """The file, unless it is excluded or was added under another name."""
        if identity in self.excluded:
            self._leave_out("what this command writes", path)
        elif identity not in self._seen:
            self._seen[identity] = path
            self.files.append(TextFile(path, named))
        elif os.path.abspath(path) != os.path.abspath(self._seen[identity]):  # a pattern with ** finds a path twice
            self._leave_out("other names of files that are read already", path)

    def leaves_out(self, folders: Iterable[Path]) -> bool:
        """Whether one of the folders, from the outermost, is no data."""
        for folder in folders:
            kind = "what this command writes" if _identity(folder) in self.excluded else _kind_of(folder)
            if kind:
                self._leave_out(kind, folder)
                return True
        return False

    def _leave_out(self, reason: str, path: Path) -> None:
        if str(path) not in (paths := self.left_out.setdefault(reason, [])):
            paths.append(str(path))


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _ancestors(folder: Path) -> set[tuple[int, int]]:
    return {_identity(parent) for parent in folder.resolve().parents}


def _refuse_no_data(folder: Path) -> None:
    if kind := _kind_of(folder):
        raise DSMoEError(f"{folder}: is {kind}, not a folder of data")


def _kind_of(folder: Path) -> str | None:
    """What this project wrote the folder as, if it did."""
    names = os.listdir(folder) if os.access(folder, os.R_OK) else ()
    if RUN in names and ("checkpoints" in names or "metrics.jsonl" in names):
        return "a training run"
    if MODEL_MANIFEST in names:
        return "a native checkpoint"
    if "_CHECKPOINT_METADATA" in names:
        return "a checkpoint of Orbax"
    if MANIFEST in names and is_token_shards(folder):
        return "token shards"
    return None


def _has_model(folder: Path) -> bool:
    """Whether the folder holds a model or a tokenizer."""
    names = os.listdir(folder)
    return any(name in ("tokenizer.json", "tokenizer.model") or name.endswith(".safetensors") for name in names)


def _refuse(error: OSError) -> None:
    raise DSMoEError(f"{error.filename}: cannot be read ({error.strerror})")


def _stdlib() -> list[TextFile]:
    """Python's own sources without site-packages and test suites: the same on every machine with this Python.

    Left out are the few files with characters beyond ASCII, tables of characters (codecs, known by their hexadecimal
    numbers), and the rulers of all others (`_without_rulers`): there the same tokens come many at a time and seldom
    elsewhere, and their gradient is so large that training takes the batch for an accident.
    """
    library = Path(sysconfig.get_paths()["stdlib"])

    def belongs(path: Path) -> bool:
        parts = path.relative_to(library).parts
        return not any(part in _NOT_STDLIB or part.startswith((".", *_NOT_STDLIB_BEGINS)) for part in parts)

    found = (Path(home) / name for home, _, names in os.walk(library) for name in names if name.endswith(".py"))
    sources = sorted((path for path in found if belongs(path)), key=lambda path: path.relative_to(library).as_posix())
    contents = ((path, path.read_bytes()) for path in sources if path.is_file())
    return [
        TextFile(path, False) for path, text in contents if text.isascii() and len(_HEXADECIMAL.findall(text)) < _TABLE
    ]


def _without_rulers(text: str) -> str:
    return _RULER.sub("", text)


class Lines:
    """How many lines of a file there were, and how many were broken."""

    def __init__(self, path: Path, most_broken: float):
        self._path, self._most = path, most_broken
        self._count = self._broken = 0
        self._first = ""

    def whole(self, entry: Entry) -> bool:
        """Count the entry and name it in the log if it is broken."""
        self._count += 1
        if entry.value is not None:
            return True
        self._broken += 1
        line = f"{self._path}{entry.place} {entry.problem}"
        self._first = self._first or line
        if self._broken <= _NAMED_LINES:
            _log.warning("%s: left out", line)
        if self._broken == self._count == _HOPELESS:
            raise DSMoEError(f"{self._path}: the first {_HOPELESS} lines are all broken: {self._first}")
        return False

    def end(self) -> None:
        """`ValueError` if too many were broken."""
        if self._broken > self._most * self._count or 0 < self._broken == self._count:
            raise DSMoEError(
                f"{self._path}: {self._broken} of {self._count} lines are broken, "
                f"at most {100 * self._most:g} % may be; the first: {self._first}"
            )
        if self._broken:
            _log.warning("%s: left out %d broken lines of %d", self._path, self._broken, self._count)
