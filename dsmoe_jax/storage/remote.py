"""Files of object stores, through fsspec: `gs://`, `s3://` and others. Start at `RemotePath`.

Functions of this module take paths of either kind.
"""

import contextlib
import functools
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Final

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]+://")
# Packages that fsspec needs, by protocol, and our extra that installs them.
_PACKAGES: Final = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
# What changes with the content of an object, by store.
_VERSIONS: Final = ("ETag", "etag", "generation", "md5Hash", "LastModified", "mtime", "created")


def is_url(path: Any) -> bool:
    """Whether a path is a URL of an object store."""
    return isinstance(path, str) and _URL.match(path) is not None


class RemotePath:
    """A file or folder of an object store, with the methods of `Path` that are used here."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")
        self.name = self._url.rpartition("/")[2]
        self.suffix = os.path.splitext(self.name)[1]

    def __str__(self) -> str:
        """Return the URL."""
        return self._url

    def __truediv__(self, name: str) -> "RemotePath":
        """Return a file or folder below."""
        return RemotePath(f"{self._url}/{name}")

    def with_name(self, name: str) -> "RemotePath":
        """Return a sibling."""
        return RemotePath(f"{self._url.rpartition('/')[0]}/{name}")

    def local(self) -> "RemotePath":
        """Return this path: readers open it as a file."""
        return self

    def open(self, mode: str) -> BinaryIO:
        """Open the file; an object that is written appears when it is closed."""
        with self._errors():
            return self._store.open(self._path, mode)

    def write_bytes(self, data: bytes) -> None:
        """Write the object."""
        with self._errors():
            self._store.pipe_file(self._path, data)

    def read_bytes(self) -> bytes:
        """Read the object."""
        with self._errors():
            return self._store.cat_file(self._path)

    def exists(self) -> bool:
        """Whether there is such an object or folder."""
        with self._errors():
            self._store.invalidate_cache()
            return self._store.exists(self._path)

    def stat(self) -> SimpleNamespace:
        """Return its size as `st_size`."""
        return SimpleNamespace(st_size=self._info["size"])

    @property
    def version(self) -> str:
        """What changes with the content."""
        return next((str(self._info[name]) for name in _VERSIONS if name in self._info), "")

    def copy_to(self, target: "RemotePath") -> None:
        """Copy the object within the store."""
        with self._errors():
            self._store.cp_file(self._path, target._path)

    def remove(self) -> None:
        """Remove the folder."""
        with self._errors():
            self._store.rm(self._path, recursive=True)

    def find(self) -> list["RemotePath"]:
        """Return the files of a pattern or folder, sorted, without hidden ones; the file itself if it is one."""
        with self._errors():
            list_files = self._store.glob if glob.has_magic(self._path) else self._store.find
            listed = list_files(self._path, detail=True)
        root, protocol = self._path.partition("*")[0].rstrip("/"), self._url.partition("://")[0]
        found = []
        for path, info in sorted(listed.items()):
            if info["type"] == "file" and "/." not in path.removeprefix(root):
                file = RemotePath(f"{protocol}://{path.lstrip('/')}")
                file._info = info  # saves a request per file
                found.append(file)
        return found

    @functools.cached_property
    def _info(self) -> Mapping[str, Any]:
        with self._errors():
            return self._store.info(self._path)

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        protocol = self._url.partition("://")[0]
        try:
            return fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            package, extra = _PACKAGES.get(protocol, ("", ""))
            hint = f"requires {package}: pip install 'dsmoe_jax[{extra}]'" if package else " ".join(str(error).split())
            raise DSMoEError(f"{self._url}: {hint}") from None
        except ValueError as error:
            raise DSMoEError(f"{self._url}: {' '.join(str(error).split())}") from None

    @property
    def _store(self) -> Any:
        return self._opened[0]

    @property
    def _path(self) -> str:
        return self._opened[1]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise errors of a store in one line: their classes have no narrower common base."""
        try:
            yield
        except DSMoEError:
            raise
        except FileNotFoundError:
            raise DSMoEError(f"{self._url}: does not exist") from None
        except Exception as error:
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise DSMoEError(f"{self._url}: cannot be reached ({text})") from None


def any_path(path: str | Path, name: str) -> Any:
    """Return the path as `Path` or `RemotePath`; `name` is the argument's, for errors."""
    return RemotePath(str(path)) if is_url(path) else user_path(path, name)


def save_json(path: Any, fields: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    if isinstance(path, Path):
        write_json(path, fields)
    else:
        path.write_bytes((json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def load_json(path: Any) -> dict[str, Any]:
    """Read a JSON object."""
    if isinstance(path, Path):
        return read_json(path)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise error if isinstance(error, DSMoEError) else DSMoEError(f"{path}: is not JSON") from None


def link_file(source: Any, target: Any) -> None:
    """Link a file, or copy it where there are no hard links."""
    if not isinstance(source, Path):
        return source.copy_to(target)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def remove_tree(path: Any) -> None:
    """Remove a folder."""
    shutil.rmtree(path) if isinstance(path, Path) else path.remove()
