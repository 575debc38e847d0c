"""Upload a native checkpoint to the Hugging Face Hub: `push`."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.storage.atomic_dir import check_new_path
from dsmoe_jax.storage.paths import user_path

from .exporter import export_hf
from .hub import check_repo_id, import_hub, one_line_errors
from .model_card import model_card

_log = logging.getLogger(__name__)


def push(
    native: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dtype: Any = None,
    license: str | None = None,
    base_model: str | None = None,
    dry_run: str | Path | None = None,
    progress: Meter = silent,
) -> str:
    """Export a native checkpoint with PyTorch code and a model card, and upload it to the Hugging Face Hub.

    Weights are uploaded in chunks; a repeated upload after an interruption sends only what is missing. The export takes
    the size of the checkpoint on disk until the upload is complete. HF_TOKEN and HF_ENDPOINT apply.

    Args:
        native: Native checkpoint.
        repo_id: Repository to create or update, `owner/name`.
        private: Create a private repository; an existing one keeps its visibility.
        revision: Branch to upload to, created if missing; default: `main`.
        dtype: "float32", "bfloat16" or "float16" to cast; default: the stored dtypes.
        license: License stated in the model card, for example "mit".
        base_model: Hub id of the base model stated in the model card.
        dry_run: New folder to write instead of uploading.
        progress: Progress meter of the export.

    Returns:
        URL of the commit, or the folder of a dry run.

    Raises:
        DSMoEError: The checkpoint is damaged, the disk is too full, or the hub refuses; nothing is left on disk.
    """
    check_repo_id(repo_id)
    as_dtype(dtype)
    native = user_path(native, "checkpoint")
    card = model_card(native, repo_id, license=license, base_model=base_model)

    def write(folder: Path) -> None:
        export_hf(native, folder, dtype=dtype, with_modeling=True, progress=progress)
        (folder / "README.md").write_text(card, encoding="utf-8")

    if dry_run is not None:
        folder = check_new_path(dry_run)
        write(folder)
        return str(folder)
    api = import_hub().HfApi()
    with _named(repo_id, revision):
        if import_hub().get_token() is None:
            raise DSMoEError("uploads need a token: set HF_TOKEN or run `hf auth login`")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{native.name}.push.", dir=native.resolve().parent) as temporary:
        folder = Path(temporary) / "export"
        write(folder)
        _log.info("Uploading to %s", repo_id)
        with _named(repo_id, revision):
            message = "Upload of dsmoe_jax"
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    return str(commit.commit_url)


@contextlib.contextmanager
def _named(repo_id: str, revision: str | None) -> Iterator[None]:
    """Raise errors in one line that begins with the repository."""
    try:
        with one_line_errors(revision or "main"):
            yield
    except ValueError as error:
        raise DSMoEError(f"{repo_id}: {error}") from None
