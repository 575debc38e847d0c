"""Upload a checkpoint to the Hugging Face Hub: `push`."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from dsmoe_jax.checkpoint.native import as_dtype
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.storage.atomic_dir import check_new_path
from dsmoe_jax.storage.paths import user_path

from .exporter import export_hf
from .hub import hub_of, one_line_errors
from .model_card import model_card

_log = logging.getLogger(__name__)


def push(
    checkpoint: str | Path,
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
    """Export a checkpoint with PyTorch code and a model card, and upload it to the Hugging Face Hub.

    Weights are uploaded in chunks; a repeated upload after an interruption sends only what is missing. The export takes
    the size of the checkpoint on disk until the upload is complete. HF_TOKEN and HF_ENDPOINT apply.

    Args:
        checkpoint: Native checkpoint or Hugging Face folder.
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
    as_dtype(dtype)
    folder = user_path(checkpoint, "checkpoint")
    card = model_card(folder, repo_id, license=license, base_model=base_model)

    def write(output_dir: Path) -> None:
        export_hf(folder, output_dir, dtype=dtype, with_modeling=True, progress=progress)
        (output_dir / "README.md").write_text(card, encoding="utf-8")

    if dry_run is not None:
        write(check_new_path(dry_run))
        return str(dry_run)
    with hub_of(repo_id), one_line_errors(revision or "main"):
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise DSMoEError("an upload needs a token: set HF_TOKEN or run `hf auth login`")
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            HfApi().create_branch(repo_id, branch=revision, exist_ok=True)
    parent = folder.resolve().parent
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.push.", dir=parent) as temporary:
        write(Path(temporary) / "export")
        _log.info("Uploading to %s", repo_id)
        with hub_of(repo_id), one_line_errors(revision or "main"):
            options = {"revision": revision, "commit_message": "Upload of dsmoe_jax"}
            commit = HfApi().upload_folder(repo_id=repo_id, folder_path=Path(temporary) / "export", **options)
    return str(commit.commit_url)
