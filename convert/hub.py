"""Download a checkpoint from the Hugging Face hub into its cache. Start at `resolve`.

The environment variables of `huggingface_hub` apply: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and
others. Code is never downloaded.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from dsmoe_jax.config import PRESETS
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import check_space
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.generation_config import GENERATION_CONFIG
from dsmoe_jax.text.tokenizer import TOKENIZER_FILES

from .reader import LAYOUTS, choose_layout, read_index
from .tensor_info import quote

CONFIG: Final = "config.json"
# Optional files, downloaded before the weights.
_EXTRA_FILES: Final = (GENERATION_CONFIG, *TOKENIZER_FILES)
# Files of folders that are not a model, and what to pass instead.
_NOT_A_MODEL: Final[dict[str, Callable[[Path], str]]] = {
    "run.json": lambda path: f"it is the folder of a run; did you mean {path / 'model'}?",
    "adapter_config.json": lambda path: "it is an adapter; pass its base as the model and this folder as the adapter",
}
_REPO_ID: Final = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)


def resolve(source: str | Path, revision: str | None = None, *, name: str = "model") -> Path:
    """Return the local folder of a path or hub id, which is downloaded unless cached; a path takes precedence."""
    path = _local_path(source, revision, name)
    if path is None:
        return fetch(str(source), revision=revision)
    _check_model_folder(path, name)
    return path


def resolve_file(source: str | Path, file: str, revision: str | None = None, *, name: str = "model") -> Path | None:
    """Return a file of a local folder or hub id, of which only this file is downloaded; None if it has none."""
    path = _local_path(source, revision, name)
    if path is None:
        return fetch_file(str(source), file, revision=revision)
    _check_model_folder(path, name)
    return path / file if (path / file).exists() else None


def resolve_config(source: str | Path, revision: str | None = None) -> Path:
    """Return a local path, or the `config.json` of a hub id, of which only this file is downloaded."""
    path = _local_path(source, revision, "model")
    if path is None and (path := fetch_file(str(source), CONFIG, revision=revision)) is None:
        raise DSMoEError(f"{source}: has no {CONFIG}")
    if path.is_dir():
        _check_model_folder(path, "model")
    return path


def _local_path(source: str | Path, revision: str | None, name: str) -> Path | None:
    """Return an existing path, None for a hub id; raise `DSMoEError` for anything else."""
    path = user_path(source, name)
    if os.path.lexists(path):
        if revision is not None:
            raise DSMoEError(f"revision {revision!r} needs a hub id, got the local path {source}")
        return path
    if source in PRESETS:
        raise DSMoEError(f"{source} is a preset, which has no weights: {name} must be a checkpoint or a hub id")
    if not is_repo_id(source):
        raise DSMoEError(f"{source}: no such file or folder, and not a hub id of the form owner/name")
    return None


def _check_model_folder(path: Path, name: str) -> None:
    """Raise `DSMoEError` for a file, and for a folder that has something else than a model."""
    if not path.is_dir():
        inside = f"; did you mean {path.parent}?" if path.name == CONFIG else ""
        raise DSMoEError(f"{name} must be a folder, got the file {path}{inside}")
    if os.path.lexists(path / CONFIG):
        return
    for file, hint in _NOT_A_MODEL.items():
        if (path / file).is_file():
            raise DSMoEError(f"{path.absolute()} has no {CONFIG}: {hint(path)}")


def is_repo_id(source: str | Path) -> bool:
    """Return whether `source` has the form owner/name and is not an existing path."""
    return bool(_REPO_ID.fullmatch(str(source))) and not os.path.lexists(source)


def fetch(repo_id: str, *, revision: str | None = None) -> Path:
    """Download config, weights and tokenizer unless cached; return the cache's folder, whose name is the commit SHA."""
    with hub_of(repo_id) as constants:
        load = _from_cache if constants.HF_HUB_OFFLINE else _from_hub
        return load(repo_id, revision or constants.DEFAULT_REVISION)


def fetch_file(repo_id: str, file: str, *, revision: str | None = None) -> Path | None:
    """Download one file unless cached; return its path, or None if the repository has no such file."""
    with hub_of(repo_id) as constants:
        from huggingface_hub import try_to_load_from_cache

        commit: str = revision or constants.DEFAULT_REVISION
        if constants.HF_HUB_OFFLINE:
            cached = try_to_load_from_cache(repo_id, file, revision=commit)
            return Path(cached) if isinstance(cached, str) else None
        return _download(repo_id, file, commit) if file in list_files(repo_id, commit)[1] else None


@contextlib.contextmanager
def hub_of(repo_id: str, *, needed_by: str = "no such folder; a hub id") -> Iterator[Any]:
    """Yield the constants of huggingface_hub; prefix errors with the repository."""
    try:
        if not _REPO_ID.fullmatch(repo_id):
            raise DSMoEError("the repository id must have the form owner/name")
        try:
            from huggingface_hub import constants
        except ImportError:
            raise DSMoEError(f"{needed_by} needs `pip install 'dsmoe_jax[hub]'`") from None
        yield constants
    except ValueError as error:  # huggingface_hub validates ids by ValueError
        raise DSMoEError(f"{repo_id}: {error}") from None


def _from_hub(repo_id: str, revision: str) -> Path:
    sha, files = list_files(repo_id, revision)
    if CONFIG not in files:
        raise DSMoEError(f"the repository has no {CONFIG}")
    folder = _download(repo_id, CONFIG, sha).parent
    weights = _weights(files, "the repository", lambda name: _download(repo_id, name, sha))
    names = [name for name in (*_EXTRA_FILES, *weights) if name in files]
    blobs = folder.parent.parent / "blobs"
    check_space(blobs, sum(_missing_bytes(files[name], folder / name, blobs) for name in names))
    for name in names:
        _download(repo_id, name, sha)
    # Downloading by branch makes the cache record the branch's commit, for offline runs.
    _download(repo_id, CONFIG, revision)
    return folder


