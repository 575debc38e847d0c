"""A checkpoint from the Hugging Face hub: the files that are read here, in the hub's own cache. Start at `fetch`.

What goes over the network is `huggingface_hub`'s work, so its environment variables hold: HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the others. No code is ever fetched.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import check_space
from dsmoe_jax.text.tokenizer import TOKENIZER_FILES

from .reader import LAYOUTS, choose_layout, read_index
from .torch_pickle import show

CONFIG: Final = "config.json"
# Fetched where the repository has them, before the weights: whoever has the weights has these too.
_BESIDE: Final = ("generation_config.json", *TOKENIZER_FILES)
_NAME: Final = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)


class Snapshot(NamedTuple):
    """What a repository holds at one commit, as far as it is read here."""

    folder: Path  # in the hub's cache
    repository: str
    revision: str  # the SHA of the commit that the wanted branch or tag was at


def is_repo_id(source: str | Path) -> bool:
    """Whether `source` reads as a repository's name, owner/name, and is no path here."""
    return bool(_NAME.fullmatch(str(source))) and not os.path.lexists(source)


def fetch(repository: str, *, revision: str | None = None) -> Snapshot:
    """Bring the config, the weights and the tokenizer of `repository` here; what the cache holds is not fetched again.

    `revision` is a branch, a tag or a commit, `main` by default. Weights are chosen as in `choose_layout`.
    With HF_HUB_OFFLINE=1 only the cache is asked.

    Raises `ValueError`, in one line, where huggingface_hub is missing; where the hub cannot be reached, refuses, or
    knows no such repository or revision; where that holds no config or no weights, or an index that names anything but
    weights beside itself; where the disk has no room for the rest; and, offline, where the cache lacks something.
    """
    try:
        if not _NAME.fullmatch(repository):
            raise DSMoEError("is no name of a repository, owner/name")
        try:
            from huggingface_hub import constants
        except ImportError:
            raise DSMoEError("the hub needs huggingface_hub: pip install 'dsmoe_jax[hub]'") from None
        load = _from_cache if constants.HF_HUB_OFFLINE else _from_hub
        folder = load(repository, revision or constants.DEFAULT_REVISION)
    except ValueError as error:
        raise DSMoEError(f"{repository}: {error}") from None
    return Snapshot(folder, repository, folder.name)


def _from_hub(repository: str, revision: str) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    def get(name: str, revision: str) -> Path:
        with _in_one_line(revision):
            return Path(hf_hub_download(repository, name, revision=revision))

    with _in_one_line(revision):
        # Its default is to wait for ever.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=timeout)
    files = {file.rfilename: file for file in info.siblings or ()}
    # Every file is asked for at this commit: the branch may move while they come.
    sha = info.sha or ""
    if not re.fullmatch(r"[0-9a-f]{40}", sha):
        raise DSMoEError(f"the hub names {show(sha)} for the commit of revision {revision!r}")
    if CONFIG not in files:
        raise DSMoEError(f"the repository holds no {CONFIG}")
    folder = get(CONFIG, sha).parent
    weights = _weights(files, "the repository", lambda name: get(name, sha))
    wanted = [name for name in (*_BESIDE, *weights) if name in files]
    blobs = folder.parent.parent / "blobs"
    check_space(blobs, sum(_missing_bytes(files[name], folder / name, blobs) for name in wanted))
    for name in wanted:
        get(name, sha)
    # Asked for by its branch, this one makes the cache note the branch's commit, for a run without network.
    get(CONFIG, revision)
    return folder


def _from_cache(repository: str, revision: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    where = f"HF_HUB_OFFLINE is set and the cache, {constants.HF_HUB_CACHE},"
    config = try_to_load_from_cache(repository, CONFIG, revision=revision)
    if not isinstance(config, str):
        raise DSMoEError(f"{where} holds no {CONFIG} of revision {revision!r}")
    folder = Path(config).parent
    _weights({file.name for file in folder.iterdir() if file.is_file()}, where, folder.joinpath)
    return folder


def _weights(files: Collection[str], where: str, get: Callable[[str], Path]) -> list[str]:
    """Which of `files` hold the weights, their index first; `get` is asked for the index alone."""
    try:
        chosen = choose_layout(files, files.__contains__, lambda index: read_index(get(index)).values())
    except ValueError as error:
        raise DSMoEError(f"{where} {error}") from None
    if chosen is None:
        raise DSMoEError(f"{where} holds no weights; looked for {', '.join(name for name, _, _ in LAYOUTS)}")
    name, is_index, _ = chosen
    if not is_index:
        return [name]
    shards = dict.fromkeys(read_index(get(name)).values())
    if missing := next((shard for shard in shards if shard not in files), None):
        raise DSMoEError(f"{where} lacks {missing}, which {name} names")
    return [name, *shards]


def _missing_bytes(file: Any, path: Path, blobs: Path) -> int:
    """What of a listed file is still to come; another commit may have brought its blob, a broken run a part of it."""
    blob = blobs / str(file.lfs.sha256 if file.lfs else file.blob_id)
    part = blob.with_name(f"{blob.name}.incomplete")
    if path.exists() or blob.exists():
        return 0
    return (file.size or 0) - (part.stat().st_size if part.is_file() else 0)


@contextlib.contextmanager
def _in_one_line(revision: str) -> Iterator[None]:
    """What huggingface_hub raises, of several lines or none, as a `ValueError` of one."""
    try:
        yield
    # Its HTTP library's errors (httpx, httpx2) and hf_xet's share no narrower base.
    except Exception as error:
        from huggingface_hub import errors

        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        raise DSMoEError(_say(cause or error, revision)) from None


# What to do about an answer of the hub.
_ADVICE: Final[Mapping[int, str]] = {
    401: "; it does not accept the token (HF_TOKEN, or `hf auth login`)",
    403: "; the token (HF_TOKEN, or `hf auth login`) does not permit it",
    429: "; too many requests, try again later",
}


def _say(error: BaseException, revision: str) -> str:
    """The cause in our words: theirs may hold a server's text or, in a header, the token."""
    from huggingface_hub import constants, errors

    hub = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2] or constants.ENDPOINT
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    text = " ".join(str(error).split())[:300] or type(error).__name__
    # The first that fits: they are kinds of one another.
    table = (
        (errors.GatedRepoError, f"its owner grants access: ask at {hub}, then set HF_TOKEN or run `hf auth login`"),
        (errors.RepositoryNotFoundError, f"no folder here; {hub} shows no such repository (if private, set HF_TOKEN)"),
        (errors.RevisionNotFoundError, f"has no revision {revision!r}"),
        (errors.HfHubHTTPError, f"{hub} answered {status}{_ADVICE.get(status, '')}"),
        (Exception, f"cannot be fetched from {hub}: {'the token is malformed' if 'Bearer' in text else text}"),
    )
    return next(words for kind, words in table if isinstance(error, kind))