def list_files(repo_id: str, revision: str, *, purpose: str = "model") -> tuple[str, dict[str, Any]]:
    """Return the commit of a revision, as a branch may move during the download, and its files by name.

    `purpose` is one of `PURPOSES`.
    """
    from huggingface_hub import HfApi, constants

    timeout = constants.HF_HUB_ETAG_TIMEOUT  # model_info has none by default
    get_info = HfApi().dataset_info if purpose == "dataset" else HfApi().model_info
    with one_line_errors(revision, purpose=purpose):
        info = get_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    if not re.fullmatch(r"[0-9a-f]{40}", sha := info.sha or ""):
        raise DSMoEError(f"the hub returned commit {quote(sha)} for revision {revision!r}")
    return sha, {file.rfilename: file for file in info.siblings or ()}


def download_dataset_file(repo_id: str, file: str, revision: str) -> Path:
    """Download a file of a dataset unless cached; return its path in the cache."""
    from huggingface_hub import hf_hub_download

    with one_line_errors(revision, purpose="dataset"):
        return Path(hf_hub_download(repo_id, file, revision=revision, repo_type="dataset"))


def _download(repo_id: str, file: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    with one_line_errors(revision):
        return Path(hf_hub_download(repo_id, file, revision=revision))


def _from_cache(repo_id: str, revision: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    where = f"HF_HUB_OFFLINE is set and the cache, {constants.HF_HUB_CACHE},"
    config = try_to_load_from_cache(repo_id, CONFIG, revision=revision)
    if not isinstance(config, str):
        raise DSMoEError(f"{where} has no {CONFIG} of revision {revision!r}")
    folder = Path(config).parent
    _weights({file.name for file in folder.iterdir() if file.is_file()}, where, folder.joinpath)
    return folder


def _weights(files: Collection[str], where: str, get: Callable[[str], Path]) -> list[str]:
    """Return the weight files among `files`, the index first; `get` returns the path of a file."""
    try:
        chosen = choose_layout(files.__contains__, lambda index: read_index(get(index)).values())
    except DSMoEError as error:
        raise DSMoEError(f"{where} {error}") from None
    if chosen is None:
        raise DSMoEError(f"{where} has no weights; looked for {', '.join(name for name, _, _ in LAYOUTS)}")
    name, is_index, _ = chosen
    if not is_index:
        return [name]
    shards = dict.fromkeys(read_index(get(name)).values())
    if missing := next((shard for shard in shards if shard not in files), None):
        raise DSMoEError(f"{where} lacks {missing}, which {name} names")
    return [name, *shards]


def _missing_bytes(file: Any, path: Path, blobs: Path) -> int:
    """Return the bytes of a file not yet cached by another commit or an interrupted download."""
    blob = blobs / str(file.lfs.sha256 if file.lfs else file.blob_id)
    part = blob.with_name(f"{blob.name}.incomplete")
    if path.exists() or blob.exists():
        return 0
    return (file.size or 0) - (part.stat().st_size if part.is_file() else 0)


_ADVICE: Final[Mapping[int, str]] = {
    401: "; it does not accept the token (HF_TOKEN, or `hf auth login`)",
    403: "; the token (HF_TOKEN, or `hf auth login`) does not permit it",
    429: "; too many requests, try again later",
}


# Messages by purpose, with the hub's name: there is no such repository; it cannot be reached.
PURPOSES: Final[Mapping[str, tuple[str, str]]] = {
    "model": (
        "no such folder, and no such repository on {} (if private, set HF_TOKEN)",
        "no such folder, and it cannot be fetched from {}",
    ),
    "upload": (
        "no such repository on {}, or the token (HF_TOKEN, or `hf auth login`) cannot write to it",
        "cannot upload to {}",
    ),
    "dataset": (
        "no such dataset on {} (if private, set HF_TOKEN)",
        "cannot be fetched from {}; offline, set HF_HUB_OFFLINE=1 to read the cache",
    ),
}


@contextlib.contextmanager
def one_line_errors(revision: str, *, purpose: str = "model") -> Iterator[None]:
    """Raise errors of huggingface_hub in one line, without its messages, which may contain server text or the token."""
    from huggingface_hub import constants, errors

    try:
        yield
        return
    # The errors of its HTTP libraries (httpx, httpx2) and of hf_xet have no narrower common base.
    except Exception as raised:
        error = raised.__cause__ if isinstance(raised, errors.LocalEntryNotFoundError) else None
        error = error or raised
    hub = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2] or constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    text = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(_reason(error).split()))[:300] or type(error).__name__
    text = "the token is malformed" if "Bearer" in text else text
    absent, failed = PURPOSES[purpose]
    # In this order, as some are subclasses of others.
    table = (
        (errors.GatedRepoError, f"its owner grants access: ask at {hub}, then set HF_TOKEN or run `hf auth login`"),
        (errors.RepositoryNotFoundError, absent.format(hub)),
        (errors.RevisionNotFoundError, f"has no revision {revision!r}"),
        (errors.HfHubHTTPError, f"{hub} returned HTTP {status}{_ADVICE.get(status, '')}"),
        (Exception, f"{failed.format(hub)}: {text}"),
    )
    raise DSMoEError(next(message for kind, message in table if isinstance(error, kind)))


def _reason(error: BaseException) -> str:
    """Return the message of the first of the operating system's errors that led to `error`, else its own."""
    text, cause = str(error), error
    while cause is not None:
        if isinstance(cause, OSError):
            text = cause.strerror or str(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return text
